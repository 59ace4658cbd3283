"""Times soft_readout against torch eager: ``python -m gear_engine.bench.soft_readout [--json FILE]``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from gear_engine.bench import timing
from gear_engine.ops.soft_readout import reference, soft_readout

CODES = 16384


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gear_engine.bench.soft_readout", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the record to this file")
    options = parser.parse_args(arguments)
    ceilings = timing.measure_ceilings()
    rate = ceilings.rate("float32")
    rows: list[dict[str, Any]] = []
    for n, width, channels in ((256, 8, 768), (1024, 8, 768), (256, 256, 768)):
        z, codebook, table = torch.randn(n, width), torch.randn(CODES, width), torch.randn(CODES, channels)
        calls = {
            "gear_engine": lambda a=(z, codebook, table): soft_readout(*a, 0.3, "l2"),
            "torch eager": lambda a=(z, codebook, table): reference(*a, 0.3, "l2"),
        }
        for name, samples in timing.alternate(calls, budget=8).items():
            row = timing.statistics(samples)
            share = 100 * 2.0 * n * CODES * (width + channels) / (row["median_ms"] / 1e3) / rate
            rows.append({"N": n, "d": width, "C": channels, "what": name, **row, "of_rate_%": share})
    print(timing.render(rows))
    if options.json:
        timing.write_json(options.json, {**timing.provenance(), "ceilings": ceilings.record(), "rows": rows})


if __name__ == "__main__":
    main()
