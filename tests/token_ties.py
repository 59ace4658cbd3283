"""When two runs may differ: only where two tokens' scores are as good as equal.

Fp32 sums round differently in another batch or kernel, so a draw can flip when log p - log q of two tokens lie within
1e-4 of each other (scaled by cfg_scale / 4 above 4: guidance amplifies rounding). Everything after such a token differs
for good, so only the first difference of an image is looked at.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gear_engine.ops import philox
from gear_engine.ops.sample_tokens import SamplingTable, filter_logits
from gear_engine.request import SamplingParams

__all__ = ["count_ties", "philox_scores"]


def philox_scores(
    cond: torch.Tensor, uncond: torch.Tensor | None, params: SamplingParams, seed: int, position: int
) -> torch.Tensor:
    """log p - log q (V,) of the draw of image token ``position`` from logits (V,)."""
    logits = cond
    if uncond is not None and params.guided_at(position):
        logits = uncond + (cond - uncond) * params.cfg_scale
    logits = logits / max(params.temperature, 1e-5)
    table = SamplingTable.build([params], [False], len(logits), logits.device)
    scores = filter_logits(logits[None], table)[0].log_softmax(-1)
    if not params.sample_logits:
        return scores
    noise = philox.reference(torch.tensor([seed]), torch.tensor([position]), len(logits))[0]
    return scores - noise.log()


def count_ties(
    first: torch.Tensor,
    second: torch.Tensor,
    params: SamplingParams,
    scores: Callable[[torch.Tensor], torch.Tensor],
) -> int:
    """0 if two token rows (n,) are equal, 1 if they first differ at a tie; fails otherwise.

    ``scores(tokens)`` gives log p - log q (V,) of the token after ``tokens``.
    """
    different = (first != second).nonzero()
    if len(different) == 0:
        return 0
    position = int(different[0])
    at = scores(first[:position])
    gap = abs(float(at[int(first[position])] - at[int(second[position])]))
    limit = 1e-4 * max(1.0, params.cfg_scale / 4)
    assert gap <= limit, f"tokens differ at {position} with scores {gap} apart (a tie is up to {limit})"
    return 1
