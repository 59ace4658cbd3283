"""A report in all of its forms in one folder, and the results folder that collects the reports of many machines."""

from __future__ import annotations

import re
from pathlib import Path

from gear_engine.errors import ReportError
from gear_engine.report.html import report_html
from gear_engine.report.markdown import cell, report_markdown
from gear_engine.report.plots import PLOTS, write_pngs
from gear_engine.report.privacy import check_private
from gear_engine.report.record import Report, read_report, write_report
from gear_engine.report.table_csv import csv_text
from gear_engine.report.text import rate_text, throughput_text

__all__ = ["FORMATS", "add_to_results", "device_slug", "write_index", "write_report_folder"]

FORMATS = ("json", "md", "html", "csv", "png")
INDEX = "README.md"


def write_report_folder(report: Report, folder: Path, formats: frozenset[str] = frozenset(FORMATS)) -> list[Path]:
    """Writes ``report.json``, ``.md``, ``.html``, ``.csv`` and the plots that the report has rows for.

    Returns:
        The files written.

    Raises:
        ReportError: the report holds a name or a path, a format is unknown, or the report extra is not installed.
    """
    unknown = formats - set(FORMATS)
    if unknown:
        raise ReportError(f"there is no format {sorted(unknown)[0]!r}; there are {', '.join(FORMATS)}")
    check_private(report.data)
    if folder.exists() and not folder.is_dir():
        raise ReportError(f"{folder} is a file; say --out-dir FOLDER")
    texts = {}
    if "html" in formats:
        texts["report.html"] = report_html(report)
    if "csv" in formats:
        texts["report.csv"] = csv_text(report)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    images: dict[str, str] = {}
    if "png" in formats:
        for file in PLOTS:
            (folder / file).unlink(missing_ok=True)  # of an earlier report with other rows
        images = write_pngs(report, folder)
        written += [folder / file for file in images.values()]
    if "md" in formats:
        texts["report.md"] = report_markdown(report, images)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        written.append(folder / name)
    if "json" in formats:
        write_report(report.data, folder / "report.json")
        written.append(folder / "report.json")
    return sorted(written)


def device_slug(report: Report) -> str:
    """A folder name for the device, such as ``intel-xeon-processor-2-cores``.

    Raises:
        ReportError: the device's name has no letter or digit that a folder's name could be made of.
    """
    name = re.sub(r"\((?:R|TM|C)\)", "", report.device["name"], flags=re.I)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:100]
    if not slug:
        raise ReportError(f"{report.source}: no folder can be named after the device {report.device['name']!r}")
    return slug


def add_to_results(report: Report, results: Path) -> list[Path]:
    """Writes the report below ``results`` under its device's name and renews the index page."""
    written = write_report_folder(report, results / device_slug(report))
    return [*written, write_index(results)]


def _best(report: Report, benchmark: str) -> str:
    rows = [row for row in report.by_benchmark().get(benchmark, []) if row.role == "engine"]
    if not rows:
        return "-"
    best = max(rows, key=lambda row: row.throughput)
    shown = [str(best.params[name]) for name in ("model", "dtype") if name in best.params]
    return cell(f"{throughput_text(best)} ({', '.join([*shown, str(best.params.get('images', 1)) + ' at once'])})")


def write_index(results: Path) -> Path:
    """Writes ``README.md``: a line for every ``*/report.json`` below ``results``."""
    lines = []
    for path in sorted(results.glob("*/report.json")):
        report = read_report(path)
        place = path.parent.name
        bandwidth = report.data["ceilings"]["bandwidth"]
        rate = report.data["ceilings"]["rates"].get("fp32")
        lines.append(
            f"| [{cell(report.device['name'])}]({place}/report.md) | {report.data['created'][:10]} | "
            f"`{report.commit}` | "
            f"{rate_text(bandwidth, 'B/s') if bandwidth else ''} | {rate_text(rate, 'op/s') if rate else ''} | "
            f"{_best(report, 'decode_step')} | {_best(report, 'end_to_end')} | [page]({place}/report.html), "
            f"[CSV]({place}/report.csv), [JSON]({place}/report.json) |"
        )
    text = "\n".join(
        [
            "# Measured machines",
            "",
            "One folder per device, each written by `gear-engine report add`. The JSON record holds every sample; the",
            "other files are derived from it. `docs/benchmarking.md` says how to add yours and how to compare two.",
            "",
            "| device | date | commit | memory | fp32 | decode step, best throughput | labels to images | also as |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *lines,
            "",
        ]
    )
    path = results / INDEX
    path.write_text(text, encoding="utf-8")
    return path
