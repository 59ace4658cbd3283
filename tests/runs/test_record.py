"""run.json: one folder, one set of settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gear_engine.errors import ResumeMismatchError
from gear_engine.runs.record import add_measured, check_or_write, first_difference, read_record

SETTINGS: dict[str, Any] = {
    "checkpoint": {"sha256": "ab"},
    "seed": 0,
    "rng": "philox",
    "world_size": 1,
    "per_proc_batch_size": 4,
    "cfg_scale": 4.0,
}


def changed(**fields: Any) -> dict[str, Any]:
    return {**SETTINGS, **fields}


def test_the_record_is_written_once_and_compared(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert check_or_write(path, SETTINGS, {"torch": "1"}) == []
    first = path.read_bytes()
    assert check_or_write(path, SETTINGS, {"torch": "1"}) == []
    assert check_or_write(path, changed(world_size=2, per_proc_batch_size=9), {"torch": "1"}) == []
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"seed": 1}, "seed = 0, this run asks for 1"),
        ({"cfg_scale": 1.5}, "cfg_scale = 4.0"),
        ({"checkpoint": {"sha256": "cd"}}, 'checkpoint.sha256 = "ab", this run asks for "cd"'),
        ({"rng": "torch"}, "rng"),
        ({"new_setting": 1}, "new_setting"),
    ],
)
def test_a_difference_is_named(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    path = tmp_path / "run.json"
    check_or_write(path, SETTINGS, {})
    with pytest.raises(ResumeMismatchError, match=named):
        check_or_write(path, changed(**fields), {})


@pytest.mark.parametrize("name", ["world_size", "per_proc_batch_size"])
def test_torch_runs_are_bound_to_their_batches(name: str) -> None:
    recorded, asked = changed(rng="torch"), changed(rng="torch", **{name: 7})
    assert first_difference(recorded, asked) == (name, SETTINGS[name], 7)
    assert first_difference(SETTINGS, changed(**{name: 7})) is None


def test_an_older_record_without_a_setting_differs() -> None:
    recorded = {name: value for name, value in SETTINGS.items() if name != "seed"}
    assert first_difference(recorded, SETTINGS) == ("seed", "nothing", 0)


def test_other_versions_are_reported_not_refused(tmp_path: Path) -> None:
    check_or_write(tmp_path / "run.json", SETTINGS, {"torch": "2.10", "gear_engine": "0.1"})
    notes = check_or_write(tmp_path / "run.json", SETTINGS, {"torch": "2.11", "gear_engine": "0.1"})
    assert notes == ['torch: "2.10" then, "2.11" now']


@pytest.mark.parametrize("content", ["", "[]", '{"settings": 3}', "{"])
def test_an_unreadable_record_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ResumeMismatchError, match="cannot be read"):
        check_or_write(tmp_path / "run.json", SETTINGS, {})


def test_comparing_writes_nothing(tmp_path: Path) -> None:
    check_or_write(tmp_path / "run.json", SETTINGS, {}, write=False)
    assert not list(tmp_path.iterdir())


def test_the_record_is_json(tmp_path: Path) -> None:
    check_or_write(tmp_path / "run.json", SETTINGS, {"torch": "1"})
    assert json.loads((tmp_path / "run.json").read_text()) == {"settings": SETTINGS, "environment": {"torch": "1"}}


def test_what_is_measured_is_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    check_or_write(path, SETTINGS, {"torch": "1"})
    for seconds in (1.5, 2.5):
        add_measured(path, "capture", {"generator": {"seconds": seconds, "bytes": 100}})
        assert check_or_write(path, SETTINGS, {"torch": "1"}) == []
    record = json.loads(path.read_text())
    assert record["measured"] == {"capture": {"generator": {"seconds": 2.5, "bytes": 100}}}
    assert read_record(path) == (SETTINGS, {"torch": "1"})
