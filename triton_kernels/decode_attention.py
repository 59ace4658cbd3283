"""Attention of one new image token per row over a static cache, in Triton: rotate, write, attend.

The contract is that of :mod:`gear_engine.ops.decode_attention`. One program takes one row and one key/value head with
all its query heads, so that keys and values are read once. Keys are walked in fixed chunks of 64 with an online
softmax (Milakov and Gimelshein, 2018), in order, so a row's bits do not depend on the batch.

The row's own key and value never travel through memory: they join the softmax last, from registers, which saves a
barrier between the cache write and the reads.

An fp8 cache is read and written as bytes, converted by integer arithmetic: the same bits on every GPU, also on those
without such conversions, and in the interpreter. Scales multiply scores and weights, not elements. Products and sums
are rounded one by one (``enable_fp_fusion=False``), so that what is stored has the reference's bits.

Runs under Triton's interpreter in the tests; not yet timed on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CHUNK: tl.constexpr = tl.constexpr(64)


@triton.jit
def _round_to(x, dtype: tl.constexpr):
    """fp32 ``x`` rounded to ``dtype``, ties to even, as fp32; bf16 in integers, which the interpreter would cut off."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype).to(tl.float32)


@triton.jit
def _from_e4m3(stored):
    """fp32 of e4m3 bytes: a sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity, 0x7F is no number."""
    bits = stored.to(tl.int32)
    magnitude = bits & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)  # subnormals: units of 2^-9
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(bits >= 0x80, -value, value)


@triton.jit
def _to_e4m3(x):
    """e4m3 bytes of fp32 ``x``, ties to even; too large numbers become the largest, 448."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Adding 2^14, whose last place is the smallest subnormal, lets the addition round.
    subnormal = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    rounded = tl.where(magnitude < 0x3C800000, subnormal, normal)  # 2^-6
    rounded = tl.where(magnitude > 0x43E00000, 0x7E, rounded)  # 448
    rounded = tl.where(magnitude > 0x7F800000, 0x7F, rounded)  # no number
    return (((bits >> 24) & 0x80) | rounded).to(tl.uint8)


@triton.jit
def _quantize(x):
    """(e4m3 bytes, fp16 scale) of one entry: scale = max|x| / 448; zeros under a scale of zero or no number."""
    # Compared as integers, what is no number is the largest.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, 448.0).to(tl.float16)
    wide = scale.to(tl.float32)
    stored = _to_e4m3(tl.div_rn(x, tl.where(wide > 0, wide, 1.0)))
    return tl.where(wide > 0, stored, 0).to(tl.uint8), scale


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
    k_scale,
    v_scale,
    prefix_bias,
    slots,
    positions,
    rope,
    out,
    stride_qkv,
    stride_slot,
    stride_head,
    stride_entry,
    stride_scale_slot,
    stride_scale_head,
    scale,
    N_HEAD: tl.constexpr,
    N_KV_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
    FP8: tl.constexpr,
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

    # Phase 1: the new key and value, rounded to qkv's dtype, written to entry 1 + t as the cache holds them.
    dtype = qkv.dtype.element_ty
    new_k = _round_to(_rotate(row_qkv + (N_HEAD + kv_head) * HEAD_DIM, row_rope, lane, valid, HEAD_DIM), dtype)
    new_v = tl.load(row_qkv + (N_HEAD + N_KV_HEAD + kv_head) * HEAD_DIM + lane, mask=valid, other=0.0).to(tl.float32)
    entry = cache_offset + (t + 1) * stride_entry
    scale_offset = slot * stride_scale_slot + kv_head * stride_scale_head
    if FP8:
        stored_k, own_k_scale = _quantize(new_k)
        stored_v, own_v_scale = _quantize(new_v)
        tl.store(k_scale + scale_offset + t + 1, own_k_scale)
        tl.store(v_scale + scale_offset + t + 1, own_v_scale)
        new_k = _from_e4m3(stored_k) * own_k_scale.to(tl.float32)
        new_v = _from_e4m3(stored_v) * own_v_scale.to(tl.float32)
    else:
        stored_k = new_k.to(dtype)
        stored_v = new_v.to(dtype)
    tl.store(k_cache + entry + lane, stored_k, mask=valid)
    tl.store(v_cache + entry + lane, stored_v, mask=valid)
    bias = tl.load(prefix_bias + slot)

    for h in tl.static_range(group):
        head = kv_head * group + h
        q = _round_to(_rotate(row_qkv + head * HEAD_DIM, row_rope, lane, valid, HEAD_DIM), dtype)

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
            has_key = live & (entries > 0)
            keys = tl.load(k_cache + offsets, mask=has_key[:, None] & valid[None, :], other=0)  # [CHUNK, LANES]
            keys = _from_e4m3(keys) if FP8 else keys.to(tl.float32)
            scores = tl.sum(keys * q[None, :], axis=1) * scale
            if FP8:
                scores *= tl.load(k_scale + scale_offset + entries, mask=has_key, other=0.0).to(tl.float32)
            scores = tl.where(entries == 0, bias, scores)
            scores = tl.where(live, scores, float("-inf"))
            chunk_max = tl.maximum(running_max, tl.max(scores, axis=0))
            weights = tl.exp(scores - chunk_max)
            shrink = tl.exp(running_max - chunk_max)
            values = tl.load(v_cache + offsets, mask=live[:, None] & valid[None, :], other=0)
            values = _from_e4m3(values) if FP8 else values.to(tl.float32)
            total = total * shrink + tl.sum(weights, axis=0)
            if FP8:
                weights *= tl.load(v_scale + scale_offset + entries, mask=live, other=0.0).to(tl.float32)
            accumulator = accumulator * shrink + tl.sum(values * weights[:, None], axis=0)
            running_max = chunk_max

        # Phase 3: the new entry, from registers.
        weight = tl.exp(own - running_max)
        result = _round_to((accumulator + weight * new_v) / (total + weight), dtype)
        tl.store(out + (row * N_HEAD + head) * HEAD_DIM + lane, result.to(dtype), mask=valid)


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
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    first_slot: int | None = None,
    position: int | None = None,
) -> torch.Tensor:
    """Launches the kernel; the arguments were checked by :func:`gear_engine.ops.decode_attention.decode_attention`."""
    rows = qkv.shape[0]
    _, n_kv_head, _, head_dim = k_cache.shape
    fp8 = k_scale is not None
    if k_scale is None or v_scale is None:
        k_scale, v_scale = k_cache, v_cache  # not looked at
    else:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    if k_cache.stride() != v_cache.stride() or k_scale.stride() != v_scale.stride():
        raise ValueError("keys and values, and their scales, must have equal strides")
    out = torch.empty(rows, n_head * head_dim, dtype=qkv.dtype, device=qkv.device)
    _decode_attention_kernel[(rows, n_kv_head)](
        qkv,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        prefix_bias,
        slots,
        positions,
        rope.contiguous(),
        out,
        qkv.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        k_scale.stride(0),
        k_scale.stride(1),
        head_dim**-0.5,
        N_HEAD=n_head,
        N_KV_HEAD=n_kv_head,
        HEAD_DIM=head_dim,
        LANES=triton.next_power_of_2(head_dim),
        FP8=fp8,
        enable_fp_fusion=False,
    )
    return out
