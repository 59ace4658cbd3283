from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gear_engine.errors import ReportError
from gear_engine.report.record import Report, write_report
from gear_engine.report.series import batch_curves
from gear_engine.report.text import bytes_text, percent, rate_text, seconds_text, summary_table
from gear_engine.report.writers import add_to_results, device_slug, write_report_folder
from tests.report.conftest import example_record

Record = dict[str, Any]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.5, "1.50 s"),
        (0.0123, "12.3 ms"),
        (9.999e-4, "1000 µs"),
        (4.2e-7, "420 ns"),
        (123.4, "123 s"),
        (3e-10, "0.300 ns"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_other_units() -> None:
    assert bytes_text(25_276_502_016) == "25.3 GB"
    assert rate_text(1.14e12, "op/s") == "1.14 Top/s"
    assert (percent(0.5), percent(0.0123), percent(1.3), percent(None)) == ("50%", "1.2%", "130%", "-")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report_folder(Report(example_record()), folder)
    return folder


def test_all_five_formats(written: Path) -> None:
    names = {path.name for path in written.iterdir()}
    assert {"report.json", "report.md", "report.html", "report.csv"} <= names
    assert {"latency.png", "throughput.png", "floor.png", "breakdown.png", "timeline.png"} <= names


def test_plots_are_images(written: Path) -> None:
    for path in written.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert image.width >= 700 and len(set(image.convert("L").resize((64, 64)).tobytes())) > 5


def test_page_is_self_contained(written: Path) -> None:
    page = (written / "report.html").read_text()
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page
    assert not re.search(r"<script|<link|<img|(?:src|href)=[\"']?(?:https?:)?//|@import|url\((?!#)", page)
    assert page.count("<svg") == 2  # latency and throughput of decode_step
    assert "4.0x reference" in page and "Outputs that differ from the reference" in page
    assert "#1b1f24" not in page.split("</style>")[1]  # plots take their colours from the theme


HOSTILE = "<img src=x onerror=alert(1)> $\\frac{$ | `x` [a](javascript:b)"


def test_hostile_text_stays_text_in_every_format(record: Record, tmp_path: Path) -> None:
    record["device"]["name"] = HOSTILE
    record["command"] = record["versions"]["torch"] = HOSTILE
    for row in record["rows"]:
        row["params"]["model"] = row["implementation"] = HOSTILE + row["implementation"]
        row["flags"] = [HOSTILE]
        for part in [*row.get("breakdown", []), *row.get("timeline", [])]:
            part["name"] = HOSTILE + part["name"]
    record["skipped"] = [{"id": HOSTILE, "reason": HOSTILE}]
    add_to_results(Report(record), tmp_path)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    page = (folder / "report.html").read_text()
    assert "<img" not in page and "&lt;img src=x" in page
    for path in (folder / "report.md", tmp_path / "README.md"):
        assert "<img" not in path.read_text() and "](javascript" not in path.read_text()
        tables = [line for line in path.read_text().splitlines() if line.startswith("|")]
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in tables[-2:]}
        assert len(counts) == 1, "a cell broke its table"
    assert all((folder / name).is_file() for name in ("latency.png", "breakdown.png", "timeline.png"))


def test_parameters_that_are_no_batch_are_not_drawn_against_batch(record: Record) -> None:
    for row in record["rows"]:
        row["params"]["images"] = f"about {row['params']['images']}"
    assert batch_curves(Report(record), throughput=False) == []


def test_every_part_of_a_stack_has_a_colour_of_its_own(record: Record) -> None:
    from gear_engine.report.html import report_html

    names = ["qkv", "attention", "attention-out", "swiglu", "ffn-out", "head", "gap", "sample_tokens", "other kernels"]
    row = next(row for row in record["rows"] if "breakdown" in row)
    row["breakdown"] = [{"name": name, "seconds": 0.001, "calls": 1} for name in names]
    page = report_html(Report(record))
    legend = dict(re.findall(r'<i class="(\w+)"></i>([\w -]+)', page.split("Where the time goes")[1].split("</h2>")[1]))
    assert sorted(legend.values()) == sorted(names)


def test_csv(written: Path, record: Record) -> None:
    lines = list(csv.DictReader(io.StringIO((written / "report.csv").read_text())))
    assert len(lines) == len(record["rows"])
    row = Report(record).rows[0]
    assert float(lines[0]["median_s"]) == row.summary.median
    assert float(lines[0]["floor_s"]) == 0.005 and lines[0]["bound_by"] == "memory"
    assert lines[4]["check"] == "differs"


def test_markdown(written: Path) -> None:
    text = (written / "report.md").read_text()
    assert "![Share of the floor per op](floor.png)" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(re.search(r"(?<!\\)\|$", line) for line in tables)
    assert "needs --official" in text and "noise above 3% at the cap" in text


def test_summary_table(record: Record) -> None:
    text = summary_table(record)
    assert "DIFFERS" in text and "skipped rollout: needs --official" in text


def test_results_folder_and_index(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gear_engine.report.writers.write_pngs", lambda report, folder: {})  # drawn in other tests
    add_to_results(Report(record), tmp_path)
    other = {**record, "device": {**record["device"], "name": "Other(R) GPU | x"}}
    add_to_results(Report(other), tmp_path)
    assert device_slug(Report(other)) == "other-gpu-x"
    index = (tmp_path / "README.md").read_text()
    assert "(a-cpu-2-cores/report.md)" in index and "(other-gpu-x/report.md)" in index
    assert len([line for line in index.splitlines() if line.startswith("| [")]) == 2


def test_refuses_formats_and_paths(record: Record, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no format 'pdf'"):
        write_report_folder(Report(record), tmp_path / "x", frozenset({"pdf"}))
    record["command"] = "bench --official /home/me/x"
    with pytest.raises(ReportError, match="command"):
        write_report_folder(Report(record), tmp_path / "x")
    with pytest.raises(ReportError, match="command"):
        write_report(record, tmp_path / "x" / "run.json")
    assert not (tmp_path / "x").exists()
