"""One self-contained page: no script, no network, readable on a phone, light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gear_engine.errors import ReportError
from gear_engine.report.plots import curve_svgs
from gear_engine.report.record import Report, Row
from gear_engine.report.series import breakdown_rows, floor_rows, timeline_rows, varying
from gear_engine.report.text import (
    COLUMNS,
    check_text,
    device_lines,
    percent,
    rate_text,
    row_cells,
    seconds_text,
    throughput_text,
)

__all__ = ["report_html"]

_SERIES = 9
#: A row that reaches more than this share of its floor did not meet the ceilings that were measured.
ABOVE_FLOOR = 1.05


def _tiles(report: Report) -> list[dict[str, str]]:
    """The few numbers that a reader looks for first."""
    ceilings = report.data["ceilings"]
    tiles = []
    if ceilings["bandwidth"]:
        tiles.append({"value": rate_text(ceilings["bandwidth"], "B/s"), "label": "memory bandwidth, measured"})
    for name, rate in ceilings["rates"].items():
        tiles.append({"value": rate_text(rate, "op/s"), "label": f"{name} multiply-adds, measured"})
    for benchmark, label in (("decode_step", "decode step"), ("end_to_end", "labels to images")):
        rows = [row for row in report.by_benchmark().get(benchmark, []) if row.role == "engine"]
        if rows:
            best = max(rows, key=lambda row: row.throughput)
            detail = ", ".join(f"{best.params[name]}" for name in ("model", "dtype") if name in best.params)
            images = best.params.get("images")
            tiles.append({"value": throughput_text(best), "label": f"{label}, {detail}, {images} at once"})
    return tiles[:6]


def _sections(report: Report) -> list[dict[str, Any]]:
    """A table per benchmark; parameters that all its rows share stand above it."""
    sections = []
    for name, rows in report.by_benchmark().items():
        fields = varying(rows)
        shared = {field: value for field, value in rows[0].params.items() if field not in fields}
        lines: list[dict[str, Any]] = []
        for row in rows:
            cells = row_cells(row, rows)
            cells = {column: "" if text == "-" else text for column, text in cells.items()}
            cells["work"] = ", ".join(f"{field}={row.params[field]}" for field in fields)
            check = row.data["check"]
            lines.append(
                {
                    "cells": cells,
                    "role": row.role,
                    "reached": None if row.reached is None else min(100.0, 100 * row.reached),
                    "failed": check is not None and not check["passed"],
                }
            )
        columns = [column for column in COLUMNS if any(line["cells"][column] for line in lines)]
        caption = ", ".join(f"{field} = {value}" for field, value in shared.items())
        sections.append({"name": name, "caption": caption, "columns": columns, "lines": lines})
    return sections


def _floors(report: Report) -> list[dict[str, Any]]:
    found = []
    for label, row in floor_rows(report):
        floor, reached = row.floor, row.reached
        assert floor is not None and reached is not None
        found.append(
            {
                "label": label,
                "width": min(100.0, 100 * reached),
                "percent": percent(reached),
                "detail": f"{seconds_text(row.summary.median)}, floor {seconds_text(floor[0])}, {floor[1]}",
            }
        )
    return found


def _stacks(rows: Sequence[tuple[Row, list[tuple[str, float, float]]]]) -> dict[str, Any]:
    """Stacked bars of parts with one legend."""
    names = list(dict.fromkeys(name for _, parts in rows for name, _, _ in parts))
    names.sort(key=lambda name: name == "gap")  # last, and it takes no colour of a kernel's
    colour = {name: "gap" if name == "gap" else f"c{1 + index % _SERIES}" for index, name in enumerate(names)}
    bars = []
    for row, parts in rows:
        total = max(end for _, _, end in parts)
        shown = [
            {
                "name": name,
                "colour": colour[name],
                "share": 100 * (end - start) / total,
                "time": seconds_text(end - start) if end > start else "0 s",
            }
            for name, start, end in parts
        ]
        label = ", ".join(
            [row.benchmark, row.implementation, *(f"{name}={value}" for name, value in row.params.items())]
        )
        bars.append({"label": label, "total": seconds_text(total), "parts": shown})
    return {"bars": bars, "legend": [{"name": name, "colour": colour[name]} for name in names]}


def _conditions(report: Report) -> list[tuple[str, str]]:
    """The range of what was sampled while the run went on."""
    entries = report.data.get("conditions", [])
    kinds: list[tuple[str, str, Any]] = [
        ("bandwidth", "Control bandwidth", lambda value: rate_text(value, "B/s")),
        ("rate", "Control multiply rate, fp32", lambda value: rate_text(value, "op/s")),
        ("others", "CPU time of other processes", percent),
        ("steal", "CPU time taken by the hypervisor", percent),
        ("load", "Load average", lambda value: f"{value:.2f}"),
        ("mhz", "CPU clock", lambda value: f"{value:.0f} MHz"),
        ("sm_clock_mhz", "SM clock", lambda value: f"{value:.0f} MHz"),
        ("memory_clock_mhz", "Memory clock", lambda value: f"{value:.0f} MHz"),
        ("power_w", "Power", lambda value: f"{value:.0f} W"),
        ("temperature_c", "Temperature", lambda value: f"{value:.0f} °C"),
    ]
    found = []
    for key, label, text in kinds:
        values = [value for entry in entries for value in (*entry.get("ranges", {}).get(key, ()), entry.get(key))]
        values = [value for value in values if value is not None]
        if values:
            low, high = text(min(values)), text(max(values))
            found.append((label, low if low == high else f"{low} to {high}"))
    reasons = sorted({reason for entry in entries for reason in entry.get("throttle", [])})
    if reasons:
        found.append(("Throttled by", ", ".join(reasons)))
    return found


def report_html(report: Report) -> str:
    """The page.

    Raises:
        ReportError: the report extra is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise ReportError("pages need the report extra: pip install 'gear-engine[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gear_engine.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    rows = report.rows
    return environment.get_template("page.html").render(
        report=report,
        device=report.device,
        facts=device_lines(report),
        conditions=_conditions(report),
        tiles=_tiles(report),
        latency=[Markup(svg) for svg in curve_svgs(report, throughput=False)],
        throughput=[Markup(svg) for svg in curve_svgs(report, throughput=True)],
        floors=_floors(report),
        above_floor=any((row.reached or 0) > ABOVE_FLOOR for row in rows),
        breakdown=_stacks(breakdown_rows(report)),
        timeline=_stacks(timeline_rows(report)),
        sections=_sections(report),
        skipped=report.data["skipped"],
        checks={
            "passed": sum(bool(row.data["check"] and row.data["check"]["passed"]) for row in rows),
            "failed": [
                f"{row.id}: {check_text(row)}" for row in rows if row.data["check"] and not row.data["check"]["passed"]
            ],
        },
        unsettled=sum(not row.data["settled"] for row in rows),
        numeric={"median", "IQR", "p10 to p90", "p99", "wall clock", "throughput", "floor", "of floor"},
    )
