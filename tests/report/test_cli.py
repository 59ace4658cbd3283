"""``gear-engine report``: the gate's exit status and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gear_engine.cli.main import main
from tests.report.conftest import make_record, make_row

Record = dict[str, Any]


def _write(path: Path, record: Record) -> str:
    path.write_text(json.dumps(record))
    return str(path)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """A run, and one that is 10% slower in one of two rows."""
    steady = [0.01 * (1 + 0.0001 * i) for i in range(20)]
    rows = [make_row(samples=steady), make_row(benchmark="prefill", samples=steady)]
    slower = [rows[0], make_row(benchmark="prefill", samples=[1.1 * each for each in steady])]
    return _write(tmp_path / "a.json", make_record(rows)), _write(tmp_path / "b.json", make_record(slower))


def test_gate(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "merge", *pair, "--fail-over", "5%"]) == 1
    out = capsys.readouterr().out
    assert "REGRESSION: prefill[model=LlamaGen-B, images=1] cpu: +10.0%" in out and "gate at 5%: failed" in out
    assert main(["report", "merge", *pair, "--fail-over", "15%"]) == 0
    assert main(["report", "merge", *reversed(pair), "--fail-over", "5"]) == 0
    assert main(["report", "merge", pair[0], pair[0], "--fail-over", "0%"]) == 0


def test_merge_writes_markdown(pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged.md"
    assert main(["report", "merge", *pair, "--out", str(out)]) == 0
    assert "**slower**" in out.read_text()
    assert "1 slower, 1 equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{none}"], "there is no"),
        (["{version}"], "schema version 99"),
        (["{truncated}"], "not complete JSON"),
        (["{units}"], "units may not be mixed"),
        (["merge", "{good}"], "at least two"),
        (["merge", "{good}", "{units}"], "units may not be mixed"),
        (["merge", "{good}", "{good}", "--fail-over", "much"], "say a percentage"),
        (["merge", "{good}", "{device}", "--fail-over", "5%"], "runs of one device"),
        (["{good}", "--formats", "pdf"], "no format 'pdf'"),
        (["{good}", "--fail-over", "5%"], "belong to"),
        (["merge", "{good}", "{good}", "--fail-over", "nan"], "between 0% and 1000%"),
        (["merge", "{good}", "{good}", "--fail-over", ""], "say a percentage"),
        (["merge", "{good}", "{list}", "--fail-over", "5%"], "is no gear-engine report"),
        (["merge", "{good}", "{good}", "--out", "{none}/x.md"], "in a folder that exists"),
        (["{good}", "{device}", "--out-dir", "x"], "--out-dir holds one report"),
        (["{bare}"], "is a file; say --out-dir"),
        (["add", "{nameless}"], "no folder can be named after"),
        (["{list}"], "is no gear-engine report"),
        (["{good}", "--formats", ""], "no format ''"),
    ],
)
def test_refusals(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = make_record([make_row()])
    device = make_record([make_row()])
    device["device"] = {**device["device"], "name": "Another"}
    nameless = make_record([make_row()])
    nameless["device"] = {**nameless["device"], "name": "--- ---"}
    files = {
        "nameless": nameless,
        "list": [good],
        "good": good,
        "device": device,
        "version": {**good, "schema_version": 99},
        "units": {**good, "units": {**good["units"], "time": "ms"}},
    }
    paths = {name: _write(tmp_path / f"{name}.json", record) for name, record in files.items()}
    (tmp_path / "truncated.json").write_text(json.dumps(good)[:-30])
    (tmp_path / "bare").write_text(json.dumps(good))
    paths |= {"bare": str(tmp_path / "bare")}
    paths |= {"truncated": str(tmp_path / "truncated.json"), "none": str(tmp_path / "none.json")}
    assert main(["report", *(argument.format(**paths) for argument in arguments)]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
