"""The drop-in functions draw what the official sampler draws from modules that are not ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gear_engine import compat
from gear_engine.errors import InvalidRequestError
from gear_engine.models.transformer import Transformer
from tests.compat.foreign import (
    CLASS_CONFIG,
    GEAR_TEXT_CONFIG,
    LLAMAGEN_TEXT_CONFIG,
    TOKENS,
    golden_model,
    labels_null,
    plain,
    text_inputs,
)
from tests.golden_weights import golden_index, load_golden
from tests.plain_generator import PlainTransformer, plain_generate


@pytest.mark.parametrize("name", ["c2i_hd32", "c2i_hd72", "c2i_hd100"])
def test_class_goldens_through_a_foreign_module(goldens_dir: Path, name: str) -> None:
    entry, golden = golden_index(goldens_dir)[name], load_golden(goldens_dir, name)
    model = golden_model(entry)
    for index, run in enumerate(entry["runs"]):
        sampling = {key: value for key, value in run.items() if key != "seed"}
        torch.manual_seed(run["seed"])
        tokens = compat.generate(model, golden["cond"], entry["block_size"], **sampling)
        assert tokens.dtype == torch.int32
        assert torch.equal(tokens, golden[f"run{index}.tokens"].int())


@pytest.mark.parametrize("name", ["t2i_causal", "t2i_prefix", "t2i_all_double"])
def test_text_goldens_through_a_foreign_module(goldens_dir: Path, name: str) -> None:
    entry, golden = golden_index(goldens_dir)[name], load_golden(goldens_dir, name)
    model = golden_model(entry)
    for index, run in enumerate(entry["runs"]):
        sampling = {key: value for key, value in run.items() if key != "seed"}
        torch.manual_seed(run["seed"])
        tokens = compat.generate_t2i(
            model,
            golden["cond_emb"],
            golden["uncond_emb"],
            entry["block_size"],
            cond_mask=golden["cond_mask"],
            uncond_mask=golden["uncond_mask"],
            **sampling,
        )
        assert torch.equal(tokens, golden[f"run{index}.tokens"].int())


@pytest.mark.parametrize("name", ["llamagen_t2i_hd64", "llamagen_t2i_hd100"])
def test_llamagen_text_goldens_through_a_foreign_module(goldens_dir: Path, name: str) -> None:
    entry, golden = golden_index(goldens_dir)[name], load_golden(goldens_dir, name)
    model = golden_model(entry)
    for index, run in enumerate(entry["runs"]):
        sampling = {key: value for key, value in run.items() if key != "seed"}
        torch.manual_seed(run["seed"])
        tokens = compat.generate(model, golden["cond"], entry["block_size"], golden["emb_masks"], **sampling)
        assert torch.equal(tokens, golden[f"run{index}.tokens"].int())


SETTINGS: list[dict[str, Any]] = [
    {},
    {"cfg_scale": 3.0, "top_k": 20},
    {"cfg_scale": 2.0, "cfg_interval": 4, "temperature": 0.8, "top_p": 0.9},
    {"sample_logits": False, "cfg_scale": 1.5},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_and_generator_state_are_those_of_the_plain_sampler(settings: dict[str, Any], batch: int) -> None:
    model = plain()
    labels = torch.arange(batch) % 7
    torch.manual_seed(11)
    expected = plain_generate(model, labels, TOKENS, uncond=labels_null(model, labels), **settings)
    state = torch.get_rng_state()
    torch.manual_seed(11)
    tokens = compat.generate(model, labels, TOKENS, **settings)
    assert torch.equal(tokens, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_fewer_tokens_than_the_image_holds_and_one_token() -> None:
    model, labels = plain(), torch.tensor([1, 2])
    torch.manual_seed(3)
    expected = plain_generate(model, labels, TOKENS, uncond=labels_null(model, labels), cfg_scale=2.0)
    for count in (1, 5):
        torch.manual_seed(3)
        assert torch.equal(compat.generate(model, labels, count, cfg_scale=2.0), expected[:, :count])


def test_own_generator_leaves_the_global_one_alone() -> None:
    model, labels = plain(), torch.tensor([4])
    torch.manual_seed(5)
    expected = compat.generate(model, labels, TOKENS)
    before = torch.get_rng_state()
    own = torch.Generator().manual_seed(5)
    assert torch.equal(compat.generate(model, labels, TOKENS, generator=own), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_grouped_heads() -> None:
    model = plain(CLASS_CONFIG.replace(dim=128, n_head=4, n_kv_head=2))
    labels = torch.tensor([0, 6])
    torch.manual_seed(1)
    expected = plain_generate(model, labels, TOKENS, uncond=labels_null(model, labels), cfg_scale=2.0)
    torch.manual_seed(1)
    assert torch.equal(compat.generate(model, labels, TOKENS, cfg_scale=2.0), expected)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("masks", ["both", "none", "caption only"])
def test_gear_text(shared: bool, masks: str) -> None:
    model = plain(GEAR_TEXT_CONFIG)
    states, mask = text_inputs()
    uncond = torch.randn(1, 6, 20).expand(3, -1, -1) if shared else torch.randn(3, 6, 20)
    uncond_mask = torch.zeros(3, 6, dtype=torch.long)
    if not shared:
        uncond_mask[1, :2] = 1
    given = {"both": (mask, uncond_mask), "none": (None, None), "caption only": (mask, None)}[masks]
    # With guidance the official sampler drops a caption mask that comes without the other.
    both = (mask, uncond_mask) if masks == "both" else (None, None)
    torch.manual_seed(2)
    expected = plain_generate(
        model, states, TOKENS, uncond=uncond, mask=both[0], uncond_mask=both[1], cfg_scale=3.0, top_k=30
    )
    torch.manual_seed(2)
    tokens = compat.generate_t2i(model, states, uncond, TOKENS, given[0], given[1], cfg_scale=3.0, top_k=30)
    assert torch.equal(tokens, expected)


def test_gear_text_without_guidance_needs_no_empty_caption() -> None:
    model = plain(GEAR_TEXT_CONFIG)
    states, mask = text_inputs()
    torch.manual_seed(2)
    expected = plain_generate(model, states, TOKENS, mask=mask)
    torch.manual_seed(2)
    assert torch.equal(compat.generate_t2i(model, states, None, TOKENS, mask, cfg_scale=1.0), expected)
    with pytest.raises(InvalidRequestError, match="uncond_emb"):
        compat.generate_t2i(model, states, None, TOKENS, mask)


@pytest.mark.parametrize("masked", [True, False])
def test_llamagen_text(masked: bool) -> None:
    model = plain(LLAMAGEN_TEXT_CONFIG)
    states, mask = text_inputs()
    if masked:
        states = states * mask[:, :, None]
    uncond = model.cls_embedding.uncond_embedding.expand(3, -1, -1)
    given = mask if masked else None
    torch.manual_seed(4)
    expected = plain_generate(model, states, TOKENS, uncond=uncond, mask=given, uncond_mask=given, cfg_scale=5.0)
    torch.manual_seed(4)
    assert torch.equal(compat.generate(model, states, TOKENS, given, cfg_scale=5.0), expected)


def test_our_own_transformer() -> None:
    model, labels = plain(), torch.tensor([3, 5])
    ours = Transformer(CLASS_CONFIG).eval()
    ours.load_state_dict(model.state_dict())
    torch.manual_seed(6)
    expected = compat.generate(model, labels, TOKENS, cfg_scale=2.0)
    torch.manual_seed(6)
    assert torch.equal(compat.generate(ours, labels, TOKENS, cfg_scale=2.0), expected)


def test_autocast_outside_changes_nothing() -> None:
    model, labels = plain(), torch.tensor([2, 6])
    torch.manual_seed(7)
    expected = compat.generate(model, labels, TOKENS, cfg_scale=3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(7)
        assert torch.equal(compat.generate(model, labels, TOKENS, cfg_scale=3.0), expected)


def test_dtype_samples_as_a_module_of_that_dtype_would() -> None:
    model, cast, labels = plain(), plain().bfloat16(), torch.tensor([0, 1])
    torch.manual_seed(9)
    tokens = compat.generate(model, labels, TOKENS, cfg_scale=2.0, dtype=torch.bfloat16)
    torch.manual_seed(9)
    assert torch.equal(compat.generate(cast, labels, TOKENS, cfg_scale=2.0), tokens)
    assert model.output.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: compat.generate(m, torch.tensor([8]), TOKENS), "label 8"),
        (lambda m: compat.generate(m, torch.tensor([-1]), TOKENS), "label -1"),
        (lambda m: compat.generate(m, torch.tensor([0.5]), TOKENS), "labels must be integers"),
        (lambda m: compat.generate(m, torch.tensor(1), TOKENS), "one-dimensional"),
        (lambda m: compat.generate(m, torch.tensor([1]), 17), "17"),
        (lambda m: compat.generate(m, torch.tensor([1]), 0), "0"),
        (lambda m: compat.generate(m, torch.tensor([1]), TOKENS, cfg_scale=float("nan")), "cfg_scale"),
        (lambda m: compat.generate(m, torch.tensor([1]), TOKENS, cfg_scale=-1.0), "cfg_scale"),
        (lambda m: compat.generate(m, torch.tensor([1]), TOKENS, top_p=0.0), "top_p"),
        (lambda m: compat.generate(m, torch.tensor([1]), TOKENS, top_k=-1), "top_k"),
        (lambda m: compat.generate(m, torch.tensor([1]), TOKENS, torch.zeros(1, 1)), "masked"),
        (lambda m: compat.generate_t2i(m, torch.randn(1, 1, 8), None, TOKENS), "call generate for"),
        (lambda m: compat.generate(plain(GEAR_TEXT_CONFIG), text_inputs()[0], TOKENS), "generate_t2i"),
        (lambda m: compat.generate(plain(LLAMAGEN_TEXT_CONFIG), torch.randn(2, 5, 20), TOKENS), "do not fit"),
    ],
)
def test_bad_requests(change: Callable[[PlainTransformer], Any], message: str) -> None:
    model = plain()
    with pytest.raises(InvalidRequestError, match=message):
        change(model)
    assert len(compat._engines) == 0  # refused before anything is allocated
