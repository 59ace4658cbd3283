"""The generator against numbers that the official implementation returned."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from gear_engine.config import GeneratorConfig
from gear_engine.engine import Engine
from gear_engine.models.condition import TextCondition
from gear_engine.models.transformer import Transformer
from gear_engine.request import SamplingParams
from tests.golden_weights import golden_index, golden_state_dict, load_golden, relative_error

CLASS = ["c2i_hd32", "c2i_hd64", "c2i_hd72", "c2i_hd100"]
TEXT = ["t2i_causal", "t2i_prefix", "t2i_all_double"]
LLAMAGEN_TEXT = ["llamagen_t2i_hd64", "llamagen_t2i_hd100"]
#: Plain torch, and the best of this machine.
BACKENDS = ["reference", "auto"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models: threads only wait for each other, endlessly on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def golden_config(entry: dict[str, Any]) -> GeneratorConfig:
    shape = {key: entry[key] for key in ("dim", "n_layer", "n_head", "vocab_size", "block_size", "cls_token_num")}
    if entry["kind"] == "c2i":
        return GeneratorConfig(**shape, num_classes=entry["num_classes"])
    if entry["kind"] == "llamagen_t2i":
        return GeneratorConfig(**shape, conditioning="text", caption_dim=entry["caption_dim"], learned_uncond=True)
    double = entry.get("n_double_stream_layers", max(1, round(entry["n_layer"] / 3)))
    return GeneratorConfig(
        **shape,
        conditioning="text",
        caption_dim=entry["caption_dim"],
        text_attn=entry["text_attn"],
        n_double_stream_layers=double,
    )


@cache
def golden_model(goldens_dir: Path, name: str) -> Transformer:
    model = Transformer(golden_config(golden_index(goldens_dir)[name]))
    model.load_state_dict(golden_state_dict(model))
    return model.eval()


@pytest.mark.parametrize("name", CLASS)
def test_class_teacher_logits(goldens_dir: Path, name: str) -> None:
    golden = load_golden(goldens_dir, name)
    with torch.no_grad():
        logits = golden_model(goldens_dir, name)(golden["teacher_tokens"], golden["cond"])
    assert logits.shape == golden["teacher_logits"].shape
    assert relative_error(logits, golden["teacher_logits"]) <= 1e-5


@pytest.mark.parametrize("name", TEXT)
def test_text_teacher_logits(goldens_dir: Path, name: str) -> None:
    golden = load_golden(goldens_dir, name)
    condition = TextCondition(golden["cond_emb"], golden["cond_mask"])
    with torch.no_grad():
        logits = golden_model(goldens_dir, name)(golden["teacher_tokens"], condition)
    assert logits.shape == golden["teacher_logits"].shape
    assert relative_error(logits, golden["teacher_logits"]) <= 1e-5


def _runs(goldens_dir: Path, name: str) -> list[tuple[int, SamplingParams, torch.Tensor]]:
    golden = load_golden(goldens_dir, name)
    runs = []
    for index, run in enumerate(golden_index(goldens_dir)[name]["runs"]):
        settings = {key: value for key, value in run.items() if key != "seed"}
        runs.append((run["seed"], SamplingParams(**settings), golden[f"run{index}.tokens"]))
    return runs


def _check_runs(
    goldens_dir: Path, name: str, condition: torch.Tensor | TextCondition, backend: str, execution: Any = "auto"
) -> None:
    engine = Engine(golden_model(goldens_dir, name), max_images=len(condition), backend=backend, execution=execution)
    for seed, params, tokens in _runs(goldens_dir, name):
        torch.manual_seed(seed)
        drawn = engine.generate(condition, params, rng="torch")
        assert drawn.dtype == torch.int32
        assert torch.equal(drawn, tokens), params


@pytest.mark.parametrize(("backend", "execution"), [*((name, "direct") for name in BACKENDS), ("cpu", "eager")])
@pytest.mark.parametrize("name", CLASS)
def test_class_tokens(goldens_dir: Path, name: str, backend: str, execution: str) -> None:
    """``eager``: the programs that a GPU captures, for the labels' prefixes too."""
    _check_runs(goldens_dir, name, load_golden(goldens_dir, name)["cond"], backend, execution)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TEXT)
def test_text_tokens(goldens_dir: Path, name: str, backend: str) -> None:
    golden = load_golden(goldens_dir, name)
    names = ("cond_emb", "cond_mask", "uncond_emb", "uncond_mask")
    _check_runs(goldens_dir, name, TextCondition(*(golden[key] for key in names)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LLAMAGEN_TEXT)
def test_llamagen_text_tokens(goldens_dir: Path, name: str, backend: str) -> None:
    golden = load_golden(goldens_dir, name)
    _check_runs(goldens_dir, name, TextCondition(golden["cond"], golden["emb_masks"]), backend)
