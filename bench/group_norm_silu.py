"""Times group_norm_silu, with the moments it needs, against torch's GroupNorm and SiLU on channels-last images.

``python -m gear_engine.bench.group_norm_silu [--json FILE]``; sizes are those of a VQ-16 decoder at 256 px. The floor
counts the operand once as read for the moments, once as read and once as written.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from gear_engine.bench import timing
from gear_engine.ops.group_norm_silu import group_norm_silu
from gear_engine.ops.residual_moments import residual_moments

GROUPS = 32
SIZES = ((16, 512), (64, 256), (128, 128), (256, 128))
DTYPES = (("fp32", torch.float32), ("bf16", torch.bfloat16))


def measure(edge: int, channels: int, name: str, dtype: torch.dtype, bandwidth: float) -> list[dict[str, Any]]:
    """One row per peer: fp32 input, output in ``dtype``."""
    x = torch.randn(edge, edge, channels)
    image = x.permute(2, 0, 1).unsqueeze(0)  # the same memory, as torch's channels-last image
    weight, bias, out = torch.randn(channels), torch.randn(channels), torch.empty_like(x, dtype=dtype)
    moments = torch.empty(edge, GROUPS, 2, dtype=torch.float64)

    def ours(backend: str) -> None:
        residual_moments(x, None, moments, backend=backend)
        group_norm_silu(x, moments, weight, bias, out, backend=backend)

    calls = {
        "torch": lambda: F.silu(F.group_norm(image, GROUPS, weight, bias, eps=1e-6)).to(dtype),
        "reference": lambda: ours("reference"),
        "cpu": lambda: ours("cpu"),
    }
    samples = timing.alternate(calls, budget=5)
    floor = (2 * x.nbytes + out.nbytes) / bandwidth * 1e3
    rows = []
    for peer, times in samples.items():
        row = timing.statistics(times)
        ratio = timing.statistics(samples["torch"])["median_ms"] / row["median_ms"]
        share = 100 * floor / row["median_ms"]
        rows.append({"edge": edge, "C": channels, "out": name, "what": peer, **row, "x torch": ratio, "floor_%": share})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gear_engine.bench.group_norm_silu", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the record to this file")
    options = parser.parse_args(arguments)
    bandwidth = timing.measure_ceilings().read_bandwidth
    rows = [
        row
        for edge, channels in SIZES
        for name, dtype in DTYPES
        for row in measure(edge, channels, name, dtype, bandwidth)
    ]
    print(f"read {bandwidth / 1e9:.1f} GB/s\n{timing.render(rows)}")
    if options.json:
        timing.write_json(options.json, {**timing.provenance(), "read_B/s": bandwidth, "rows": rows})


if __name__ == "__main__":
    main()
