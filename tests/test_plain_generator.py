"""The slow reference is itself right (goldens), and what the collapsed prefix spares compared with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gear_engine.config import GENERATOR_PRESETS
from gear_engine.kv_cache import StaticKVCache
from tests.compat.foreign import GEAR_TEXT_CONFIG, golden_model, plain
from tests.golden_weights import golden_index, load_golden
from tests.plain_generator import PlainCache, plain_generate


@pytest.mark.parametrize("name", ["c2i_hd72", "t2i_causal", "t2i_prefix", "llamagen_t2i_hd64"])
def test_the_slow_reference_reproduces_the_goldens(goldens_dir: Path, name: str) -> None:
    entry, golden = golden_index(goldens_dir)[name], load_golden(goldens_dir, name)
    model = golden_model(entry)
    run = entry["runs"][2]
    sampling = {key: value for key, value in run.items() if key != "seed"}
    if entry["kind"] == "c2i":
        given = {"condition": golden["cond"], "uncond": torch.full_like(golden["cond"], model.num_classes)}
    elif entry["kind"] == "t2i":
        given = {"condition": golden["cond_emb"], "uncond": golden["uncond_emb"]}
        given |= {"mask": golden["cond_mask"], "uncond_mask": golden["uncond_mask"]}
    else:
        uncond = model.cls_embedding.uncond_embedding.expand_as(golden["cond"])
        given = {"condition": golden["cond"], "uncond": uncond}
        given |= {"mask": golden["emb_masks"], "uncond_mask": golden["emb_masks"]}
    torch.manual_seed(run["seed"])
    tokens = plain_generate(model, max_new_tokens=entry["block_size"], **given, **sampling)
    assert torch.equal(tokens, golden["run2.tokens"].int())


def test_a_long_prompt_takes_no_cache() -> None:
    text, label = GENERATOR_PRESETS["GEAR-T2I-B"], GENERATOR_PRESETS["LlamaGen-B"]
    bytes_of = [StaticKVCache.nbytes(config, 2, 256, torch.float32) for config in (text, label)]
    assert bytes_of[0] == bytes_of[1]
    assert StaticKVCache.shape(text, 2, 256)[-2] == 264  # one prefix entry and 256 tokens, in steps of 8
    model = plain(GEAR_TEXT_CONFIG)
    whole = PlainCache(model, 2, GEAR_TEXT_CONFIG.cls_token_num + 16).nbytes()
    # Per row, head and layer: 6 + 16 entries against 1 + 16 rounded up to 24 (tiny sizes round up most).
    assert whole == 2 * 2 * 2 * 72 * 22 * 4
