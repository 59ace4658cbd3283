"""Times conv_rows against oneDNN's channels-last convolution and torch's NCHW one, and shows every error first.

``python -m gear_engine.bench.conv_rows [--json FILE]``; sizes are strips of a VQ-16 decoder at 256 px. The error is the
root mean square against float64, relative to the result's. ``of_rate_%`` is the rate of a direct convolution's products
over the machine's fp32 multiply rate, measured in the same run; tiles (Winograd) need fewer and may pass 100%.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from gear_engine.bench import timing
from gear_engine.ops.conv_rows import conv_rows, pack

#: rows, width, in, out, edge
SIZES = ((16, 16, 512, 512, 3), (32, 64, 256, 256, 3), (32, 256, 128, 128, 3), (32, 128, 128, 512, 2))


def measure(rows: int, width: int, channels: int, outputs: int, edge: int, ceiling: float) -> list[dict[str, Any]]:
    """One row per peer; ``ceiling`` in operations per second."""
    source = F.silu(torch.randn(rows + edge - 1, width, channels))
    weight = torch.randn(outputs, channels, edge, edge) / (channels * edge**2) ** 0.5
    image = source.permute(2, 0, 1).unsqueeze(0)  # the same memory, as torch's channels-last image
    planes = image.contiguous()
    kernels = {tile: pack(weight, tile) for tile in ((0, 2, 4) if edge == 3 else (0, 5))}
    out = torch.empty(rows, width + 3 - edge, outputs)

    def ours(tile: int) -> torch.Tensor:
        conv_rows(source, kernels[tile], None, out, backend="cpu")
        return out.permute(2, 0, 1).unsqueeze(0)

    calls = {
        "torch NCHW": lambda: F.conv2d(planes, weight, padding=(0, 1)),
        "torch channels last": lambda: F.conv2d(image, weight, padding=(0, 1)),
        "cpu": lambda: ours(0),
    }
    calls |= {f"cpu, tiles of {tile}": functools.partial(ours, tile) for tile in kernels if tile}
    exact = F.conv2d(planes.double(), weight.double(), padding=(0, 1))
    errors = {peer: float((call() - exact).norm() / exact.norm()) for peer, call in calls.items()}
    samples = timing.alternate(calls, budget=5)
    flops = 2 * out.numel() * channels * edge**2
    shape = f"{rows} x {width}, {channels} -> {outputs}, {edge} x {edge}"
    found = []
    for peer, times in samples.items():
        row = timing.statistics(times)
        rate = flops / (row["median_ms"] / 1e3)
        ratio = timing.statistics(samples["torch NCHW"])["median_ms"] / row["median_ms"]
        rates = {"x NCHW": ratio, "GFLOP/s": rate / 1e9, "of_rate_%": 100 * rate / ceiling}
        found.append({"shape": shape, "what": peer, **row, **rates, "rms_error": errors[peer]})
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gear_engine.bench.conv_rows", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the record to this file")
    options = parser.parse_args(arguments)
    ceilings = timing.measure_ceilings()
    with torch.inference_mode():
        rows = [row for size in SIZES for row in measure(*size, ceilings.rate("float32"))]
    print(f"{ceilings}\n{timing.render(rows)}")
    if options.json:
        timing.write_json(options.json, {**timing.provenance(), "ceilings": ceilings.record(), "rows": rows})


if __name__ == "__main__":
    main()
