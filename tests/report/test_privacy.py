from __future__ import annotations

import getpass
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from gear_engine.errors import ReportError
from gear_engine.report import facts
from gear_engine.report.privacy import check_private, scrub
from gear_engine.report.record import write_report
from tests.report.conftest import make_record, make_row


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("see /home/somebody/GEAR for it", "see PATH for it"),
        ("--official ~/src/GEAR", "--official PATH"),
        ("cannot open '/tmp/x/y.so': no", "cannot open 'PATH': no"),
        (r"C:\Users\somebody\x", "PATH"),
        ("12 GB/s of 1/2", "12 GB/s of 1/2"),
        ("fp32/bf16 and max|a-b|/max|b|", "fp32/bf16 and max|a-b|/max|b|"),
    ],
)
def test_paths(text: str, scrubbed: str) -> None:
    assert scrub(text) == scrubbed


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-box-7.example.org")
    assert scrub("ada ran on gpu-box-7 (gpu-box-7.example.org)") == "USER ran on HOST (HOST)"
    assert scrub("Canada and adapters") == "Canada and adapters"


@pytest.mark.parametrize("where", ["command", "versions", "rows"])
def test_records_with_paths_are_not_written(where: str, tmp_path: Path) -> None:
    record: dict[str, Any] = make_record([make_row()])
    if where == "command":
        record["command"] = "gear-engine bench --official /data/peers/GEAR"
    elif where == "versions":
        record["versions"]["torch"] = "2 from /opt/conda/lib"
    else:
        record["rows"][0]["flags"] = ["see ~/notes/today"]
    with pytest.raises(ReportError, match=where):
        write_report(record, tmp_path / "run.json")
    assert not list(tmp_path.iterdir())


def test_facts_of_this_machine_hold_no_names() -> None:
    found = {
        "device": facts.device_facts(torch.device("cpu"), 2),
        "versions": facts.versions(),
        "commit": facts.commit(),
    }
    check_private(found)
    text = json.dumps(found)
    for name in (str(Path.home()), str(Path.cwd())):
        assert len(name) < 4 or name not in text
