"""Times residual_moments against the same steps in torch: an addition (or a join of phases) and the sums per row.

``python -m gear_engine.bench.residual_moments [--json FILE]``; sizes are those of a VQ-16 decoder at 256 px, the source
in bf16. The floor counts the source read once and the residual read (if added to) and written once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from gear_engine.bench import timing
from gear_engine.ops.residual_moments import residual_moments

GROUPS = 32
SIZES = ((16, 512), (64, 256), (128, 128), (256, 128))
MODES = ("moments", "accumulate", "phases")


def measure(edge: int, channels: int, mode: str, bandwidth: float) -> list[dict[str, Any]]:
    """One row per backend."""
    shape = (edge // 2 + 1, edge // 2 + 1, 4, channels) if mode == "phases" else (edge, edge, channels)
    source = torch.randn(shape).bfloat16()
    residual = None if mode == "moments" else torch.zeros(edge, edge, channels)
    moments = torch.empty(edge, GROUPS, 2, dtype=torch.float64)
    offset = 1 if mode == "phases" else None

    def run(backend: str) -> None:
        residual_moments(
            source, residual, moments, accumulate=mode == "accumulate", phase_offset=offset, backend=backend
        )

    samples = timing.alternate({"reference": lambda: run("reference"), "cpu": lambda: run("cpu")}, budget=5)
    stream = 0 if residual is None else residual.nbytes * (2 if mode == "accumulate" else 1)
    floor = (source.nbytes + stream) / bandwidth * 1e3
    rows = []
    for peer, times in samples.items():
        row = timing.statistics(times)
        ratio = timing.statistics(samples["reference"])["median_ms"] / row["median_ms"]
        share = 100 * floor / row["median_ms"]
        rows.append(
            {"edge": edge, "C": channels, "mode": mode, "what": peer, **row, "x torch": ratio, "floor_%": share}
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gear_engine.bench.residual_moments", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the record to this file")
    options = parser.parse_args(arguments)
    bandwidth = timing.measure_ceilings().read_bandwidth
    rows = [row for edge, channels in SIZES for mode in MODES for row in measure(edge, channels, mode, bandwidth)]
    print(f"read {bandwidth / 1e9:.1f} GB/s\n{timing.render(rows)}")
    if options.json:
        timing.write_json(options.json, {**timing.provenance(), "read_B/s": bandwidth, "rows": rows})


if __name__ == "__main__":
    main()
