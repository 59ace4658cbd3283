"""Soft read-out of a codebook, in Triton: log-sum-exp first, then the mixture with the weights computed again.

The contract is that of :mod:`gear_engine.ops.soft_readout`. Scores cost d products each, far fewer than the C of the
mixture, so they are recomputed per block of columns rather than kept: programs then own [rows, columns] tiles whatever
the table's width, and no accumulator is ever rescaled. fp32 products throughout (no TF32).

``_mixture_kernel`` serves two products, the same weights times vectors, summed over one side or the other:

    out[row]     = sum_codes P[row, code] table[code]      (here)
    dtable[code] = sum_rows  P[row, code] G[row]           (the backward pass, :mod:`.dual_readout`)

Runs under Triton's interpreter in the tests; compiled, but never run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def load_block(base, row, rows, column, columns):
    """[row, column] of a contiguous matrix of `columns` columns, zeros outside."""
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(base + row[:, None].to(tl.int64) * columns + column[None, :], mask=mask, other=0.0)


@triton.jit
def scores(own, other, own_bias, other_bias, live, scale, OWNS_ROWS: tl.constexpr):
    """Logits [own, other], -inf where `other` is not live; the bias is the code's, whichever side holds the codes."""
    product = tl.dot(own, tl.trans(other), input_precision="ieee")
    if OWNS_ROWS:
        product += other_bias[None, :]
    else:
        product += own_bias[:, None]
    return tl.where(live[None, :], scale * product, float("-inf"))


@triton.jit
def weights(own, other, own_shift, other_shift, live, scale, OWNS_ROWS: tl.constexpr):
    """P [own, other] = exp(scale (z . e + bias) - lse); a row's shift is its lse, a code's its bias."""
    score = scores(own, other, own_shift, other_shift, live, scale, OWNS_ROWS)
    if OWNS_ROWS:
        return tl.exp(score - own_shift[:, None])
    else:
        return tl.exp(score - other_shift[None, :])


# One binary for every number of vectors, here and below.
@triton.jit(do_not_specialize=["n"])
def _lse_kernel(z, codebook, bias, lse, n, k, d, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Online log-sum-exp of BLOCK rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, WIDTH)
    own = load_block(z, row, n, lane, d)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, k, BLOCK):
        code = start + tl.arange(0, BLOCK)
        other = load_block(codebook, code, k, lane, d)
        other_bias = tl.load(bias + code, mask=code < k, other=0.0)
        score = scores(own, other, other_bias, other_bias, code < k, scale, True)
        higher = tl.maximum(top, tl.max(score, axis=1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(score - higher[:, None]), axis=1)
        top = higher
    tl.store(lse + row, top + tl.log(total), mask=row < n)


@triton.jit(do_not_specialize=["own_count", "other_count"])
def _mixture_kernel(
    own_vectors,
    other_vectors,
    own_shifts,
    other_shifts,
    values,
    out,
    own_count,
    other_count,
    d,
    c,
    scale,
    OWNS_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out [own, columns] = sum over the other side of P times its values."""
    owner = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    lane = tl.arange(0, WIDTH)
    own = load_block(own_vectors, owner, own_count, lane, d)
    own_shift = tl.load(own_shifts + owner, mask=owner < own_count, other=0.0)
    accumulator = tl.zeros([BLOCK, BLOCK_COLUMNS], dtype=tl.float32)
    for start in range(0, other_count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        other = load_block(other_vectors, index, other_count, lane, d)
        other_shift = tl.load(other_shifts + index, mask=index < other_count, other=0.0)
        weight = weights(own, other, own_shift, other_shift, index < other_count, scale, OWNS_ROWS)
        value = load_block(values, index, other_count, column, c)
        accumulator = tl.dot(weight, value, accumulator, input_precision="ieee")
    mask = (owner < own_count)[:, None] & (column < c)[None, :]
    tl.store(out + owner[:, None].to(tl.int64) * c + column[None, :], accumulator, mask=mask)


def block_sizes(d: int) -> dict[str, int]:
    """Launch options that leave room for vectors of width d."""
    width = max(16, triton.next_power_of_2(d))
    # One stage where tiles are wide: copies for a software pipeline would not fit a consumer GPU's shared memory.
    stages = 2 if width <= 64 else 1
    return {"WIDTH": width, "BLOCK": 64 if width <= 64 else 32 if width <= 256 else 16, "num_stages": stages}


def mixture(
    own: torch.Tensor,
    other: torch.Tensor,
    own_shift: torch.Tensor,
    other_shift: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    owns_rows: bool,
) -> torch.Tensor:
    """Launches ``_mixture_kernel``: (own count, C)."""
    out = values.new_empty(own.shape[0], values.shape[1])
    sizes = block_sizes(own.shape[1])
    grid = (triton.cdiv(own.shape[0], sizes["BLOCK"]), triton.cdiv(values.shape[1], 64))
    if own.shape[0]:
        _mixture_kernel[grid](
            own,
            other,
            own_shift,
            other_shift,
            values,
            out,
            own.shape[0],
            other.shape[0],
            own.shape[1],
            values.shape[1],
            scale,
            OWNS_ROWS=owns_rows,
            **sizes,
            BLOCK_COLUMNS=64,
            num_warps=4,
        )
    return out


def soft_readout(
    z: torch.Tensor, codebook: torch.Tensor, bias: torch.Tensor, table: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(softmax_k(scale (z . e + bias)) @ table (N, C), lse (N,)); contiguous fp32 operands."""
    n, d = z.shape
    lse = z.new_empty(n)
    sizes = block_sizes(d)
    if n:
        _lse_kernel[(triton.cdiv(n, sizes["BLOCK"]),)](
            z, codebook, bias, lse, n, codebook.shape[0], d, scale, **sizes, num_warps=4
        )
    return mixture(z, codebook, lse, bias, table, scale, True), lse
