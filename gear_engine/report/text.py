"""Numbers as people read them, and the tables of a report as rows of text: shared by every writer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gear_engine.report.record import Report, Row

__all__ = [
    "COLUMNS", "bytes_text", "device_lines", "params_text", "percent", "rate_text", "row_cells", "seconds_text",
    "summary_table", "throughput_text", "version_text",
]  # fmt: skip

#: Columns of a report's table; see :func:`row_cells`.
COLUMNS = (
    "work", "implementation", "median", "IQR", "p10 to p90", "p99", "wall clock", "throughput", "faster than",
    "floor", "of floor", "capture", "check", "flags",
)  # fmt: skip


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """``value`` with three significant digits in the largest unit that it fills."""
    scale, unit = next(((scale, unit) for scale, unit in units if abs(value) >= scale), units[-1])
    number = value / scale
    digits = max(0, 2 - math.floor(math.log10(abs(number)))) if number else 0
    return f"{number:.{min(digits, 3)}f} {unit}"


def seconds_text(seconds: float) -> str:
    return _scaled(seconds, ((1, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")))


def bytes_text(count: float) -> str:
    return _scaled(count, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")))


def rate_text(rate: float, unit: str) -> str:
    """``rate_text(2.6e10, "B/s")`` is ``26.0 GB/s``."""
    return _scaled(rate, ((1e12, "T" + unit), (1e9, "G" + unit), (1e6, "M" + unit), (1e3, "k" + unit), (1, unit)))


def throughput_text(row: Row) -> str:
    """Items per second, or seconds per item below one per second."""
    item = row.data["item"]
    if row.throughput < 1:
        return f"{seconds_text(1 / row.throughput)}/{item}"
    number, prefix = _scaled(row.throughput, ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))).split(" ")
    return f"{number}{prefix} {item}/s"


def percent(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{100 * share:.0f}%" if share >= 0.0995 else f"{100 * share:.1f}%"


def params_text(params: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in params.items())


def check_text(row: Row) -> str:
    check = row.data["check"]
    if check is None:
        return "-"
    error = "not finite" if check["error"] is None else f"{check['error']:.1e}" if check["error"] else "0"
    return f"{'ok' if check['passed'] else 'DIFFERS'} ({error})"


def capture_text(row: Row) -> str:
    """What capturing graphs took before: ``1.20 s, 33.0 MB``; empty without graphs."""
    capture = row.data.get("capture")
    return f"{seconds_text(capture['seconds'])}, {bytes_text(capture['bytes'])}" if capture else ""


def against_text(row: Row, group: Sequence[Row]) -> str:
    """How many times faster an engine's row is than the others that did the same work: ``9.1x reference``."""
    if row.role != "engine":
        return ""
    others = [other for other in group if other.work == row.work and other.role != "engine"]
    ratios = [(other.summary.median / row.summary.median, other.implementation) for other in others]
    return ", ".join(f"{ratio:.{0 if ratio >= 10 else 1 if ratio >= 1 else 2}f}x {name}" for ratio, name in ratios)


def row_cells(row: Row, group: Sequence[Row] = ()) -> dict[str, str]:
    """A row of the table by column; ``group``: the rows of its benchmark, to be compared with."""
    summary, floor = row.summary, row.floor
    return {
        "work": params_text(row.params),
        "implementation": row.implementation,
        "median": seconds_text(summary.median),
        "IQR": seconds_text(summary.iqr),
        "p10 to p90": f"{seconds_text(summary.p10)} to {seconds_text(summary.p90)}",
        "p99": seconds_text(summary.p99),
        "wall clock": seconds_text(row.wall_median) if row.data.get("device_samples") else "",
        "throughput": throughput_text(row),
        "faster than": against_text(row, group),
        "floor": "-" if floor is None else f"{seconds_text(floor[0])} ({floor[1]})",
        "of floor": percent(row.reached),
        "capture": capture_text(row),
        "check": check_text(row),
        "flags": "; ".join(row.data["flags"]),
    }


def device_lines(report: Report) -> list[tuple[str, str]]:
    """(what, value) of the device, the versions' home and how it was measured, for the head of a page."""
    device, settings, ceilings = report.device, report.data["settings"], report.data["ceilings"]
    cpu, gpu = device["cpu"], device["gpu"]
    lines = [("Device", device["name"])]
    if gpu is not None:
        lines += [
            (
                "GPU",
                f"{gpu['multiprocessors']} multiprocessors, {bytes_text(gpu['memory'])}, driver {gpu.get('driver')}",
            ),
            (
                "GPU limits",
                f"power {gpu.get('power_limit_w')} W, SM clock up to {gpu.get('sm_clock_max_mhz')} MHz, "
                f"ECC {_on_off(gpu.get('ecc'))}, MIG {_on_off(gpu.get('mig'))}",
            ),
        ]
    virtual = ", virtual machine" if cpu["virtual"] else ""
    lines += [
        (
            "CPU",
            f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads used, "
            f"{bytes_text(cpu['memory'])}{virtual}",
        ),
        ("Instruction sets", f"{', '.join(cpu['instruction_sets'])}; kernels use {cpu.get('isa') or 'none'}"),
    ]
    rates = ", ".join(f"{name} {rate_text(rate, 'op/s')}" for name, rate in ceilings["rates"].items())
    bandwidth = "not measured" if ceilings["bandwidth"] is None else rate_text(ceilings["bandwidth"], "B/s")
    lines += [
        ("Measured ceilings", f"memory {bandwidth}; multiply-adds: {rates or 'not measured'}"),
        ("Commit", report.commit),
        ("Versions", version_text(report)),
        ("Command", report.data["command"]),
        ("Measured", report.data["created"].replace("T", " ").replace("Z", " UTC")),
        (
            "Timing",
            f"{settings['clock']}; until half the 95% interval of the median is within "
            f"{settings['noise_bound']:.0%}, or {settings['max_seconds_per_row']:g} s or {settings['max_samples']} "
            "samples per row",
        ),
        ("Caches", settings["cache_policy"]),
        ("Data", settings["data"]),
    ]
    return lines


def _on_off(value: bool | None) -> str:
    return "unknown" if value is None else "on" if value else "off"


def version_text(report: Report) -> str:
    return ", ".join(f"{name} {version}" for name, version in report.data["versions"].items())


def summary_table(record: dict[str, Any]) -> str:
    """The report as plain text for a terminal: a block per benchmark, without check and flags where there are none."""
    report = Report(record)
    columns = ("work", "implementation", "median", "IQR", "throughput", "faster than", "of floor", "check")
    blocks = []
    for name, rows in report.by_benchmark().items():
        cells = [row_cells(row, rows) for row in rows]
        widths = {column: max(len(cell[column]) for cell in cells) for column in columns}
        lines = ["  ".join(cell[column].ljust(widths[column]) for column in columns).rstrip() for cell in cells]
        blocks.append("\n".join([name, *("  " + line for line in lines)]))
    for entry in record["skipped"]:
        blocks.append(f"skipped {entry['id']}: {entry['reason']}")
    return "\n".join(blocks)
