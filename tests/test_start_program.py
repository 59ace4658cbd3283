"""Images of classes start by a program: the bits of the prefix computed op by op, in every bucket."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gear_engine import steps
from gear_engine.engine import Engine
from gear_engine.models.transformer import Transformer
from gear_engine.request import ImageRequest, SamplingParams
from gear_engine.step_program import StartProgram
from tests.models_for_tests import CLASS, SETTINGS, fresh_model, small_model

GQA = CLASS.replace(n_kv_head=2)


def _start(engine: Engine, labels: list[int], params: list[SamplingParams]) -> dict[str, torch.Tensor]:
    """What is there after one step: logits of the live rows, and all that decoding goes on from."""
    seen: list[torch.Tensor] = []
    run = engine.ops.sample_tokens

    def spy(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(logits.clone())
        out: torch.Tensor = run(logits, *args, **kwargs)
        return out

    object.__setattr__(engine.ops, "sample_tokens", spy)
    for index, (label, each) in enumerate(zip(labels, params, strict=True)):
        engine.add_request(ImageRequest(label=label, seed=index, params=each))
    engine.step()
    object.__setattr__(engine.ops, "sample_tokens", run)
    slots = [image.cond_slot for image in engine.scheduler.running]
    rows = len(labels) + sum(each.uses_guidance for each in params)
    (logits,) = seen
    scales = torch.zeros(0) if engine.cache.scales is None else engine.cache.scales
    found = {"logits": logits[:rows], "cache": engine.cache.kv.float(), "scales": scales}
    return found | {"bias": engine.cache.prefix_bias, "tokens": engine._tokens[slots, 0]}


@pytest.mark.parametrize("images", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    ("model", "options"),
    [
        (small_model(), {}),
        (small_model(GQA), {}),
        (small_model(), {"dtype": torch.bfloat16}),
        (small_model(), {"weight_format": "int8"}),
    ],
    ids=["fp32", "gqa", "bf16", "int8"],
)
def test_the_same_bits_as_op_by_op(model: Transformer, options: dict[str, Any], images: int) -> None:
    """1 to 16 rows; images with guidance and without, and the unconditional class as a label."""
    labels, params = [(4 * i + 1) % 10 for i in range(images)], [SETTINGS[i % len(SETTINGS)] for i in range(images)]
    direct, eager = (
        _start(Engine(model, max_images=8, execution=execution, **options), labels, params)  # type: ignore[arg-type]
        for execution in ("direct", "eager")
    )
    for name, expected in direct.items():
        assert torch.equal(eager[name], expected), name


def test_an_fp8_cache_is_no_exception() -> None:
    """The prefix is attended to before it is rounded, in both; plain torch may round other batches otherwise."""
    options: dict[str, Any] = {"cache_dtype": "fp8", "backend": {"skinny_linear": "cpu"}, "max_images": 3}
    arguments = ([1, 5, 9], SETTINGS[1:4])
    direct = _start(Engine(small_model(), execution="direct", **options), *arguments)
    eager = _start(Engine(small_model(), execution="eager", **options), *arguments)
    assert all(torch.equal(eager[name], expected) for name, expected in direct.items())
    assert direct["scales"].any()


def test_no_tensor_is_made_for_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels, settings and seeds travel in the row table: nothing that the host would have to wait for."""
    engine = Engine(small_model(), max_images=3, execution="eager")
    expected = engine.generate([1, 2, 3], SETTINGS[2])

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("index tensors are made for a start")

    monkeypatch.setattr(steps.RowTensors, "build", refused)
    assert torch.equal(engine.generate([1, 2, 3], SETTINGS[2]), expected)


def test_weights_and_label_rows_are_read_in_place() -> None:
    model = fresh_model()
    engine = Engine(model, max_images=2, execution="eager")
    first = engine.generate([1, 2], SETTINGS[1])
    table = model.cls_embedding.embedding_table.weight
    table.data.copy_(table.data.flip(0))
    expected = Engine(model, max_images=2, execution="direct").generate([1, 2], SETTINGS[1])
    assert not torch.equal(expected, first)
    assert torch.equal(engine.generate([1, 2], SETTINGS[1]), expected)


@pytest.mark.parametrize("hit", [1, 4, 9])
def test_an_interrupted_start_can_be_repeated(hit: int) -> None:
    expected = Engine(small_model(), max_images=2, backend="reference").generate([1, 2], SETTINGS[1])
    engine = Engine(small_model(), max_images=2, backend="reference", execution="eager")
    run, calls = engine.ops.skinny_linear, 0

    def interrupted(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == hit:
            raise KeyboardInterrupt
        out: torch.Tensor = run(*args, **kwargs)
        return out

    object.__setattr__(engine.ops, "skinny_linear", interrupted)
    for index, label in enumerate((1, 2)):
        engine.add_request(ImageRequest(label=label, seed=index, params=SETTINGS[1]))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    done = []
    while engine.num_unfinished:
        done += engine.step()
    assert torch.equal(torch.stack([each.tokens for each in done]), expected)
    kinds = {kind for kind, *_ in engine._steps._programs}  # type: ignore[attr-defined]
    assert StartProgram in kinds
