"""The rows of a report as CSV: plain numbers in the schema's units, one line per row."""

from __future__ import annotations

import csv
import io
from typing import Any

from gear_engine.report.record import Report, Row

__all__ = ["csv_text"]

COLUMNS = (
    "device", "commit", "benchmark", "implementation", "role", "params", "samples",
    "median_s", "p10_s", "p25_s", "p75_s", "p90_s", "p99_s", "iqr_s", "wall_median_s", "noise", "settled",
    "items", "item", "items_per_s", "bytes", "ops", "floor_s", "bound_by", "of_floor", "check", "check_error", "flags",
)  # fmt: skip


def _line(report: Report, row: Row) -> dict[str, Any]:
    summary, floor, check = row.summary, row.floor, row.data["check"]
    return {
        "device": report.device["name"],
        "commit": report.commit,
        "benchmark": row.benchmark,
        "implementation": row.implementation,
        "role": row.role,
        "params": ";".join(f"{name}={value}" for name, value in row.params.items()),
        "samples": summary.count,
        **{f"{name}_s": getattr(summary, name) for name in ("median", "p10", "p25", "p75", "p90", "p99", "iqr")},
        "wall_median_s": row.wall_median,
        "noise": summary.noise,
        "settled": row.data["settled"],
        "items": row.data["items"],
        "item": row.data["item"],
        "items_per_s": row.throughput,
        "bytes": row.data["bytes"],
        "ops": row.data["ops"],
        "floor_s": None if floor is None else floor[0],
        "bound_by": None if floor is None else floor[1],
        "of_floor": row.reached,
        "check": None if check is None else "passed" if check["passed"] else "differs",
        "check_error": None if check is None else check["error"],
        "flags": "; ".join(row.data["flags"]),
    }


def csv_text(report: Report) -> str:
    """A header line and a line per row."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in report.rows:
        writer.writerow(_line(report, row))
    return out.getvalue()
