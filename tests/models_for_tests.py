"""Small generators with weights by rule."""

from __future__ import annotations

from functools import cache

import torch

from gear_engine.config import GeneratorConfig
from gear_engine.engine import Engine, FinishedImage
from gear_engine.models.condition import TextCondition
from gear_engine.models.transformer import Transformer
from gear_engine.request import SamplingParams
from tests.golden_weights import golden_noise, golden_state_dict

CLASS = GeneratorConfig(dim=48, n_layer=2, n_head=4, vocab_size=61, block_size=16, num_classes=9, ffn_dim=96)
TEXT = CLASS.replace(conditioning="text", cls_token_num=7, caption_dim=20, n_double_stream_layers=1)
NULL_TEXT = CLASS.replace(conditioning="text", cls_token_num=7, caption_dim=20, learned_uncond=True)
GUIDED = SamplingParams(cfg_scale=3.0, top_k=30)
#: With and without guidance, for all of an image or its first tokens; every kind of filter, and none; greedy.
SETTINGS = [
    SamplingParams(),
    SamplingParams(cfg_scale=4.0, temperature=0.9, top_k=20),
    SamplingParams(cfg_scale=2.5, cfg_interval=5, top_p=0.9),
    SamplingParams(cfg_scale=1.75, temperature=1.1, top_p=0.95),
    SamplingParams(sample_logits=False),
    SamplingParams(cfg_scale=2.0, cfg_interval=0),
    SamplingParams(cfg_scale=3.0, cfg_interval=8, top_k=7, top_p=0.8),
]


@cache
def small_model(config: GeneratorConfig = CLASS) -> Transformer:
    """Shared between tests: leave its weights alone."""
    model = Transformer(config)
    model.load_state_dict(golden_state_dict(model))
    return model.eval()


def fresh_model(config: GeneratorConfig = CLASS) -> Transformer:
    model = Transformer(config)
    model.load_state_dict(small_model(config).state_dict())
    return model.eval()


#: Masks of one caption of 7 tokens: full, right-padded, left-padded, holes, one token, none.
MASKS = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 1],
        [0, 1, 0, 1, 1, 0, 0],
        [1, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ],
    dtype=torch.bool,
)


def captions(count: int = len(MASKS), *, null: bool = True) -> TextCondition:
    """Captions with all kinds of padding, and a null caption of two valid tokens."""
    states = golden_noise("captions", (count, 7, 20))
    mask = MASKS[torch.arange(count) % len(MASKS)]
    if not null:
        return TextCondition(states, mask)
    return TextCondition(states, mask, golden_noise("null", (7, 20)), MASKS[1])


def drain(engine: Engine) -> list[FinishedImage]:
    """Steps until no request is left; what was finished, in order."""
    found = []
    while engine.num_unfinished:
        found += engine.step()
    return found
