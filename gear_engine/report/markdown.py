"""Reports and comparisons as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gear_engine.report.compare import Change, Comparison
from gear_engine.report.record import Report
from gear_engine.report.text import COLUMNS, device_lines, percent, row_cells, seconds_text

__all__ = ["cell", "comparison_markdown", "report_markdown", "verdict_lines"]


def _plain(text: str) -> str:
    """Text of a record, in which Markdown then sees no tag, link or code."""
    return text.replace("<", "&lt;").replace("](", "]\\(").replace("`", "'")


def cell(text: str) -> str:
    """:func:`_plain` inside a table."""
    return _plain(text).replace("|", "\\|")


def _table(columns: Sequence[str], lines: Sequence[Mapping[str, str]], right: frozenset[str] = frozenset()) -> str:
    head = "| " + " | ".join(columns) + " |"
    rule = "| " + " | ".join("---:" if column in right else "---" for column in columns) + " |"
    body = ["| " + " | ".join(cell(line[column]) for column in columns) + " |" for line in lines]
    return "\n".join([head, rule, *body])


def report_markdown(report: Report, images: Mapping[str, str]) -> str:
    """The whole report; ``images``: title -> file name of each plot beside it."""
    parts = [f"# Latency report: {_plain(report.device['name'])}", ""]
    parts += [_table(("", " "), [{"": f"**{what}**", " ": value} for what, value in device_lines(report)]), ""]
    for title, file in images.items():
        parts += [f"![{title}]({file})", ""]
    right = frozenset({"median", "IQR", "p99", "wall clock", "throughput", "floor", "of floor"})
    for name, rows in report.by_benchmark().items():
        cells = [row_cells(row, rows) for row in rows]
        columns = [column for column in COLUMNS if any(cell[column] for cell in cells)]
        parts += [f"## {_plain(name)}", "", _table(columns, cells, right), ""]
        for row in rows:
            if row.data.get("breakdown"):
                title = _plain(f"Where the time goes, {row.implementation}, {row.work}")
                parts += [f"{title}:", "", _breakdown(row.data), ""]
    if report.data["skipped"]:
        lines = [f"- `{_plain(entry['id'])}`: {_plain(entry['reason'])}" for entry in report.data["skipped"]]
        parts += ["## Not run", "", *lines, ""]
    return "\n".join(parts)


def _breakdown(row: dict[str, list[dict[str, float]]]) -> str:
    total = sum(part["seconds"] for part in row["breakdown"])
    lines = [
        {
            "kernel": str(part["name"]),
            "calls": f"{part['calls']:g}" if part["calls"] else "",
            "time": seconds_text(part["seconds"]),
            "share": percent(part["seconds"] / total if total else None),
        }
        for part in row["breakdown"]
    ]
    return _table(("kernel", "calls", "time", "share"), lines, frozenset({"calls", "time", "share"}))


def _change_text(change: Change) -> str:
    ratio = change.ratio
    high = "?" if ratio.high > 99 else f"{ratio.high - 1:+.1%}"
    low = "?" if ratio.low < 0.01 else f"{ratio.low - 1:+.1%}"
    return f"{ratio.value - 1:+.1%} [{low}, {high}]"


def _machine_text(change: Change) -> str:
    moved = f"±{change.machine - 1:.0%}" if change.machine > 1 else ""
    return f"busy {moved}".rstrip() if change.disturbed else moved


def verdict_lines(comparison: Comparison) -> list[str]:
    """What changed beyond noise, in words; the first line is the summary."""
    counts = {name: comparison.count(name) for name in ("slower", "faster", "equal", "cannot tell")}
    summary = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    lines = [f"{len(comparison.changes)} rows in common: {summary}."]
    for change in comparison.changes:
        if change.verdict in ("slower", "faster"):
            lines.append(f"{change.verdict.upper()}: {change.row.id}: {_change_text(change)}")
    return lines


def comparison_markdown(comparisons: Sequence[Comparison]) -> str:
    """Every other report against the baseline, row by row."""
    baseline = comparisons[0].baseline
    parts = ["# Comparison", "", f"Baseline: {_origin(baseline)}", ""]
    for comparison in comparisons:
        parts += [f"## Against {_origin(comparison.other)}", ""]
        if not comparison.same_device:
            parts += ["The devices differ: ratios compare devices, not only commits.", ""]
        parts += [f"- {_plain(line)}" for line in verdict_lines(comparison)]
        lines = [
            {
                "benchmark": change.row.benchmark,
                "work": ", ".join(f"{name}={value}" for name, value in change.row.params.items()),
                "implementation": change.row.implementation,
                "baseline": seconds_text(change.row.summary.median),
                "other": seconds_text(change.other.summary.median),
                "time, 95% interval": _change_text(change),
                "machine": _machine_text(change),
                "verdict": f"**{change.verdict}**" if change.verdict in ("slower", "faster") else change.verdict,
            }
            for change in comparison.changes
        ]
        right = frozenset({"baseline", "other", "time, 95% interval", "machine"})
        parts += ["", _table(tuple(lines[0]), lines, right), ""]
        for what, ids in (("baseline", comparison.only_baseline), ("other", comparison.only_other)):
            if ids:
                parts += [_plain(f"Only in the {what}: {', '.join(ids)}"), ""]
    parts.append(
        'The interval covers sampling noise and the number of rows; "machine" is how far control measurements around '
        "the two rows lie apart, by which it is widened; busy: it is more than a tenth, or "
        "other programs took as much of the CPU, and nothing is concluded."
    )
    return "\n".join([*parts, ""])


def _origin(report: Report) -> str:
    name = _plain(report.device["name"])
    return f"{name}, commit {report.commit}, {report.data['created'].replace('T', ' ')[:16]} UTC"
