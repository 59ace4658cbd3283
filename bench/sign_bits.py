"""Times sign_bits against torch eager: ``python -m gear_engine.bench.sign_bits [--json FILE]``.

``image``: channels lie apart and the vectors side by side, as an encoder leaves one image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from gear_engine.bench import timing
from gear_engine.ops.sign_bits import reference, sign_bits


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gear_engine.bench.sign_bits", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the record to this file")
    options = parser.parse_args(arguments)
    ceilings = timing.measure_ceilings()
    bandwidth = ceilings.read_bandwidth
    rows = []
    for n, width, groups, layout in (
        (4096, 14, 1, "rows"),
        (65536, 14, 1, "rows"),
        (65536, 14, 1, "image"),
        (65536, 32, 4, "rows"),
    ):
        z = torch.randn(n, width) if layout == "rows" else torch.randn(width, n).t()
        calls = {
            "gear_engine": lambda z=z, g=groups: sign_bits(z, g),
            "torch eager": lambda z=z, g=groups: reference(z, g),
        }
        for name, samples in timing.alternate(calls, budget=5).items():
            row = timing.statistics(samples)
            moved = 8 * n * width + 8 * n * groups  # latent read, signs and indices written
            share = 100 * moved / (row["median_ms"] / 1e3) / bandwidth
            rows.append(
                {"N": n, "D": width, "groups": groups, "layout": layout, "what": name, **row, "of_bandwidth_%": share}
            )
    print(timing.render(rows))
    if options.json:
        timing.write_json(options.json, {**timing.provenance(), "ceilings": ceilings.record(), "rows": rows})


if __name__ == "__main__":
    main()
