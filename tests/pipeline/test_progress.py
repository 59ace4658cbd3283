"""What a pipeline's progress bar and callback cost: the engine stops at every step only for who looks at the tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gear_engine import steps
from gear_engine.pipeline import Pipeline
from gear_engine.pipeline_inputs import engine_callback
from gear_engine.step_program import Execution


def _made(pipe: Pipeline) -> list[int]:
    """How many steps each call of the engine's decoding makes from now on."""
    assert pipe._engine is not None
    made: list[int] = []
    decode = pipe._engine._steps.decode

    def spy(*arguments: Any) -> int:
        made.append(decode(*arguments))
        return made[-1]

    pipe._engine._steps.decode = spy  # type: ignore[method-assign]
    return made


@pytest.mark.parametrize("execution", ["direct", "eager"])
def test_a_call_without_a_callback_makes_whole_rollouts(
    pipe: Pipeline, execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bar on: it is fed where the engine looks up."""
    monkeypatch.setattr(steps, "CALL_SECONDS", 1e9)
    pipe.set_progress_bar_config(disable=False)
    pipe._options["execution"] = execution
    arguments: dict[str, Any] = {"seeds": [5, 6], "guidance_scale": 2.0, "cfg_interval": 4, "output_type": "latent"}
    tokens = pipe([1, 2], **arguments).tokens
    made, total = _made(pipe), tokens.shape[1]
    assert torch.equal(pipe([1, 2], **arguments).tokens, tokens)
    assert made == [5, total - 6], "the first token comes from the labels, five more are guided"
    made.clear()
    seen: list[int] = []

    def look(pipe: Pipeline, step: int, position: int, given: dict[str, torch.Tensor]) -> None:
        seen.append(step)
        assert int((given["tokens"] >= 0).sum()) == 2 * (step + 1)

    assert torch.equal(pipe([1, 2], callback_on_step_end=look, **arguments).tokens, tokens)
    assert made == [1] * (total - 1)
    assert seen == list(range(total))


def test_the_bar_ends_full(pipe: Pipeline, capsys: Any) -> None:
    """Also when images wait for slots: three waves of two."""
    pipe.set_progress_bar_config(disable=False)
    total = pipe([1, 2, 3, 4, 5], seeds=[1, 2, 3, 4, 5], output_type="latent").tokens.shape[1]
    assert f"{3 * total}/{3 * total}" in capsys.readouterr().err


def test_an_interrupt_leaves_the_pipeline_usable(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is seen where the engine looks up, also without a callback."""
    expected = pipe([1, 2], seeds=[3, 4], output_type="latent").tokens
    assert pipe._engine is not None
    advance, calls = pipe._engine._advance, 0

    def interrupted(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        advance(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pipe._engine, "_advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipe([1, 2], seeds=[3, 4], output_type="latent")
    assert torch.equal(pipe([1, 2], seeds=[3, 4], output_type="latent").tokens, expected)


def test_no_callback_is_none_to_the_engine() -> None:
    assert engine_callback(object(), None, 0) is None
