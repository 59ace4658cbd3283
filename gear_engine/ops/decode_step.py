"""One image token per row through the whole model, in one call.

The composition of :mod:`gear_engine.ops.skinny_linear` and :mod:`gear_engine.ops.decode_attention` that
``gear_engine.runner`` spells out::

    h = tok_embeddings[tokens]
    per block:  qkv = norm-linear(h, wqkv);  a = decode_attention(qkv, cache);  h = h + a @ wo^T
                h = h + swiglu(rmsnorm(h), w1, w3) @ w2^T
    logits = norm-linear(h, output)                                                     fp32, never rounded to h's dtype

The compiled one calls the same kernels in the same order, so that the bits are equal; what it saves is Python between
62 short calls. Backends without it have the runner make the calls.

Source: GEAR ``models/llamagen.py``.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from gear_engine.ops import backends, decode_attention, native, skinny_linear
from gear_engine.ops.decode_attention import FP8
from gear_engine.ops.skinny_linear import Weight, weight_operands

__all__ = ["Block", "Cache", "Model", "ModelWords", "decode_step", "reference"]


class Block(Protocol):
    """A decoder block's weights; see ``gear_engine.models.weights``."""

    @property
    def attention_norm(self) -> torch.Tensor: ...
    @property
    def wqkv(self) -> Weight: ...
    @property
    def wo(self) -> Weight: ...
    @property
    def ffn_norm(self) -> torch.Tensor: ...
    @property
    def w1(self) -> Weight: ...
    @property
    def w3(self) -> Weight: ...
    @property
    def w2(self) -> Weight: ...


class Model(Protocol):
    """A generator's weights; see ``gear_engine.models.weights``."""

    @property
    def tok_embeddings(self) -> torch.Tensor: ...
    @property
    def norm(self) -> torch.Tensor: ...
    @property
    def output(self) -> Weight: ...
    @property
    def blocks(self) -> Sequence[Block]: ...


class Cache(Protocol):
    """A static cache; see ``gear_engine.kv_cache``."""

    @property
    def kv(self) -> torch.Tensor: ...
    @property
    def scales(self) -> torch.Tensor | None: ...
    @property
    def prefix_bias(self) -> torch.Tensor: ...
    @property
    def rope(self) -> torch.Tensor: ...


_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def decode_step(
    weights: Model,
    cache: Cache,
    n_head: int,
    norm_eps: float,
    slots: torch.Tensor,
    positions: torch.Tensor,
    tokens: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """The module's formula, checked, by the chosen backend.

    Args:
        weights: contiguous tensors, or packed linear weights, on the cache's device; of its dtype, unless that is fp8.
        cache: keys and values are written at entry 1 + t of each row's slot.
        n_head: number of query heads.
        norm_eps: epsilon of every RMSNorm.
        slots: int64 (R,), distinct, or -1 for inert rows: nothing is written for them, their logits mean nothing.
        positions: int64 (R,): image-token index t of the tokens given.
        tokens: int64 (R,), in [0, vocab_size), for inert rows too.
        backend: as in :func:`gear_engine.ops.backends.resolve`.

    Returns:
        fp32 (R, vocab_size): logits of image token t + 1.

    Raises:
        ValueError: a tensor's dtype, shape or layout does not fit.
        IndexError: a token, slot or position does not exist; nothing was written.
    """
    rows = tokens.shape[0]
    for name, index in (("slots", slots), ("positions", positions), ("tokens", tokens)):
        if index.shape != (rows,) or index.dtype != torch.int64:
            raise ValueError(f"{name} must be int64 ({rows},)")
    dtype = weights.tok_embeddings.dtype
    run = backends.resolve("decode_step", cache.kv.device, dtype, backend, other=cache.kv.dtype).load()
    out: torch.Tensor = run(weights, cache, n_head, norm_eps, slots, positions, tokens)
    return out


def reference(
    weights: Model,
    cache: Cache,
    n_head: int,
    norm_eps: float,
    slots: torch.Tensor,
    positions: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """The references of the parts, one after the other. Its logits pass through h's dtype."""
    linear, attend = skinny_linear.reference, decode_attention.reference
    h = weights.tok_embeddings[tokens]  # [R, dim]
    for layer, block in enumerate(weights.blocks):
        keys, values = cache.kv[layer, 0], cache.kv[layer, 1]
        k_scale, v_scale = (None, None) if cache.scales is None else cache.scales[layer]
        qkv = linear(h, block.wqkv, norm_weight=block.attention_norm, norm_eps=norm_eps)
        operands = (qkv, keys, values, cache.prefix_bias, slots, positions, cache.rope, n_head)
        attended = attend(*operands, k_scale=k_scale, v_scale=v_scale)
        h = linear(attended, block.wo, residual=h)
        hidden = linear(h, block.w1, norm_weight=block.ffn_norm, norm_eps=norm_eps, gate=block.w3)
        h = linear(hidden, block.w2, residual=h)
    return linear(h, weights.output, norm_weight=weights.norm, norm_eps=norm_eps).float()


class ModelWords:
    """The description of weights and cache for compiled steps.

    Made at the first step with them and kept: it takes longer than a block's int8 products do. Neither object is kept
    alive; their tensors stay where they are as long as they live.
    """

    def __init__(self) -> None:
        self._bound: Callable[[], tuple[Model | None, Cache | None]] = lambda: (None, None)
        self._words = array("q")
        self._key: tuple[int, ...] = ()

    def address(self, weights: Model, cache: Cache, n_head: int) -> int:
        """Where the words are until the next call."""
        key = (n_head, cache.kv.data_ptr(), weights.tok_embeddings.data_ptr())
        bound = self._bound()
        if bound[0] is not weights or bound[1] is not cache or self._key != key:
            self._words = array("q", _describe(weights, cache, n_head))
            weights_ref, cache_ref = weakref.ref(weights), weakref.ref(cache)
            self._bound, self._key = lambda: (weights_ref(), cache_ref()), key
        return self._words.buffer_info()[0]


class _Step:
    """Compiled. A row's bits depend on that row, its slot's cache and the weights only."""

    def __init__(self) -> None:
        self._words = ModelWords()

    def __call__(
        self,
        weights: Model,
        cache: Cache,
        n_head: int,
        norm_eps: float,
        slots: torch.Tensor,
        positions: torch.Tensor,
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        slots, positions, tokens = slots.contiguous(), positions.contiguous(), tokens.contiguous()
        logits = torch.empty(tokens.shape[0], weights.tok_embeddings.shape[0], dtype=torch.float32)
        native.cpu_kernels().decode_step_cpu(
            self._words.address(weights, cache, n_head), norm_eps, tokens.shape[0], tokens.data_ptr(), slots.data_ptr(),
            positions.data_ptr(), logits.data_ptr(),
        )  # fmt: skip
        return logits


def _describe(weights: Model, cache: Cache, n_head: int) -> list[int]:
    """The words of ``StepModel`` and ``StepLayer`` in ``csrc/cpu/decode_step.h``."""
    kv, scales, dtype = cache.kv, cache.scales, weights.tok_embeddings.dtype
    vocab_size, dim = weights.tok_embeddings.shape
    strides = kv.stride()
    if strides[-1] != 1 or not cache.rope.is_contiguous():
        raise ValueError("the cache's last dimension and its RoPE table must be contiguous")
    if kv.dtype != (dtype if scales is None else FP8):
        raise ValueError(f"a cache of dtype {kv.dtype} goes with weights of that dtype, or is fp8 and has scales")
    if scales is not None and (scales.shape != kv.shape[:5] or scales.dtype != torch.float16 or scales.stride(4) != 1):
        raise ValueError(f"scales must be fp16 {tuple(kv.shape[:5])}, entries contiguous")

    def vector(tensor: torch.Tensor) -> int:
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"weights must be contiguous and of one dtype, {dtype}")
        return tensor.data_ptr()

    first = weights.blocks[0]
    ffn_dim = first.w1.shape[0] if isinstance(first.w1, torch.Tensor) else first.w1.out_features
    words = [
        *(len(weights.blocks), dim, ffn_dim, vocab_size, n_head, kv.shape[3], _DTYPES[dtype]),
        *(vector(weights.tok_embeddings), vector(weights.norm), *weight_operands(weights.output, dtype)),
        *(
            kv.data_ptr(),
            kv.shape[2],
            min(kv.shape[4], 1 + cache.rope.shape[0]),
            strides[0],
            strides[1],
            strides[2],
            strides[3],
            strides[4],
        ),
        *((0,) * 5 if scales is None else (scales.data_ptr(), *scales.stride()[:4])),
        *(cache.prefix_bias.data_ptr(), cache.rope.data_ptr()),
    ]
    for block in weights.blocks:
        words += (
            *(vector(block.attention_norm), *weight_operands(block.wqkv, dtype), *weight_operands(block.wo, dtype)),
            *(vector(block.ffn_norm), *weight_operands(block.w1, dtype), *weight_operands(block.w3, dtype)),
            *weight_operands(block.w2, dtype),
        )
        if words[-6] != words[-9]:
            raise ValueError("w1 and w3 must be packed alike")
    return words


backends.register("decode_step", "reference", lambda: reference)
backends.register(
    "decode_step",
    "cpu",
    _Step,
    devices=frozenset({"cpu"}),
    dtypes=frozenset(_DTYPES) | {FP8},
    unavailable=lambda: native.unavailable("decode_step_cpu"),
)
