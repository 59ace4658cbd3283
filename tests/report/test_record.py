from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from gear_engine.errors import ReportError
from gear_engine.report.record import Report, read_report, row_id, validate, write_report
from tests.report.conftest import make_record, make_row

Record = dict[str, Any]


def test_round_trip(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_report(record, path)
    report = read_report(path)
    assert report.data == record
    assert report.rows[0].id == "decode_step[model=LlamaGen-B, images=1, dtype=fp32] cpu"
    assert report.commit == "0123456789"
    assert list(tmp_path.iterdir()) == [path]


def test_floor_is_the_larger_bound() -> None:
    ceilings = {"bandwidth": 2e9, "rates": {"fp32": 1e9}}
    row = Report(
        make_record([make_row(bytes=4_000_000, ops=1_000_000, samples=[0.004])]) | {"ceilings": ceilings}
    ).rows[0]
    assert row.floor == (0.002, "memory")
    assert row.reached == pytest.approx(0.5)
    row = Report(make_record([make_row(bytes=4_000_000, ops=3_000_000)]) | {"ceilings": ceilings}).rows[0]
    assert row.floor == (0.003, "compute")
    row = Report(make_record([make_row(bytes=None, ops=None)]) | {"ceilings": ceilings}).rows[0]
    assert row.floor is None and row.reached is None


def test_device_samples_go_before_the_wall_clock() -> None:
    row = Report(make_record([make_row(device_samples=[0.005, 0.005])])).rows[0]
    assert row.summary.median == 0.005


def _broken(record: Record, **changes: Any) -> Record:
    return {**copy.deepcopy(record), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema version 2, this gear-engine reads version 1"),
        ({"schema": "something"}, "is no gear-engine report"),
        (
            {"units": {"time": "ms", "memory": "B", "bandwidth": "B/s", "rate": "op/s"}},
            "time in 'ms'.*may not be mixed",
        ),
        ({"seed": "zero"}, r"report\.seed: 'zero' is not of type 'integer'"),
        ({"surprise": 1}, "'surprise' was unexpected"),
        ({"created": "yesterday"}, r"report\.created"),
    ],
)
def test_refuses(record: Record, changes: Record, message: str) -> None:
    with pytest.raises(ReportError, match=message):
        validate(_broken(record, **changes), "run.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": []}, r"report\.rows\[0\]\.samples"),
        ({"samples": [0.1, -0.1]}, r"report\.rows\[0\]\.samples\[1\]"),
        ({"samples": [1e-320]}, r"report\.rows\[0\]\.samples\[0\]"),
        ({"samples": [1e308]}, r"report\.rows\[0\]\.samples\[0\]"),
        ({"items": 0}, r"report\.rows\[0\]\.items"),
        ({"samples_ms": [1.0]}, "'samples_ms' was unexpected"),
        ({"role": "friend"}, r"report\.rows\[0\]\.role"),
    ],
)
def test_refuses_rows(changes: Record, message: str) -> None:
    with pytest.raises(ReportError, match=message):
        validate(make_record([make_row(**changes)]), "run.json")


def test_refuses_a_row_twice() -> None:
    with pytest.raises(ReportError, match="twice"):
        validate(make_record([make_row(), make_row()]), "run.json")


@pytest.mark.parametrize("keep", [0, 1, 100, -2])
def test_truncated(record: Record, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "run.json"
    text = json.dumps(record)
    path.write_text(text[:keep])
    with pytest.raises(ReportError, match=r"run\.json is not complete JSON .* truncated"):
        read_report(path)


def test_not_a_number_is_refused(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(make_record([make_row(samples=[float("nan")])])))
    with pytest.raises(ReportError, match="NaN"):
        read_report(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000, "nested too deeply"),
        ("[]", "is no gear-engine report"),
        ('"gear-engine-report"', "is no gear-engine report"),
        ('{"schema": "another"}', "is no gear-engine report"),
        ("1" * 6000, "not complete JSON"),
        ("<html></html>", "not complete JSON"),
    ],
)
def test_a_file_that_is_no_report(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ReportError, match=message):
        read_report(path)


def test_numbers_beyond_reason(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    text = json.dumps(make_record([make_row(items=123.25)]))
    path.write_text(text.replace("123.25", "1e999"))
    with pytest.raises(ReportError, match="inf"):
        read_report(path)
    path.write_text(json.dumps(record).replace('"load": 0.3', '"load": 1e999'))
    with pytest.raises(ReportError, match=r"conditions\[0\]\.load: inf is not finite"):
        read_report(path)


@pytest.mark.parametrize("text", ["\x1b[31mred", "two\nlines", "nul\0"])
def test_text_that_moves_a_terminals_cursor_is_refused(record: Record, text: str) -> None:
    record["device"]["name"] = text
    with pytest.raises(ReportError, match=r"report\.device\.name' holds characters that cannot be printed"):
        validate(record)


def test_missing_and_binary(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"there is no .*gear-engine bench --out"):
        read_report(tmp_path / "none.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ReportError, match="cannot be read"):
        read_report(tmp_path / "b.json")


def test_without_the_extra_it_says_so(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jsonschema", None)
    with pytest.raises(ReportError, match=r"gear-engine\[report\]"):
        validate(record)


def test_row_id() -> None:
    assert row_id("prefill", {}) == "prefill"
    assert row_id("prefill", {"a": 1, "b": "x"}, "cpu") == "prefill[a=1, b=x] cpu"
