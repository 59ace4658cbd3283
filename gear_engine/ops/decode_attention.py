"""Attention of one new image token per row over a static cache: rotate, write, attend.

For row r with slot s = slots[r], token position t = positions[r] and head h (key/value head g = h // (n_head / n_kv)):

    q, k, v   = split(qkv[r])                                      q (dim), k and v (n_kv_head * head_dim)
    q, k      = rope(q, t), rope(k, t)                             pairs (x[2i], x[2i+1]), fp32, rounded to qkv's dtype
    cache[s, g, 1 + t] = k, v
    a_0       = prefix_bias[s]                                     entry 0: the collapsed prefix, key zero
    a_j       = q . k_cache[s, g, j] / sqrt(head_dim)              j = 1 ... 1 + t
    out[r, h] = sum_j softmax(a)_j v_cache[s, g, j]                j = 0 ... 1 + t

A prefix token's key is zero in these models (its rows of the RoPE table are), so every prefix token scores 0 and n of
them weigh as much as one entry with logit log n and the mean of their values. ``prefix_bias`` = log n is -inf when
there is no valid prefix token: the entry then has weight 0 (its value must still be finite).

An fp8 cache (``float8_e4m3fn``) holds k and v divided by a scale of their own per row and key/value head, in fp16; they
are quantized when they are written and multiplied again, in fp32, whenever they are read, the new token's too:

    scale = fp16(max_d |x_d| / 448);   stored_d = e4m3(clamp(x_d / scale, -448, 448)), zeros if the scale is zero

A row with slot -1 is inert: it takes no part, nothing is read or written for it, and its output is zero. Its position
is not looked at.

Source: RoPE as in GEAR ``models/llamagen.py``; softmax in fp32.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F

from gear_engine.ops import backends, decode_attention_cuda, native, triton_backend

__all__ = ["FP8", "decode_attention", "dequantize_entries", "quantize_entries", "reference", "rotate"]

#: dtype of an fp8 cache, and its largest number.
FP8: Final = torch.float8_e4m3fn
_FP8_MAX: Final = 448.0


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotates pairs of ``x`` (..., H, D) by ``rope`` (..., D / 2, 2) = (cos, sin), in fp32 at least; x's dtype."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(*x.shape[:-1], -1, 2)  # [..., H, D / 2, 2]
    cos, sin = rope[..., None, :, 0], rope[..., None, :, 1]  # [..., 1, D / 2]
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def quantize_entries(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` (..., D) as (fp8 (..., D), fp16 scales (...)), by the module's formula."""
    wide = x.float()
    scales = (wide.abs().amax(dim=-1) / _FP8_MAX).to(torch.float16)
    divisor = torch.where(scales > 0, scales.float(), 1.0)[..., None]
    # A scale that was rounded down, or to zero, leaves numbers above the largest one.
    stored = torch.where(scales[..., None] > 0, (wide / divisor).clamp(-_FP8_MAX, _FP8_MAX), 0.0)
    return stored.to(FP8), scales


def dequantize_entries(stored: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """fp32 numbers of what :func:`quantize_entries` returned."""
    return stored.float() * scales.float()[..., None]


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
    backend: str = "auto",
) -> torch.Tensor:
    """The module's formula, checked, by the chosen backend.

    Args:
        qkv: (R, (n_head + 2 n_kv_head) * head_dim), fp32, bf16 or fp16; rows contiguous.
        k_cache, v_cache: (num_slots, n_kv_head, S, head_dim) views of one layer's cache, last dimension contiguous;
            written at entry 1 + t. Of qkv's dtype, or fp8. Prefix keys are never read.
        prefix_bias: fp32 (num_slots,): log of the number of valid prefix tokens, -inf if there is none.
        slots: int64 (R,), distinct, or -1 for inert rows.
        positions: int64 (R,), image-token index t of each row, 1 + t < S.
        rope: fp32 (block_size, head_dim / 2, 2), (cos, sin) of every image-token position.
        n_head: number of query heads.
        k_scale, v_scale: fp16 (num_slots, n_kv_head, S) of an fp8 cache, last dimension contiguous; written at entry
            1 + t.
        first_slot: a hint from the host: ``slots`` is ``first_slot + arange(R)``. Implementations may ignore it.
        position: a hint from the host: all ``positions`` are equal to it. Implementations may ignore it.
        backend: as in :func:`gear_engine.ops.backends.resolve`.

    Returns:
        (R, n_head * head_dim) of qkv's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    num_slots, n_kv_head, _, head_dim = k_cache.shape
    rows = qkv.shape[0]
    if qkv.shape != (rows, (n_head + 2 * n_kv_head) * head_dim):
        raise ValueError(f"qkv {tuple(qkv.shape)} does not hold {n_head} + 2 * {n_kv_head} heads of {head_dim}")
    if v_cache.shape != k_cache.shape or v_cache.dtype != k_cache.dtype or k_cache.dtype not in (qkv.dtype, FP8):
        raise ValueError("k_cache and v_cache must have equal shapes and the dtype of qkv, or fp8")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if k_cache.dtype != FP8:
            if scale is not None:
                raise ValueError(f"{name} goes with an fp8 cache")
        elif scale is None or scale.shape != k_cache.shape[:3] or scale.dtype != torch.float16 or scale.stride(2) != 1:
            raise ValueError(f"{name} must be fp16 {tuple(k_cache.shape[:3])}, entries contiguous, for an fp8 cache")
    if k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1 or qkv.stride(-1) != 1:
        raise ValueError("the last dimension of qkv and of the caches must be contiguous")
    if prefix_bias.shape != (num_slots,) or prefix_bias.dtype != torch.float32:
        raise ValueError(f"prefix_bias must be fp32 ({num_slots},)")
    index_dtypes = {slots.dtype, positions.dtype}
    if slots.shape != (rows,) or positions.shape != (rows,) or index_dtypes != {torch.int64}:
        raise ValueError(f"slots and positions must be int64 ({rows},)")
    if rope.shape[1:] != (head_dim // 2, 2) or rope.dtype != torch.float32:
        raise ValueError(f"rope must be fp32 (block_size, {head_dim // 2}, 2)")
    run = backends.resolve("decode_attention", qkv.device, k_cache.dtype, backend, other=qkv.dtype).load()
    scales = {} if k_scale is None else {"k_scale": k_scale, "v_scale": v_scale}
    operands = (qkv, k_cache, v_cache, prefix_bias, slots, positions, rope, n_head)
    out: torch.Tensor = run(*operands, first_slot=first_slot, position=position, **scales)
    return out


def _host_layout(slots: torch.Tensor, positions: torch.Tensor) -> tuple[int | None, int | None, int]:
    """(first_slot or None, common position or None, largest position), read from the index tensors."""
    slot_list, position_list = slots.tolist(), positions.tolist()
    consecutive = slot_list == list(range(slot_list[0], slot_list[0] + len(slot_list)))
    last = max(position_list)
    return slot_list[0] if consecutive else None, last if min(position_list) == last else None, last


def reference(
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
    """Plain torch. Rows in consecutive slots attend to views of the cache; nothing is gathered or copied for them."""
    _, n_kv_head, _, head_dim = k_cache.shape
    rows = qkv.shape[0]
    if first_slot is None or position is None:
        live = slots >= 0
        if not bool(live.all()):
            out = qkv.new_zeros(rows, n_head * head_dim)
            if bool(live.any()):
                some = (slots[live], positions[live], rope, n_head)
                out[live] = reference(qkv[live], k_cache, v_cache, prefix_bias, *some, k_scale=k_scale, v_scale=v_scale)
            return out
        first_slot, position, last = _host_layout(slots, positions)
    else:
        last = position
    q, k, v = torch.split(qkv.view(rows, -1, head_dim), [n_head, n_kv_head, n_kv_head], dim=1)  # [R, H, D]
    table = rope[positions] if position is None else rope[position]
    q, k = rotate(q, table), rotate(k, table)

    in_cache = slots if first_slot is None else slice(first_slot, first_slot + rows)
    if first_slot is not None and position is not None:
        entry: tuple[Any, ...] = (in_cache, slice(None), position + 1)
    else:
        entry = (slots, slice(None), positions + 1)
    _store(k_cache, k_scale, entry, k)
    _store(v_cache, v_scale, entry, v)
    keys = _load(k_cache, k_scale, in_cache, last + 2)  # [R, G, t + 2, D]
    values = _load(v_cache, v_scale, in_cache, last + 2)

    mask = torch.zeros(rows, 1, 1, last + 2, dtype=torch.float32, device=qkv.device)  # [R, 1, 1, t + 2]
    if position is None:
        entries = torch.arange(last + 2, device=qkv.device)
        mask.masked_fill_((entries > positions[:, None] + 1)[:, None, None], float("-inf"))
    mask[:, 0, 0, 0] = prefix_bias[in_cache]
    # The query heads of one key/value head are the query rows of one attention problem.
    q = q.view(rows, n_kv_head, -1, head_dim).to(keys.dtype)  # [R, G, H / G, D]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).reshape(rows, -1).to(qkv.dtype)


def _store(cache: torch.Tensor, scale: torch.Tensor | None, entry: tuple[Any, ...], x: torch.Tensor) -> None:
    """cache[entry] = x (R, G, D)."""
    if scale is None:
        cache[entry] = x
    else:
        stored, scale[entry] = quantize_entries(x)
        # Bytes are copied as bytes: not every device can index 8-bit floats.
        cache.view(torch.uint8)[entry] = stored.view(torch.uint8)


def _load(cache: torch.Tensor, scale: torch.Tensor | None, slots: torch.Tensor | slice, entries: int) -> torch.Tensor:
    """The first ``entries`` entries of ``slots``: (R, G, entries, D), in fp32 from an fp8 cache."""
    if scale is None:
        return cache[slots, :, :entries]
    stored = cache.view(torch.uint8)[slots, :, :entries].view(FP8)
    return dequantize_entries(stored, scale[slots, :, :entries])


_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def _cpu(
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
    """Compiled. A row's bits depend on that row and its slot's cache only, whatever the batch and the threads.

    Raises:
        ValueError: the head is larger than 256, or the strides of keys and values, or of their scales, differ.
        IndexError: a slot or position does not exist; nothing was written.
    """
    _, n_kv_head, _, head_dim = k_cache.shape
    decode_attention_cuda.check_caches(k_cache, v_cache)
    slots, positions, rope = slots.contiguous(), positions.contiguous(), rope.contiguous()
    rows = qkv.shape[0]
    out = qkv.new_empty(rows, n_head * head_dim)
    num_entries = min(k_cache.shape[2], 1 + rope.shape[0])
    native.cpu_kernels().decode_attention_cpu(
        qkv.data_ptr(), _DTYPES[qkv.dtype], qkv.stride(0), rows, n_head, n_kv_head, head_dim, k_cache.data_ptr(),
        v_cache.data_ptr(), k_cache.shape[0], num_entries, *k_cache.stride()[:3],
        *decode_attention_cuda.scale_operands(k_scale, v_scale), prefix_bias.data_ptr(), slots.data_ptr(),
        positions.data_ptr(), rope.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


backends.register("decode_attention", "reference", lambda: reference)
triton_backend.register("decode_attention", triton_backend.FLOATS | {FP8})
backends.register(
    "decode_attention",
    "cpu",
    lambda: _cpu,
    devices=frozenset({"cpu"}),
    dtypes=frozenset(_DTYPES) | {FP8},
    unavailable=lambda: native.unavailable("decode_attention_cpu"),
)
backends.register(
    "decode_attention",
    "cuda",
    lambda: decode_attention_cuda.run,
    devices=frozenset({"cuda"}),
    dtypes=frozenset(decode_attention_cuda.DTYPES),
    unavailable=lambda: native.unavailable("decode_attention_cuda"),
)
