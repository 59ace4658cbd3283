"""Several image tokens per row, in one call.

Step s = 0, 1, … of image b, whose first token to be drawn is that at t = positions[b] + s, of its row n = token_rows[b]
of the table ``tokens``; its rows are b and, if it is guided, uncond_rows[b]::

    logits = decode_step(..., positions = t - 1, tokens = tokens[n, t - 1])     for all rows of all images
    tokens[n, t] = sample_tokens(logits, ..., seeds[b], t)                      Philox noise

or, without seeds, with the noise that :mod:`gear_engine.ops.torch_exponential` draws for a step, (B, V).

The compiled one makes the calls of :mod:`gear_engine.ops.decode_step` and :mod:`gear_engine.ops.sample_tokens`, so that
the tokens are equal. What it saves is Python between them: a step streams all weights through the caches, after which
Python's own memory is cold.

Source: GEAR ``models/generate.py``.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch

from gear_engine.ops import backends, decode_step, native, sample_tokens, torch_exponential
from gear_engine.ops.decode_attention import FP8
from gear_engine.ops.decode_step import Cache, Model, ModelWords
from gear_engine.ops.sample_tokens import SamplingTable

__all__ = ["decode_steps", "reference"]


def decode_steps(
    weights: Model,
    cache: Cache,
    n_head: int,
    norm_eps: float,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    token_rows: torch.Tensor,
    positions: torch.Tensor,
    table: SamplingTable,
    steps: int,
    *,
    seeds: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    seconds: float = math.inf,
    backend: str = "auto",
) -> tuple[int, bool]:
    """The module's formula, checked, by the chosen backend.

    Args:
        weights, cache, n_head, norm_eps: as in :func:`gear_engine.ops.decode_step.decode_step`.
        slots: int64 (R,), distinct: conditional rows of the B images, then the unconditional ones.
        tokens: int64 (N, L), contiguous: the table that tokens are read from and written to.
        token_rows: int64 (B,), distinct: an image's row of the table.
        positions: int64 (B,), at least 1: index of the image token to be drawn first.
        table: the images' settings; R rows, all images draw.
        steps: how many to make, at least 1.
        seeds: int64 (B,): Philox keys; None draws from ``generator``.
        generator: a torch generator, which ends where the steps made leave it; None means torch's default one.
        seconds: no step begins once so many seconds have passed since the call, but for the first.
        backend: as in :func:`gear_engine.ops.backends.resolve`.

    Returns:
        The number of steps made, and whether all their logits were finite.

    Raises:
        ValueError: a tensor's dtype, shape or layout does not fit, or ``steps`` is less than 1.
        IndexError: a token, slot, row or position of any step does not exist; nothing was written.
    """
    for name, index, length in (
        ("slots", slots, table.rows),
        ("token_rows", token_rows, table.images),
        ("positions", positions, table.images),
        ("seeds", seeds, table.images),
    ):
        if index is not None and (index.shape != (length,) or index.dtype != torch.int64):
            raise ValueError(f"{name} must be int64 ({length},)")
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or not tokens.is_contiguous():
        raise ValueError("tokens must be a contiguous int64 table")
    if table.draws is not None:
        raise ValueError("all images must draw")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    dtype = weights.tok_embeddings.dtype
    run = backends.resolve("decode_steps", cache.kv.device, dtype, backend, other=cache.kv.dtype).load()
    draws: dict[str, Any] = {"seeds": seeds, "generator": generator}
    out: tuple[int, bool] = run(
        weights, cache, n_head, norm_eps, slots, tokens, token_rows, positions, table, steps, **draws, seconds=seconds
    )
    return out


def reference(
    weights: Model,
    cache: Cache,
    n_head: int,
    norm_eps: float,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    token_rows: torch.Tensor,
    positions: torch.Tensor,
    table: SamplingTable,
    steps: int,
    *,
    seeds: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    seconds: float = math.inf,
) -> tuple[int, bool]:
    """The references of the parts, one after the other; makes all steps, however long they take."""
    guided = (table.uncond_rows >= 0).nonzero().flatten()
    owners = torch.arange(table.rows, device=slots.device)  # [R], the image of every row
    owners[table.uncond_rows[guided]] = guided
    finite = True
    for drawn in range(steps):
        at = positions + drawn  # [B]
        fed = at[owners] - 1  # [R]
        given = tokens[token_rows[owners], fed]
        logits = decode_step.reference(weights, cache, n_head, norm_eps, slots, fed, given)
        noise = None
        if seeds is None and not bool(table.greedy.all()):
            noise = torch.empty(table.images, logits.shape[1], dtype=torch.float32, device=logits.device)
            torch_exponential.reference(noise, generator)
        tokens[token_rows, at] = sample_tokens.reference(logits, table, noise=noise, seeds=seeds, positions=at)
        finite = finite and bool(torch.isfinite(logits).all())
    return steps, finite


class _Steps:
    """Compiled. An image's tokens depend on the image, its slots' caches and the weights only."""

    def __init__(self) -> None:
        self._words = ModelWords()

    def __call__(
        self,
        weights: Model,
        cache: Cache,
        n_head: int,
        norm_eps: float,
        slots: torch.Tensor,
        tokens: torch.Tensor,
        token_rows: torch.Tensor,
        positions: torch.Tensor,
        table: SamplingTable,
        steps: int,
        *,
        seeds: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        seconds: float = math.inf,
    ) -> tuple[int, bool]:
        slots, token_rows = slots.contiguous(), token_rows.contiguous()
        positions = positions.contiguous()
        seeds = None if seeds is None else seeds.contiguous()
        with torch_exponential.moving(generator) if seeds is None else nullcontext() as state:
            made, finite = native.cpu_kernels().decode_steps_cpu(
                self._words.address(weights, cache, n_head), norm_eps, steps, seconds, table.rows, slots.data_ptr(),
                tokens.data_ptr(), *tokens.shape, table.images, token_rows.data_ptr(), positions.data_ptr(),
                table.uncond_rows.data_ptr(), table.cfg_scale.data_ptr(), table.temperature.data_ptr(),
                table.top_k.data_ptr(), table.top_p.data_ptr(), table.greedy.data_ptr(),
                0 if seeds is None else seeds.data_ptr(), 0 if state is None else state.data_ptr(),
            )  # fmt: skip
        return made, finite


backends.register("decode_steps", "reference", lambda: reference)
backends.register(
    "decode_steps",
    "cpu",
    _Steps,
    devices=frozenset({"cpu"}),
    dtypes=frozenset({torch.float32, torch.bfloat16, FP8}),
    unavailable=lambda: native.unavailable("decode_steps_cpu"),
)
