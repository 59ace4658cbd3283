"""Attention of one new image token per row over a static cache, in Triton: rotate, write, attend.

The contract is that of :mod:`gear_engine.ops.decode_attention`. One program takes one row and one key/value head with
all its query heads, so that keys and values are read once. Keys are walked in fixed chunks of 64 with an online
softmax (Milakov and Gimelshein, 2018), in order, so a row's bits do not depend on the batch.

The row's own key and value never travel through memory: they join the softmax last, from registers, which saves a
barrier between the cache write and the reads.

Runs under Triton's interpreter in the tests; not yet timed on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CHUNK: tl.constexpr = tl.constexpr(64)


@triton.jit
def _rotate(base, rope, lane, valid, HEAD_DIM: tl.constexpr):
    """x[d] * cos[d // 2] -+ x[d ^ 1] * sin[d // 2]: interleaved pairs, one lane per element."""
    x = tl.load(base + lane, mask=valid, other=0.0).to(tl.float32)
    partner = tl.load(base + (lane ^ 1), mask=valid, other=0.0).to(tl.float32)
    cos = tl.load(rope + (lane // 2) * 2, mask=valid, other=0.0)
    sin = tl.load(rope + (lane // 2) * 2 + 1, mask=valid, other=0.0)
    sign = tl.where(lane % 2 == 0, -1.0, 1.0)
    return x * cos + sign * partner * sin


@triton.jit
def _decode_attention_kernel(
    qkv,
    k_cache,
    v_cache,
    prefix_bias,
    slots,
    positions,
    rope,
    out,
    stride_qkv,
    stride_slot,
    stride_head,
    stride_entry,
    scale,
    N_HEAD: tl.constexpr,
    N_KV_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    group: tl.constexpr = N_HEAD // N_KV_HEAD
    slot = tl.load(slots + row)
    t = tl.load(positions + row)
    lane = tl.arange(0, LANES)
    if slot < 0:  # an inert row: zeros out, nothing read or written
        for h in tl.static_range(group):
            nothing = tl.zeros([LANES], dtype=out.dtype.element_ty)
            tl.store(out + (row * N_HEAD + kv_head * group + h) * HEAD_DIM + lane, nothing, mask=lane < HEAD_DIM)
        return
    valid = lane < HEAD_DIM
    row_qkv = qkv + row.to(tl.int64) * stride_qkv
    row_rope = rope + t * HEAD_DIM
    cache_offset = slot * stride_slot + kv_head * stride_head

    # Phase 1: the new key and value, rounded to the cache's dtype, written to entry 1 + t.
    dtype = k_cache.dtype.element_ty
    new_k = _rotate(row_qkv + (N_HEAD + kv_head) * HEAD_DIM, row_rope, lane, valid, HEAD_DIM).to(dtype)
    new_v = tl.load(row_qkv + (N_HEAD + N_KV_HEAD + kv_head) * HEAD_DIM + lane, mask=valid, other=0.0).to(dtype)
    entry = cache_offset + (t + 1) * stride_entry
    tl.store(k_cache + entry + lane, new_k, mask=valid)
    tl.store(v_cache + entry + lane, new_v, mask=valid)
    new_k = new_k.to(tl.float32)
    new_v = new_v.to(tl.float32)
    bias = tl.load(prefix_bias + slot)

    for h in tl.static_range(group):
        head = kv_head * group + h
        q = _rotate(row_qkv + head * HEAD_DIM, row_rope, lane, valid, HEAD_DIM).to(dtype).to(tl.float32)

        # Phase 2: the entries before the new one, chunk by chunk. The running maximum starts at the new entry's
        # score, which is finite: -inf - -inf never arises, not even with an absent prefix.
        own = tl.sum(q * new_k, axis=0) * scale
        running_max = own
        total = 0.0
        accumulator = tl.zeros([LANES], dtype=tl.float32)
        for start in range(0, t + 1, CHUNK):
            entries = start + tl.arange(0, CHUNK)
            live = entries <= t
            offsets = cache_offset + entries[:, None] * stride_entry + lane[None, :]
            # Entry 0 is the collapsed prefix: its key is zero by definition and never read.
            keys = tl.load(
                k_cache + offsets, mask=(live & (entries > 0))[:, None] & valid[None, :], other=0.0
            )  # [CHUNK, LANES]
            scores = tl.sum(keys.to(tl.float32) * q[None, :], axis=1) * scale
            scores = tl.where(entries == 0, bias, scores)
            scores = tl.where(live, scores, float("-inf"))
            chunk_max = tl.maximum(running_max, tl.max(scores, axis=0))
            weights = tl.exp(scores - chunk_max)
            shrink = tl.exp(running_max - chunk_max)
            values = tl.load(v_cache + offsets, mask=live[:, None] & valid[None, :], other=0.0)
            total = total * shrink + tl.sum(weights, axis=0)
            accumulator = accumulator * shrink + tl.sum(values.to(tl.float32) * weights[:, None], axis=0)
            running_max = chunk_max

        # Phase 3: the new entry, from registers.
        weight = tl.exp(own - running_max)
        result = (accumulator + weight * new_v) / (total + weight)
        tl.store(out + (row * N_HEAD + head) * HEAD_DIM + lane, result.to(out.dtype.element_ty), mask=valid)


def decode_attention(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    prefix_bias: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    rope: torch.Tensor,
    n_head: int,
    *,
    first_slot: int | None = None,
    position: int | None = None,
) -> torch.Tensor:
    """Launches the kernel; the arguments were checked by :func:`gear_engine.ops.decode_attention.decode_attention`."""
    rows = qkv.shape[0]
    _, n_kv_head, _, head_dim = k_cache.shape
    if k_cache.stride() != v_cache.stride():
        raise ValueError("k_cache and v_cache must have equal strides")
    out = torch.empty(rows, n_head * head_dim, dtype=qkv.dtype, device=qkv.device)
    _decode_attention_kernel[(rows, n_kv_head)](
        qkv,
        k_cache,
        v_cache,
        prefix_bias,
        slots,
        positions,
        rope.contiguous(),
        out,
        qkv.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        head_dim**-0.5,
        N_HEAD=n_head,
        N_KV_HEAD=n_kv_head,
        HEAD_DIM=head_dim,
        LANES=triton.next_power_of_2(head_dim),
    )
    return out
