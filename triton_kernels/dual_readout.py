"""Gradients of the soft read-out, in Triton; forward is :mod:`.soft_readout`.

The contract is that of :mod:`gear_engine.ops.dual_readout`. One kernel gives dz and, with the sides exchanged, de and
dbias: a program owns BLOCK rows (codes) and walks over the codes (rows), computing P and dS again. Each gradient is
then written once, in a fixed order: equal bits in every run, at the price of computing G . table^T twice. (Adding to
shared gradients with atomics would compute it once, and round in another order each time.)

Runs under Triton's interpreter in the tests; compiled, but never run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gear_engine.triton_kernels.soft_readout import block_sizes, load_block, mixture, weights


# One binary for every number of vectors.
@triton.jit(do_not_specialize=["own_count", "other_count"])
def _score_gradient_kernel(
    own_vectors,
    other_vectors,
    own_shifts,
    other_shifts,
    own_values,
    other_values,
    deltas,
    out,
    totals,
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
    """out [own, d] = sum over the other side of dS times its vectors; totals [own] = sum of dS, of codes only."""
    owner = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, WIDTH)
    own = load_block(own_vectors, owner, own_count, lane, d)
    own_shift = tl.load(own_shifts + owner, mask=owner < own_count, other=0.0)
    accumulator = tl.zeros([BLOCK, WIDTH], dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, other_count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        other = load_block(other_vectors, index, other_count, lane, d)
        other_shift = tl.load(other_shifts + index, mask=index < other_count, other=0.0)
        weight = weights(own, other, own_shift, other_shift, index < other_count, scale, OWNS_ROWS)
        # G . table^T, in either orientation
        product = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
        for first in range(0, c, BLOCK_COLUMNS):
            column = first + tl.arange(0, BLOCK_COLUMNS)
            left = load_block(own_values, owner, own_count, column, c)
            right = load_block(other_values, index, other_count, column, c)
            product = tl.dot(left, tl.trans(right), product, input_precision="ieee")
        if OWNS_ROWS:
            delta = tl.load(deltas + owner, mask=owner < own_count, other=0.0)[:, None]
        else:
            delta = tl.load(deltas + index, mask=index < other_count, other=0.0)[None, :]
        d_scores = scale * weight * (product - delta)
        accumulator = tl.dot(d_scores, other, accumulator, input_precision="ieee")
        total += tl.sum(d_scores, axis=1)
    mask = (owner < own_count)[:, None] & (lane < d)[None, :]
    tl.store(out + owner[:, None].to(tl.int64) * d + lane[None, :], accumulator, mask=mask)
    if not OWNS_ROWS:
        tl.store(totals + owner, total, mask=owner < own_count)


def _launch(
    own: torch.Tensor,
    other: torch.Tensor,
    own_shift: torch.Tensor,
    other_shift: torch.Tensor,
    own_values: torch.Tensor,
    other_values: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
    owns_rows: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (own count, d), totals (own count,), not written for rows)."""
    out, totals = torch.empty_like(own), own.new_empty(own.shape[0])
    sizes = block_sizes(own.shape[1])
    if own.shape[0]:
        _score_gradient_kernel[(triton.cdiv(own.shape[0], sizes["BLOCK"]),)](
            own,
            other,
            own_shift,
            other_shift,
            own_values,
            other_values,
            delta,
            out,
            totals,
            own.shape[0],
            other.shape[0],
            own.shape[1],
            own_values.shape[1],
            scale,
            OWNS_ROWS=owns_rows,
            **sizes,
            BLOCK_COLUMNS=32,
            num_warps=4,
        )
    return out, totals


def dual_readout(
    grad: torch.Tensor,
    delta: torch.Tensor,
    lse: torch.Tensor,
    z: torch.Tensor,
    codebook: torch.Tensor,
    bias: torch.Tensor,
    table: torch.Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The backward pass: gradients of z, codebook, bias and table, None where ``needs`` says no.

    Contiguous fp32: grad G (N, C), delta = rowsum(G * out) (N,), lse (N,), z (N, d), codebook (K, d), bias (K,), table
    (K, C); ``needs`` is for z, codebook (and bias) and table.
    """
    dz = dcodebook = dbias = dtable = None
    if needs[0]:
        dz, _ = _launch(z, codebook, lse, bias, grad, table, delta, scale, True)
    if needs[1]:
        dcodebook, dbias = _launch(codebook, z, bias, lse, table, grad, delta, scale, False)
    if needs[2]:
        dtable = mixture(codebook, z, bias, lse, grad, scale, False)
    return dz, dcodebook, dbias, dtable
