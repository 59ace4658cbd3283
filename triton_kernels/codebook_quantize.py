"""Nearest code of every latent vector, in Triton: running best in registers, no N x K array.

The contract is that of :mod:`gear_engine.ops.codebook_quantize`. One program owns BLOCK_ROWS vectors and walks the
codebook in blocks; inner products are chains of fused multiply-adds in ascending order of the dimension, on the CUDA
cores, so that near-ties fall as the contract says. (A tensor-core product would round otherwise: it may only propose.)

``inner_product`` takes two walks: the maximum first, then the lowest index within 2^-25 of it, where exp() rounds to 1.
Of scores that are no numbers the first wins, as in torch: each counts as the best there is.

Runs under Triton's interpreter in the tests, where a fused multiply-add is rounded twice; not yet timed on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _products(
    z_t, codebook_t, row, code, n, k, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CODES: tl.constexpr
):
    """z . e of a block, [BLOCK_ROWS, BLOCK_CODES]; operands are stored transposed, so that loads coalesce."""
    product = tl.zeros([BLOCK_ROWS, BLOCK_CODES], dtype=tl.float32)
    for i in range(WIDTH):
        z = tl.load(z_t + i * n + row, mask=row < n, other=0.0)
        e = tl.load(codebook_t + i * k + code, mask=code < k, other=0.0)
        z_block, e_block = tl.broadcast(z[:, None], e[None, :])
        product = tl.fma(z_block, e_block, product)
    return product


# One binary for every number of vectors.
@triton.jit(do_not_specialize=["n"])
def _codebook_quantize_kernel(
    z_t,
    z_norm,
    codebook_t,
    code_norm,
    indices,
    n,
    k,
    INNER_PRODUCT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    lane = tl.arange(0, BLOCK_CODES)
    best = tl.full([BLOCK_ROWS], float("inf"), tl.float32)
    best_index = tl.full([BLOCK_ROWS], 0, tl.int32)

    if INNER_PRODUCT:
        # Phase 1: the largest product.
        for start in range(0, k, BLOCK_CODES):
            code = start + lane
            product = _products(z_t, codebook_t, row, code, n, k, WIDTH, BLOCK_ROWS, BLOCK_CODES)
            score = tl.where(product == product, -product, float("-inf"))
            best = tl.minimum(best, tl.min(tl.where((code < k)[None, :], score, float("inf")), axis=1))
        # Phase 2: the first code whose softmax numerator rounds to that of the largest.
        best_index = tl.full([BLOCK_ROWS], 2147483647, tl.int32)
        for start in range(0, k, BLOCK_CODES):
            code = start + lane
            product = _products(z_t, codebook_t, row, code, n, k, WIDTH, BLOCK_ROWS, BLOCK_CODES)
            equal = (-best[:, None] - product <= 2.9802322387695312e-08) & (code < k)[None, :]
            first = tl.min(tl.where(equal, code[None, :], 2147483647), axis=1)
            best_index = tl.minimum(best_index, first)
        # No code is near a largest product that is not finite: every p of the softmax is then NaN.
        best_index = tl.where(best_index < k, best_index, 0)
    else:
        norm = tl.load(z_norm + row, mask=row < n, other=0.0)
        for start in range(0, k, BLOCK_CODES):
            code = start + lane
            product = _products(z_t, codebook_t, row, code, n, k, WIDTH, BLOCK_ROWS, BLOCK_CODES)
            squares = norm[:, None] + tl.load(code_norm + code, mask=code < k, other=0.0)[None, :]
            distance = squares - 2 * product
            distance = tl.where(distance == distance, distance, float("-inf"))
            distance = tl.where((code < k)[None, :], distance, float("inf"))
            nearest = tl.min(distance, axis=1)
            first = tl.min(tl.where(distance == nearest[:, None], code[None, :], 2147483647), axis=1)
            # Strictly smaller only: an equal distance in a later block has a higher index.
            best_index = tl.where(nearest < best, first, best_index)
            best = tl.minimum(best, nearest)
    tl.store(indices + row, best_index.to(tl.int64), mask=row < n)


def codebook_quantize(
    z: torch.Tensor,
    z_norm: torch.Tensor,
    codebook: torch.Tensor,
    code_norm: torch.Tensor,
    inner_product: bool,
) -> torch.Tensor:
    """Launches the kernel. z (N, d), |z|^2 (N,), codebook (K, d), |e|^2 (K,), all fp32; returns int64 (N,)."""
    rows, width = z.shape
    indices = torch.empty(rows, dtype=torch.int64, device=z.device)
    if rows:
        block_rows, block_codes = 32, 128
        _codebook_quantize_kernel[(triton.cdiv(rows, block_rows),)](
            z.t().contiguous(),
            z_norm,
            codebook.t().contiguous(),
            code_norm,
            indices,
            rows,
            codebook.shape[0],
            INNER_PRODUCT=inner_product,
            WIDTH=width,
            BLOCK_ROWS=block_rows,
            BLOCK_CODES=block_codes,
            num_warps=4,
            # Sums round one by one; the fused multiply-adds are written out.
            enable_fp_fusion=False,
        )
    return indices
