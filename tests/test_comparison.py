"""The judge of the comparison with the official code: equal, tie, different."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gear_engine.bench import comparison, official_driver


def test_the_scored_draw_is_the_official_one() -> None:
    probs = torch.randn(3, 200).softmax(-1)
    torch.manual_seed(4)
    expected = [torch.multinomial(probs, num_samples=1) for _ in range(5)]
    state = torch.get_rng_state()
    other = np.stack([each.numpy()[:, 0] for each in expected], axis=1)
    other[1, 2] = (other[1, 2] + 1) % 200
    torch.manual_seed(4)
    scores = official_driver._Scores(other)
    with scores.installed():
        drawn = [torch.multinomial(probs, num_samples=1) for _ in range(5)]
    assert torch.equal(torch.stack(drawn), torch.stack(expected))
    assert torch.equal(torch.get_rng_state(), state)
    gaps = torch.stack(scores.gaps, dim=1)
    assert gaps[1, 2] > 0
    gaps[1, 2] = 0
    assert not gaps.any()
    assert torch.multinomial is not scores


@pytest.mark.parametrize(("cfg_scale", "ties"), [(4.0, 1), (1.0, 1), (40.0, 2)])
def test_first_differences_are_ties_or_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cfg_scale: float, ties: int
) -> None:
    official = np.zeros((4, 6), dtype=np.int32)
    ours = official.copy()
    ours[1, 2:] = 5  # a tie: everything after the first difference differs too
    ours[2, 3] = 5
    ours[3, 0] = 5
    gaps = np.full((4, 6), 9.0)
    gaps[1, 2], gaps[2, 3], gaps[3, 0] = 5e-5, 5e-4, 0.3
    answers = {"tokens": official, "gaps": gaps}
    monkeypatch.setattr(comparison, "run_driver", lambda *_: (answers, None))
    job: dict[str, Any] = {"task": "class", "sampling": {"cfg_scale": cfg_scale}}
    found = comparison.compare_tokens(job, tmp_path, {"tokens": official}, {"tokens": ours})
    assert (found["images"], found["equal"], found["ties"], found["different"]) == (4, 1, ties, 3 - ties)
    assert found["largest_gap"] == 0.3
    same = comparison.compare_tokens(job, tmp_path, {"tokens": official}, {"tokens": official})
    assert same == {"images": 4, "equal": 4, "ties": 0, "different": 0}


def test_a_tokenizers_errors_are_seen_one_by_one() -> None:
    rng = np.random.default_rng(0)
    indices = rng.integers(0, 30, 12)
    official = {
        "indices": indices,
        "quant": rng.standard_normal((2, 5, 2, 3)).astype(np.float32),
        "distance_rows": rng.random((4, 30), dtype=np.float32),
        "decoded": rng.random((2, 3, 4, 6), dtype=np.float32),
    }
    assert set(comparison.tokenizer_errors(official, official).values()) == {0.0}
    for name, others in (("quant", ()), ("decoded", ()), ("distance_rows", ("soft_readout",))):
        ours = {**official, name: official[name] + np.float32(0.01) * (official[name] > 0.5)}
        errors = comparison.tokenizer_errors(official, ours)
        assert all((error > 1e-3) == (key == name or key in others) for key, error in errors.items()), errors
    # Image 1, row 0, column 2 chose another code: its vector is left out, any other is not.
    other, quant = indices.copy(), official["quant"].copy()
    other[8] += 1
    quant[1, :, 0, 2] += 9
    assert comparison.tokenizer_errors(official, {**official, "indices": other, "quant": quant})["quant"] == 0
    quant[1, :, 1, 0] += 9
    assert comparison.tokenizer_errors(official, {**official, "indices": other, "quant": quant})["quant"] > 1
    none = {**official, "indices": indices + 1}
    assert comparison.tokenizer_errors(official, none)["quant"] == float("inf")


def test_children_are_measured_and_failures_are_shown(tmp_path: Path) -> None:
    ballast = np.ones(60_000_000)  # 480 MB of ours, which are not the child's
    program = "x = bytearray(200_000_000); x[::4096] = b'1' * len(x[::4096]); import time; time.sleep(0.2)"
    child = comparison.run_child([sys.executable, "-c", program], tmp_path / "log")
    assert 200e6 < child.peak_bytes < 300e6
    assert ballast.all()
    assert child.seconds > 0
    assert child.cpu_seconds > 0
    with pytest.raises(SystemExit, match="what went wrong"):
        comparison.run_child([sys.executable, "-c", "raise ValueError('what went wrong')"], tmp_path / "log")


@pytest.mark.parametrize(
    ("error", "ours", "official", "agrees"),
    [
        (9e-6, 2e-5, 1e-6, True),
        (1.9e-5, 5e-6, 1.7e-5, True),
        (1.9e-5, 1.2e-5, 1.7e-5, False),
        (1.1e-5, 8e-6, 4e-6, False),
        (float("nan"), 5e-6, float("nan"), False),
    ],
)
def test_decoded_images_agree_with_either_precision(error: float, ours: float, official: float, agrees: bool) -> None:
    assert comparison.decoder_agrees(error, {"ours": ours, "official": official}) == agrees
