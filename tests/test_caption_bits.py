"""A caption's prefix has the same bits alone, in any company, in any slot, and on any number of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gear_engine.kv_cache import StaticKVCache
from gear_engine.models.transformer import Transformer
from gear_engine.models.weights import GeneratorWeights
from gear_engine.ops import GeneratorOps
from gear_engine.prefixes import Caption, PrefixEncoder
from tests.golden_weights import golden_state_dict
from tests.models_for_tests import NULL_TEXT, TEXT
from tests.ops.cpu_paths import threads

LENGTHS = (2, 5, 13)
#: Rows that leave a rest to every vector length, and batches that torch would share among threads.
SHAPE: dict[str, Any] = {"dim": 200, "n_head": 2, "n_kv_head": 1, "cls_token_num": 13, "caption_dim": 36}
CONFIGS = {
    "causal": TEXT.replace(**SHAPE),
    "prefix": TEXT.replace(**SHAPE, text_attn="prefix"),
    "learned null caption": NULL_TEXT.replace(**SHAPE),
}
CPU = torch.device("cpu")


def _captions(count: int, learned_null: bool) -> list[Caption]:
    """Captions of 2, 5 and 13 tokens in turn, padded on the left or right; a null caption of three tokens."""
    random = torch.Generator().manual_seed(0)
    null = torch.randn(13, 36, generator=random), torch.arange(13) < 3
    found = []
    for index in range(count):
        length = LENGTHS[index % 3]
        mask = torch.arange(13) < length if index % 2 else torch.arange(13) >= 13 - length
        found.append(Caption(torch.randn(13, 36, generator=random), mask, None if learned_null else null))
    return found


class _Prefixes:
    def __init__(self, name: str, dtype: torch.dtype) -> None:
        config = CONFIGS[name]
        state = golden_state_dict(Transformer(config))
        self.weights = GeneratorWeights.from_state_dict(config, {key: value.to(dtype) for key, value in state.items()})
        self.ops = GeneratorOps.resolve(CPU, dtype, "cpu")
        self.dtype = dtype

    def __call__(self, captions: list[Caption], slots: list[int]) -> list[tuple[torch.Tensor, ...]]:
        """Per caption: logits, cache entries and bias of its own prefix and of its null caption's."""
        count = len(captions)
        state = PrefixEncoder().captions(self.weights, self.ops, captions, [True] * count)
        cache = StaticKVCache(self.weights.config, 2 * count, 1, self.dtype)
        at = torch.tensor([*slots, *(count + slot for slot in slots)])
        cache.write_prefix(at, state.values, state.bias)
        parts = state.logits, cache.kv[:, 1, at, :, 0].transpose(0, 1), cache.prefix_bias[at]
        return [tuple(part[row] for part in parts for row in (i, count + i)) for i in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bits_do_not_depend_on_company_slot_or_threads(name: str, dtype: torch.dtype) -> None:
    prefixes = _Prefixes(name, dtype)
    everyone = _captions(17, CONFIGS[name].learned_uncond)
    with threads(1), torch.inference_mode():
        alone = [prefixes([caption], [0])[0] for caption in everyone]
    assert not torch.equal(alone[0][0], alone[3][0])
    for count in (1, 2, 5):
        for size in (1, 3, 8, 17):
            # Other captions, and another order of slots, for every number of threads.
            chosen = [(count + i) % 17 for i in range(size)]
            slots = [(i * 5 + count) % size for i in range(size)]
            with threads(count), torch.inference_mode():
                found = prefixes([everyone[i] for i in chosen], slots)
            for i, parts in zip(chosen, found, strict=True):
                for part, expected in zip(parts, alone[i], strict=True):
                    assert torch.equal(part, expected), f"caption {i} in a batch of {size}, {count} threads"
