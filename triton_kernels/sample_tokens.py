"""Guidance, temperature, exact top-k and top-p, and the draw, in Triton: one program per image, no sort.

The contract is that of :mod:`gear_engine.ops.sample_tokens`. A row of 16384 fp32 logits fits in one block's registers.
Both thresholds are found bit by bit over the logits mapped to integers of the same order (a radix search: 32 counts for
top-k, 32 masked sums for top-p), which is exact, ties included. The idea of filtering without a sort is FlashInfer's.

Runs under Triton's interpreter in the tests; not yet timed on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from gear_engine.triton_kernels.philox import exponential_noise

if TYPE_CHECKING:
    from gear_engine.ops.sample_tokens import SamplingTable, TokenSink


@triton.jit
def _ordered(x):
    """uint32 keys in the order of the fp32 numbers ``x``; +0 and -0 get the same key."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, ~bits, bits | -0x80000000)
    return flipped.to(tl.uint32, bitcast=True)


@triton.jit
def _sample_kernel(
    logits,
    noise,
    seeds,
    positions,
    cfg_scale,
    uncond_rows,
    temperature,
    top_k,
    top_p,
    greedy,
    draws,
    out,
    vocab_size,
    stride_logits,
    HAS_NOISE: tl.constexpr,
    HAS_DRAWS: tl.constexpr,
    ANY_TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0)
    if HAS_DRAWS:  # noqa: SIM102 (decided at compile time, unlike the inner one)
        if tl.load(draws + image) == 0:
            tl.store(out + image, tl.zeros([], dtype=tl.int64))
            return
    token = tl.arange(0, BLOCK)
    live = token < vocab_size
    lowest = float("-inf")

    # Phase 1: guidance and temperature.
    scores = tl.load(logits + image.to(tl.int64) * stride_logits + token, mask=live, other=lowest)
    uncond_row = tl.load(uncond_rows + image)
    if uncond_row >= 0:
        uncond = tl.load(logits + uncond_row * stride_logits + token, mask=live, other=0.0)
        scores = tl.where(live, uncond + (scores - uncond) * tl.load(cfg_scale + image), lowest)
    scores = tl.where(live, tl.div_rn(scores, tl.load(temperature + image) + tl.zeros_like(scores)), lowest)
    keys = _ordered(scores)

    # Phase 2: top-k. The largest key that at least k tokens reach is the k-th largest key.
    k = tl.load(top_k + image)
    keep = live
    if k < vocab_size:
        threshold = tl.zeros([1], dtype=tl.uint32)
        for bit in tl.static_range(32):
            candidate = threshold | (1 << (31 - bit))
            reached = tl.sum((live & (keys >= candidate)).to(tl.int32), axis=0)
            threshold = tl.where(reached >= k, candidate, threshold)
        keep = live & (keys >= threshold)

    # Phase 3: probabilities of what is left.
    best = tl.max(tl.where(keep, scores, lowest), axis=0)
    weights = tl.where(keep, tl.exp(scores - best), 0.0)
    probabilities = weights / tl.sum(weights, axis=0)

    # Phase 4: top-p. The largest key whose tokens and all larger ones weigh more than p is where the sum crosses; of
    # the tokens that tie there, in index order, those stay whose predecessors do not exceed p.
    if ANY_TOP_P:
        p = tl.load(top_p + image)
        if p < 1.0:
            threshold = tl.zeros([1], dtype=tl.uint32)
            for bit in tl.static_range(32):
                candidate = threshold | (1 << (31 - bit))
                mass = tl.sum(tl.where(keys >= candidate, probabilities, 0.0), axis=0)
                threshold = tl.where(mass > p, candidate, threshold)
            above = tl.sum(tl.where(keys > threshold, probabilities, 0.0), axis=0)
            ties = keep & (keys == threshold)
            weight_of_ties = tl.where(ties, probabilities, 0.0)
            before = above + tl.cumsum(weight_of_ties, axis=0) - weight_of_ties
            keep = keep & ((keys > threshold) | (ties & (before <= p)))
            probabilities = tl.where(keep, probabilities, 0.0)

    # Phase 5: an exponential race, or the largest probability; the lowest index of a tie.
    score = probabilities
    if tl.load(greedy + image) == 0:
        if HAS_NOISE:
            q = tl.load(noise + image.to(tl.int64) * vocab_size + token, mask=live, other=1.0)
        else:
            q = exponential_noise(tl.load(seeds + image), tl.load(positions + image), token)
        score = tl.div_rn(probabilities, q)
    score = tl.where(keep, score, -1.0)
    winner = tl.min(tl.where(score == tl.max(score, axis=0), token, BLOCK), axis=0)
    # Of scores that are no numbers none equals the largest; the next step looks the token up before anyone is told.
    tl.store(out + image, tl.where(winner < vocab_size, winner, 0).to(tl.int64))


def sample_tokens(
    logits: torch.Tensor,
    table: SamplingTable,
    *,
    noise: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    sink: TokenSink | None = None,
) -> torch.Tensor:
    """Launches the kernel; the arguments were checked by :func:`gear_engine.ops.sample_tokens.sample_tokens`."""
    images = table.images
    vocab_size = logits.shape[1]
    if logits.stride(-1) != 1:
        raise ValueError("the last dimension of the logits must be contiguous")
    if noise is None and (seeds is None or positions is None):
        if table.params is None or any(p.sample_logits for p in table.params):
            raise ValueError("an image that is drawn needs noise, or a seed and a position")
        seeds = positions = torch.zeros(images, dtype=torch.int64, device=logits.device)
    out = torch.empty(images, dtype=torch.int64, device=logits.device)
    block = max(triton.next_power_of_2(vocab_size), 16)
    _sample_kernel[(images,)](
        logits,
        logits if noise is None else noise.contiguous(),
        out if seeds is None else seeds,
        out if positions is None else positions,
        table.cfg_scale,
        table.uncond_rows,
        table.temperature,
        table.top_k,
        table.top_p,
        table.greedy,
        table.greedy if table.draws is None else table.draws,
        out,
        vocab_size,
        logits.stride(0),
        HAS_NOISE=noise is not None,
        HAS_DRAWS=table.draws is not None,
        ANY_TOP_P=table.params is None or any(p.top_p < 1 for p in table.params),
        BLOCK=block,
        num_warps=16 if block >= 8192 else 4,
        enable_fp_fusion=False,
    )
    return out if sink is None else sink.write(out, positions)
