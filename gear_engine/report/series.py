"""What the plots and the page show of a report, chosen and labelled once for both."""

from __future__ import annotations

from dataclasses import dataclass

from gear_engine.report.record import Report, Row

__all__ = ["Curve", "batch_curves", "breakdown_rows", "floor_rows", "shortened", "timeline_rows", "varying"]

#: Benchmarks whose rows are drawn against the number of images, in this order.
_AGAINST_BATCH = ("decode_step", "rollout", "end_to_end", "decoder", "sample_tokens", "prefill")
#: Bars beyond these make no readable figure.
_MOST_FLOORS = 60
#: Characters of a title or a bar's label, and of a name in a legend; longer ones would leave no room for the plot.
_LONGEST_LABEL, _LONGEST_NAME = 64, 36


@dataclass(frozen=True)
class Curve:
    """One line: values at batches, with the quartiles around them."""

    label: str
    batches: list[int]
    values: list[float]
    low: list[float]
    high: list[float]


def shortened(label: str, most: int = _LONGEST_LABEL) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def varying(rows: list[Row]) -> list[str]:
    """Names of parameters that differ between rows of one benchmark."""
    names = rows[0].params
    return [name for name in names if len({str(row.params.get(name)) for row in rows}) > 1]


def _fixed_text(rows: list[Row]) -> str:
    """The model or tokenizer that all rows share."""
    fields = varying(rows)
    return ", ".join(
        str(value) for name, value in rows[0].params.items() if name not in fields and name in ("model", "tokenizer")
    )


def batch_curves(report: Report, throughput: bool) -> list[tuple[str, str, list[Curve]]]:
    """(title, label of the vertical axis, curves) per benchmark that was measured at two or more batch sizes."""
    panels = []
    for name in _AGAINST_BATCH:
        rows = [row for row in report.by_benchmark().get(name, []) if _batch(row) is not None]
        if len({row.params["images"] for row in rows}) < 2:
            continue
        groups: dict[str, list[Row]] = {}
        fields = [field for field in varying(rows) if field != "images"]
        for row in rows:
            label = " ".join([row.implementation, *(_short(field, row.params[field]) for field in fields)])
            groups.setdefault(label, []).append(row)
        curves = [
            _curve(label, sorted(group, key=lambda row: int(row.params["images"])), throughput)
            for label, group in groups.items()
        ]
        fixed = _fixed_text(rows)
        title = name + (f" ({fixed})" if fixed else "")
        item = rows[0].data["item"]
        panels.append((shortened(title), f"{item}s per second" if throughput else "milliseconds", curves))
    return panels


def _batch(row: Row) -> int | None:
    """Images per call, if the row's parameters say so."""
    images = row.params.get("images")
    return images if isinstance(images, int) and images >= 1 else None


def _short(field: str, value: object) -> str:
    return str(value) if field in ("dtype", "model", "tokenizer") else f"{field}={value}"


def _curve(label: str, rows: list[Row], throughput: bool) -> Curve:
    def value(seconds: float, row: Row) -> float:
        return float(row.data["items"]) / seconds if throughput else 1e3 * seconds

    return Curve(
        shortened(label, _LONGEST_NAME),
        [int(row.params["images"]) for row in rows],
        [value(row.summary.median, row) for row in rows],
        [value(row.summary.p75 if throughput else row.summary.p25, row) for row in rows],
        [value(row.summary.p25 if throughput else row.summary.p75, row) for row in rows],
    )


def floor_rows(report: Report) -> list[tuple[str, Row]]:
    """(label, row) of the engine's own rows that have a floor, in the report's order; the first sixty."""
    found = []
    for name, rows in report.by_benchmark().items():
        fields = varying(rows)
        for row in rows:
            if row.role == "engine" and row.reached is not None:
                inner = ", ".join(_short(field, row.params[field]) for field in fields)
                found.append((shortened(f"{name}: {inner}" if inner else name), row))
    return found[:_MOST_FLOORS]


def breakdown_rows(report: Report) -> list[tuple[Row, list[tuple[str, float, float]]]]:
    """The engine's decode steps and rollouts as consecutive parts (name, start, end), the largest eight and a rest."""
    found = []
    for row in report.rows:
        parts = row.data.get("breakdown")
        if not parts or row.role != "engine":
            continue
        kernels = [(str(part["name"]), float(part["seconds"])) for part in parts if part["name"] != "gap"]
        gap = sum(float(part["seconds"]) for part in parts if part["name"] == "gap")
        if len(kernels) > 9:
            kernels = [*kernels[:8], ("other kernels", sum(seconds for _, seconds in kernels[8:]))]
        short = [(shortened(name, _LONGEST_NAME), seconds) for name, seconds in kernels]
        found.append((row, _consecutive([*short, ("gap", gap)])))
    return found


def _consecutive(parts: list[tuple[str, float]]) -> list[tuple[str, float, float]]:
    placed, at = [], 0.0
    for name, seconds in parts:
        placed.append((name, at, at + seconds))
        at += seconds
    return placed


def timeline_rows(report: Report) -> list[tuple[Row, list[tuple[str, float, float]]]]:
    """The phases of whole runs as (name, start, end)."""
    return [
        (row, [(shortened(part["name"], _LONGEST_NAME), part["start"], part["end"]) for part in row.data["timeline"]])
        for row in report.rows
        if row.data.get("timeline")
    ]
