"""The drop-in functions on wrapped, swapped and changed modules, which are left as they were."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from gear_engine import compat
from gear_engine.config import GeneratorConfig
from gear_engine.errors import ConfigError
from tests.compat.foreign import CLASS_CONFIG, LLAMAGEN_TEXT_CONFIG, TOKENS, fingerprint, plain, text_inputs
from tests.plain_generator import PlainTransformer, plain_generate


def test_wrapped_by_compile_and_by_ddp() -> None:
    model, labels = plain(), torch.tensor([3, 3])
    torch.manual_seed(6)
    expected = compat.generate(model, labels, TOKENS)
    if torch.distributed.is_available():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(model)
            torch.manual_seed(6)
            assert torch.equal(compat.generate(parallel, labels, TOKENS), expected)
            torch.manual_seed(6)
            assert torch.equal(compat.generate(torch.compile(parallel), labels, TOKENS), expected)
        finally:
            torch.distributed.destroy_process_group()
    torch.manual_seed(6)
    assert torch.equal(compat.generate(torch.compile(model), labels, TOKENS), expected)
    for index, layer in enumerate(model.layers):
        model.layers[index] = torch.compile(layer)  # as trainers do that compile block by block
    torch.manual_seed(6)
    assert torch.equal(compat.generate(model, labels, TOKENS), expected)


def test_training_mode_is_an_error() -> None:
    model, labels = plain(), torch.tensor([0])
    model.train()
    with pytest.raises(ConfigError, match="training mode"):
        compat.generate(model, labels, TOKENS)
    model.eval()
    model.layers[1].train()
    with pytest.raises(ConfigError, match=r"training mode \(layers\.1\)"):
        compat.generate(model, labels, TOKENS)


def test_caches_that_the_official_sampler_left_on_the_module() -> None:
    model, labels = plain(), torch.tensor([2])
    torch.manual_seed(1)
    expected = compat.generate(model, labels, TOKENS)
    for block in model.layers:
        block.attention.kv_cache = nn.Module()  # in training mode, as the official sampler's are
        block.attention.kv_cache.register_buffer("k_cache", torch.full((2, 2, 24, 36), 9.0))
    before = fingerprint(model)
    torch.manual_seed(1)
    assert torch.equal(compat.generate(model, labels, TOKENS), expected)
    assert [row[:-1] for row in before] == [row[:-1] for row in fingerprint(model)]


@pytest.mark.parametrize("config", [CLASS_CONFIG, LLAMAGEN_TEXT_CONFIG])
def test_the_module_is_left_as_found(config: GeneratorConfig) -> None:
    model = plain(config)
    model.output.weight.grad = torch.ones_like(model.output.weight)
    before = fingerprint(model)
    cond = torch.tensor([1, 2, 3]) if config is CLASS_CONFIG else text_inputs()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compat.generate(model, cond, TOKENS, cfg_scale=2.0)
        assert torch.is_autocast_enabled("cpu")
    compat.generate(model, cond, TOKENS, dtype=torch.bfloat16)
    assert torch.is_grad_enabled()
    after = fingerprint(model)
    assert [row[:-1] for row in before] == [row[:-1] for row in after]
    tensors = [(old[-1], new[-1]) for old, new in zip(before, after, strict=True) if isinstance(old[-1], torch.Tensor)]
    assert tensors
    assert all(torch.equal(old, new) for old, new in tensors)


def test_ema_weights_swapped_in_by_data_copy_are_noticed() -> None:
    model, ema, labels = plain(seed=0), plain(seed=1), torch.tensor([1, 2, 3])

    def official(module: PlainTransformer) -> torch.Tensor:
        torch.manual_seed(8)
        return plain_generate(module, labels, TOKENS)

    def ours(dtype: torch.dtype | None = None) -> torch.Tensor:
        torch.manual_seed(8)
        return compat.generate(model, labels, TOKENS, dtype=dtype)

    live_tokens, ema_tokens = official(model), official(ema)
    assert not torch.equal(live_tokens, ema_tokens)
    assert torch.equal(ours(), live_tokens)
    bf16_live = ours(torch.bfloat16)
    stashed = [p.detach().clone() for p in model.parameters()]
    versions = [(p._version, p.data_ptr()) for p in model.parameters()]
    for p, q in zip(model.parameters(), ema.parameters(), strict=True):
        p.data.copy_(q.data)
    assert versions == [(p._version, p.data_ptr()) for p in model.parameters()]  # nothing to see from outside
    assert torch.equal(ours(), ema_tokens)
    assert not torch.equal(ours(torch.bfloat16), bf16_live)
    for p, kept in zip(model.parameters(), stashed, strict=True):
        p.data.copy_(kept)
    assert torch.equal(ours(), live_tokens)
    assert torch.equal(ours(torch.bfloat16), bf16_live)


def tensor_bytes() -> int:
    """Bytes of all distinct tensor storages that Python still reaches."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_nothing_that_the_user_dropped_stays_alive() -> None:
    model, labels = plain(), torch.tensor([0])
    compat.generate(model, labels, TOKENS, dtype=torch.bfloat16)
    compat.generate(model, labels, TOKENS)
    old_head = weakref.ref(model.output.weight)
    old_storage = weakref.ref(model.norm.weight.untyped_storage())
    model.output.weight = nn.Parameter(model.output.weight.detach().clone())
    model.norm.weight.data = model.norm.weight.data.clone()
    gc.collect()
    assert old_head() is None
    assert old_storage() is None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert len(compat._engines) == 0


def test_caches_are_kept_and_reused_and_released() -> None:
    model = plain(CLASS_CONFIG.replace(dim=128, n_head=2, block_size=64))
    labels = torch.zeros(16, dtype=torch.long)
    cache_bytes = 2 * 2 * 16 * 128 * 64 * 4  # layers x (k, v) x images x dim x tokens x fp32
    idle = tensor_bytes()
    compat.generate(model, labels, 64)
    kept = tensor_bytes()
    assert kept - idle >= cache_bytes
    compat.generate(model, labels, 64)
    compat.generate(model, labels[:3], 16)
    assert tensor_bytes() == kept
    compat.release(torch.compile(model))
    assert tensor_bytes() == idle
    compat.release(model)  # twice is fine


def test_packed_or_cast_weights_do_not_outlive_the_call() -> None:
    model = plain(CLASS_CONFIG.replace(vocab_size=5000))
    compat.generate(model, torch.tensor([0]), TOKENS)
    idle = tensor_bytes()
    compat.release(model)
    compat.generate(model, torch.tensor([0]), TOKENS, dtype=torch.bfloat16)
    assert tensor_bytes() <= idle


def test_modules_of_another_kind() -> None:
    with pytest.raises(ConfigError, match="no model that gear_engine knows"):
        compat.generate(nn.Linear(2, 2).eval(), torch.tensor([0]), 1)
    model = plain()
    model.layers[0].attention.wqkv.bias = nn.Parameter(torch.zeros(3 * 72))
    with pytest.raises(ConfigError, match=r"layers\.0\.attention\.wqkv\.bias"):
        compat.generate(model.eval(), torch.tensor([0]), 1)
    model = plain()
    del model.config.rope_base
    with pytest.raises(ConfigError, match="rope_base"):
        compat.generate(model, torch.tensor([0]), 1)
