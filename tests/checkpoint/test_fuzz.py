"""10,000 mutated checkpoints, and the proof that the fuzzer would notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint import fuzz
from tests.checkpoint.mutations import BASE, with_pickle

ROOT = Path(__file__).resolve().parents[2]


def test_ten_thousand_mutated_checkpoints() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.checkpoint.fuzz", "--count", "10000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=400)
    assert done.stdout, f"the process ended with {done.returncode}: {done.stderr[-2000:]}"
    report = json.loads(done.stdout)
    print(json.dumps({key: report[key] for key in ("files", "counts", "peak_growth_mb", "seconds")}))
    assert report["wrong"] == 0, json.dumps(report["failures"], indent=1)
    assert report["files"] >= 10_000
    loaded = sum(counts.get("loaded", 0) for counts in report["counts"].values())
    assert 0 < loaded < report["files"] / 2, "the mutations should hurt, and not always"


def _runs_code(*_: Any, **__: Any) -> None:
    os.system("true")
    raise fuzz.CheckpointError("refused after all")


def _takes_memory(*_: Any, **__: Any) -> None:
    assert bytearray(os.urandom(1 << 20) * 100)
    raise fuzz.CheckpointError("refused after all")


def _hangs(*_: Any, **__: Any) -> None:
    time.sleep(60)


def _crashes(*_: Any, **__: Any) -> None:
    raise KeyError("layers")


@pytest.mark.parametrize("reader", [_runs_code, _takes_memory, _hangs, _crashes])
def test_the_fuzzer_notices(reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS_PER_FILE", 1)
    case = fuzz.Case(reader, {"ema": {}})
    assert fuzz.read_one(case, tmp_path / "x", BASE, fuzz.Watch())[0] == "WRONG"


def test_the_fuzzer_notices_other_weights(tmp_path: Path) -> None:
    from gear_engine.checkpoint import read_generator

    def live(path: Path) -> Any:
        config, state, source = read_generator(path, ema=False, n_head=2)
        return config, state, type(source)(**{**vars(source), "section": "ema"})

    assert fuzz.read_one(fuzz.Case(live, fuzz.ROOT), tmp_path / "x", BASE, fuzz.Watch())[0] == "WRONG"


@pytest.mark.parametrize(
    "code",
    [
        b"}",
        b"]",
        b"N\x85",
        b"\x8c\x04\xf0\x9f\x98\x80",
        b"ctorch\nSize\n",
        b"ccollections\nOrderedDict\n)R",
        b"\x8a\xff" + b"\x7f" * 255,
    ],
)
def test_a_pickle_of_one_instruction_repeated(code: bytes, tmp_path: Path) -> None:
    """What three megabytes of pickle build stay within twice the file plus 64 MB: the budget ends it."""
    data = with_pickle(b"\x80\x02" + code * (3_000_000 // len(code)) + b".")
    outcome, detail = fuzz.read_one(fuzz.GENERATOR_CASE, tmp_path / "x", data, fuzz.Watch())
    assert outcome.startswith("refused"), detail
