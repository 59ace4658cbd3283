"""The call of the CUDA kernel of :mod:`gear_engine.ops.decode_attention`, which registers it."""

from __future__ import annotations

import functools
from typing import Final

import torch

from gear_engine.ops import native

__all__ = ["DTYPES", "MAX_HEAD_DIM", "check_caches", "num_splits", "run", "scale_operands"]

#: What the kernel calls the dtypes of a cache; all but the last are also those of its operands.
DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}
MAX_HEAD_DIM: Final = 256
_CHUNK: Final = 64
_WORD: Final = 16


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def num_splits(device: torch.device, blocks: int, chunks: int) -> int:
    """How many blocks share the ``chunks`` of a head when there are ``blocks`` rows and heads: two per multiprocessor,
    if there are too few otherwise. The result's bits do not depend on it."""
    return max(1, min(chunks, -(-2 * _multiprocessors(device) // blocks)))


@functools.cache
def _arrivals(device: torch.device, stream: int, size: int) -> torch.Tensor:
    """Counters of the blocks that share a head: zero between calls, for the calls of one stream follow one another."""
    return torch.zeros(size, dtype=torch.int32, device=device)


def check_caches(k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """What the compiled kernels, for the CPU too, ask of the caches.

    Raises:
        ValueError: a head is too large or no multiple of 4, or the strides differ.
    """
    head_dim = k_cache.shape[3]
    if head_dim > MAX_HEAD_DIM or head_dim % 4:
        raise ValueError(f"head size {head_dim} is not a multiple of 4 up to {MAX_HEAD_DIM}")
    if k_cache.stride() != v_cache.stride():
        raise ValueError(f"k_cache and v_cache must have equal strides: {k_cache.stride()}, {v_cache.stride()}")


def scale_operands(k_scale: torch.Tensor | None, v_scale: torch.Tensor | None) -> tuple[int, int, int, int]:
    """What the compiled kernels take of an fp8 cache's scales: both addresses, strides of slots and heads; else zeros.

    Raises:
        ValueError: the strides differ.
    """
    if k_scale is None or v_scale is None:
        return 0, 0, 0, 0
    if k_scale.stride() != v_scale.stride():
        raise ValueError(f"k_scale and v_scale must have equal strides: {k_scale.stride()}, {v_scale.stride()}")
    return k_scale.data_ptr(), v_scale.data_ptr(), k_scale.stride(0), k_scale.stride(1)


def _check_words(cache: torch.Tensor, name: str) -> None:
    """The CUDA kernel moves entries in whole words of 16 bytes."""
    size = cache.element_size()
    padded = -(-cache.shape[3] * size // _WORD) * _WORD
    strides = [stride * size for stride in cache.stride()[:3]]
    if cache.data_ptr() % _WORD or any(stride % _WORD for stride in strides) or strides[2] < padded:
        raise ValueError(
            f"{name}: entries must start at multiples of {_WORD} bytes and take whole words, as in StaticKVCache; "
            f"address {cache.data_ptr()}, strides {strides} bytes"
        )


def run(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    prefix_bias: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    rope: torch.Tensor,
    n_head: int,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    first_slot: int | None = None,
    position: int | None = None,
) -> torch.Tensor:
    """Compiled. A row's bits depend on that row and its slot's cache only. Reads nothing on the host.

    A slot or position that does not exist stops the kernel.

    Raises:
        ValueError: a head or an entry of the caches does not fit the kernel.
    """
    _, n_kv_head, entries, head_dim = k_cache.shape
    check_caches(k_cache, v_cache)
    _check_words(k_cache, "k_cache")
    _check_words(v_cache, "v_cache")
    scales = scale_operands(k_scale, v_scale)
    slots, positions, rope, prefix_bias = (x.contiguous() for x in (slots, positions, rope, prefix_bias))
    rows = qkv.shape[0]
    out = qkv.new_empty(rows, n_head * head_dim)
    entries = min(entries, 1 + rope.shape[0])
    chunks, heads = -(-entries // _CHUNK), max(1, rows * n_head)
    splits = num_splits(qkv.device, heads, chunks)
    with native.cuda_kernels(qkv.device) as (kernels, stream):
        stored, arrived = None, None
        if splits > 1:
            stored = torch.empty(heads * chunks * (head_dim + 2), dtype=torch.float32, device=qkv.device)
            arrived = _arrivals(qkv.device, stream, 1 << (heads - 1).bit_length())
        kernels.decode_attention_cuda(
            qkv.data_ptr(), DTYPES[qkv.dtype], qkv.stride(0), rows, n_head, n_kv_head, head_dim,
            k_cache.data_ptr(), v_cache.data_ptr(), DTYPES[k_cache.dtype], k_cache.shape[0], entries,
            *k_cache.stride()[:3], *scales, prefix_bias.data_ptr(), slots.data_ptr(),
            positions.data_ptr(), rope.data_ptr(), out.data_ptr(),
            splits, 0 if stored is None else stored.data_ptr(), 0 if arrived is None else arrived.data_ptr(), stream,
        )  # fmt: skip
    return out
