"""The study runs, resumes and reports; its numbers are not judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gear_engine.bench import study_runs
from gear_engine.bench.study import run_study
from gear_engine.bench.study_report import plot, steps_to_reach, table
from gear_engine.bench.study_runs import RECIPES, Settings
from gear_engine.training.evaluation import Evaluation

_TINY = Settings(
    image_size=32, images=16, warmup_steps=1, steps=2, evaluations=2, batch_size=4, samples=8, restored=8,
    encoder_steps=1,
    tokenizer={
        "family": "lfq", "ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "downsample": 8, "z_channels": 4,
        "codebook_embed_dim": 4, "codebook_size": 16, "codebook_l2_norm": False,
    },
    generator={"dim": 32, "n_layer": 2, "n_head": 2},
)  # fmt: skip


def test_the_study_runs_resumes_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = Evaluation(32, held_out=16, judge_images=64, judge_epochs=1)
    result = run_study(_TINY, tmp_path, evaluation, seeds=[1], recipes=list(RECIPES), cfg_scale=1.5)
    assert [run["recipe"] for run in result["runs"]] == list(RECIPES)
    for run in result["runs"]:
        assert [point["step"] for point in run["curve"]] == [1, 2]
        assert all(point["samples"]["count"] == 8 and point["cpu_seconds"] > 0 for point in run["curve"])
    frozen = next(run for run in result["runs"] if run["recipe"] == "llamagen-repa")
    for point in frozen["curve"]:
        assert point["reconstruction"] == result["facts"]["warm_up"]  # its tokenizer is the warm-up's

    text = table(result)
    assert all(title in text for title in RECIPES.values())
    plot(result, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 1000

    # What is there is read; a run whose record is lost goes on from its checkpoint, and adds nothing.
    lost = tmp_path / "gear-1.json"
    before = json.loads(lost.read_text())
    lost.unlink()
    monkeypatch.setattr(study_runs, "_measure", lambda *_: pytest.fail("nothing is left to measure"))
    again = run_study(_TINY, tmp_path, evaluation, seeds=[1], recipes=list(RECIPES), cfg_scale=1.5)
    assert json.loads(lost.read_text()) == before
    assert again["runs"] == result["runs"]


def test_steps_to_reach() -> None:
    curve = [(10, 5.0), (20, 3.0), (30, 4.0)]
    assert [steps_to_reach(curve, target) for target in (5.0, 4.0, 3.5, 2.0)] == [10, 20, 20, None]
