"""The registry, the sampling loop and a whole small run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gear_engine.bench.harness import Run, run_cases
from gear_engine.bench.registry import (
    Benchmark,
    Check,
    Context,
    Implementation,
    Skip,
    Work,
    benchmarks,
    register,
    select,
)
from gear_engine.bench.sampling import Limits, take_samples
from gear_engine.cli.main import main
from gear_engine.cuda_graph import CaptureCost
from gear_engine.errors import InvalidRequestError
from gear_engine.report.record import Report, read_report, validate
from gear_engine.report.text import row_cells

CPU = torch.device("cpu")


class _Clock:
    """Stands in for the clock: calls take as long as they say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def work(self, name: str, seconds: Callable[[int], float]) -> Implementation:
        counter = itertools.count()

        def call(index: int) -> None:
            self.calls.append(name)
            self.now += seconds(next(counter))

        return Implementation(name, "engine", call)


def test_peers_alternate_and_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    work = [clock.work("a", lambda _: 0.010), clock.work("b", lambda _: 0.020)]
    first, second = take_samples(work, copies=1, limits=Limits(min_samples=6, max_seconds=0.2), device=CPU)
    assert first.samples == pytest.approx([0.010] * 6) and second.samples == pytest.approx([0.020] * 6)
    assert first.settled and second.settled
    assert "".join(clock.calls[-12:]) == "bbaaaabbbbaa"  # an untimed and a timed call; rounds begin in turn


def test_noise_ends_at_the_cap_unsettled(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    work = [clock.work("a", lambda n: 0.01 * (1 + n % 7))]
    (series,) = take_samples(work, copies=1, limits=Limits(max_seconds=1.0, noise_bound=0.001), device=CPU)
    assert not series.settled and 1.0 <= series.spent < 1.1


def test_warm_up_waits_for_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    work = [clock.work("a", lambda n: 0.002 * max(1, 20 - n))]
    (series,) = take_samples(work, copies=1, limits=Limits(max_seconds=10), device=CPU)
    assert series.warmup_calls >= 20 and series.samples[:10] == pytest.approx([0.002] * 10)


def test_long_calls_are_not_warmed_up_thrice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    (series,) = take_samples([clock.work("a", lambda _: 5.0)], copies=1, limits=Limits(max_seconds=1), device=CPU)
    assert series.warmup_calls == 1 and len(series.samples) == 3


def test_short_calls_share_a_sample_and_rotate_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    seen: list[int] = []

    def call(index: int) -> None:
        seen.append(index)
        clock.now += 1e-5

    (series,) = take_samples([Implementation("a", "engine", call)], copies=3, limits=Limits(), device=CPU)
    assert series.calls_per_sample in (100, 101)
    assert series.samples[0] == pytest.approx(1e-5)
    assert seen == [index % 3 for index in range(len(seen))]


def test_selection() -> None:
    known = benchmarks()
    for name in ("skinny_linear", "decode_attention", "sample_tokens", "codebook_quantize", "prefill", "decode_step"):
        assert name in known
    assert {"rollout", "decoder", "end_to_end"} <= set(known)
    quick, standard = select([], "quick", {}, None), select([], "standard", {}, None)
    assert len({case.id for case in quick}) == len(quick) < len(standard)
    grid = {"images": ["3"], "dtype": ["bf16"], "guided": ["no"]}
    (case,) = select(["decode_step"], "quick", grid, None)
    assert case.params == {
        "model": "LlamaGen-B",
        "images": 3,
        "pixels": 256,
        "guided": False,
        "dtype": "bf16",
        "position": 127,
    }
    assert all("images=8" in case.id for case in select([], "standard", {}, "images=8"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode_stp"], "no benchmark 'decode_stp'; did you mean 'decode_step'?"),
        (["--preset", "fast"], "no preset 'fast'"),
        (["decode_step", "--grid", "image=3"], "no field 'image'; did you mean 'images'?"),
        (["decode_step", "--grid", "images=many"], "'many' is not a number"),
        (["decode_step", "--grid", "guided=maybe"], "not true or false"),
        (["decode_step", "--grid", "images"], "say FIELD=VALUE"),
        (["--filter", "nothing like it"], "no case is left"),
        (["--peers", "tensorrt"], "no peer 'tensorrt'"),
        (["--peers", "official"], "needs --official"),
        (["--noise-bound", "0"], "must be positive"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--device", "cuda:99"], "not there"),
        (["skinny_linear", "--grid", "dtype=fp8"], "dtype 'fp8' is not one of"),
        (["skinny_linear", "--grid", "model=Llama"], "no model 'Llama'"),
        (["decode_attention", "--grid", "position=256"], "position 256 must lie in"),
        (["decode_step", "--grid", "images=0"], "images: 0 must lie between 1 and"),
        (["decode_step", "--grid", "images=1", "images=2"], "'images' stands there twice"),
        (["sample_tokens", "--grid", "top_p=nan"], "top_p: nan must lie between"),
        (["group_norm_silu", "--grid", "channels=7"], "channels 7 must be a multiple of 32"),
        (["sign_bits", "--grid", "groups=3"], "width 14 must be a multiple of 3"),
        (["--backend", "tensorrt"], "no backend 'tensorrt'"),
        (["--noise-bound", "nan"], "must be positive"),
        (["--max-seconds", "inf"], "must be positive"),
        (["--seed", "-1"], "--seed must lie in"),
    ],
)
def test_bad_input(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "gear_engine.bench.harness._ceilings", lambda device: {"bandwidth": 1e9, "rates": {"fp32": 1e9}}
    )
    out = tmp_path / "run.json"
    assert main(["bench", *arguments, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def _work(params: dict[str, Any], context: Context) -> Work:
    if params["n"] == 3:
        raise Skip("three is not measured, see /home/somebody/notes")
    x = torch.arange(params["n"], dtype=torch.float32) + 1
    wrong = x + (1 if params["n"] == 2 else 0)
    check = Check(lambda index: x, lambda a, b: float((a - b).abs().max()), 0.5, "max|a-b|")
    work = [
        Implementation("ours", "engine", lambda index: wrong),
        Implementation("reference", "reference", lambda index: x),
    ]
    capture = {"ours": lambda: CaptureCost(1.5, 33_000_000), "reference": CaptureCost}
    skipped = {"faiss": "not installed"}
    return Work(work, None, None, params["n"], "number", check=check, skipped=skipped, capture=capture)


def test_a_run_checks_flags_and_lists_what_it_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings = {"bandwidth": 1e9, "rates": {"fp32": 1e9}}
    monkeypatch.setattr("gear_engine.bench.harness._ceilings", lambda device: dict(ceilings))
    case_of = Benchmark("_numbers", "for this test", _work, {"quick": [{"n": (1, 2, 3)}]}).cases("quick", {})
    limits = Limits(max_seconds=0.01, max_samples=12)
    run = Run("gear-engine bench", "quick", limits, check=True, breakdown=True)
    seen: list[int] = []
    record = run_cases(case_of, Context(CPU), run, lambda done, name: seen.append(done))
    validate(record)
    rows = {row.id: row for row in Report(record).rows}
    assert rows["_numbers[n=1] ours"].data["check"]["passed"]
    assert not rows["_numbers[n=2] ours"].data["check"]["passed"]
    assert "output differs from the reference" in rows["_numbers[n=2] ours"].data["flags"]
    assert rows["_numbers[n=1] reference"].data["check"] is None
    assert row_cells(rows["_numbers[n=1] ours"])["capture"] == "1.50 s, 33.0 MB"
    assert row_cells(rows["_numbers[n=1] reference"])["capture"] == ""
    assert [entry["id"] for entry in record["skipped"]] == [
        "_numbers[n=1] faiss",
        "_numbers[n=2] faiss",
        "_numbers[n=3]",
    ]
    assert record["skipped"][-1]["reason"] == "three is not measured, see PATH"
    assert seen[0] == 0 and seen[-1] == 3


def test_a_result_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    assert main(["bench", "--out", str(tmp_path / "none" / "run.json")]) == 2
    assert main(["bench", "--out", str(tmp_path)]) == 2


def test_registering_twice_or_with_mixed_fields_is_an_error() -> None:
    with pytest.raises(ValueError, match="two benchmarks"):
        register(benchmarks()["decode_step"])
    with pytest.raises(ValueError, match="same fields"):
        register(Benchmark("_mixed", "", _work, {"quick": [{"n": (1,)}, {"m": (1,)}]}))
    with pytest.raises(InvalidRequestError):
        select(["_mixed"], "quick", {}, None)


def test_bench_and_report_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.json"
    grid = ["--grid", "model=LlamaGen-S", "layer=attention-out", "rows=2", "dtype=fp32", "--max-seconds", "0.02"]
    assert main(["bench", "skinny_linear", *grid, "--seed", "5", "--out", str(out)]) == 0
    report = read_report(out)
    assert {row.benchmark for row in report.rows} == {"skinny_linear"}
    assert report.data["command"].endswith("--max-seconds 0.02 --seed 5")
    assert report.rows[0].reached is not None and report.rows[0].data["bytes"] > 4 * 384 * 384
    checks = [row.data["check"] for row in report.rows if row.role == "engine"]
    assert all(check["passed"] for check in checks)
    assert str(tmp_path) not in out.read_text()
    assert main(["report", str(out), "--formats", "md,csv", "--out-dir", str(tmp_path / "x")]) == 0
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"report.md", "report.csv"}
    assert main(["report", "merge", str(out), str(out), "--fail-over", "5%"]) == 0
    assert "gate at 5%: passed" in capsys.readouterr().out
