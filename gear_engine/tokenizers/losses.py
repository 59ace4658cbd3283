"""Entropy regulariser of the quantizers' training mode."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

__all__ = ["entropy_loss"]

_EPS = 1e-5


def _mean_over_ranks(local: torch.Tensor) -> torch.Tensor:
    """Average over all ranks in the forward pass; the gradient flows through the local value only.

    Data-parallel training averages gradients over the ranks afterwards, which makes the result exact.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return local
    with torch.no_grad():
        mean = local.detach().clone()
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return local + (mean - local).detach()


def entropy_loss(affinity: torch.Tensor, temperature: float = 0.01) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sample entropy minus entropy of the average assignment.

    With p = softmax(affinity / temperature) per row and m = mean of p over rows (and ranks):
    ``sample = mean_rows(-sum p log p)``, ``average = -sum m log(m + 1e-5)``, ``total = sample - average``. A low sample
    entropy makes assignments confident, a high average entropy keeps the codebook in use.

    Args:
        affinity: [..., K], larger is closer.
        temperature: softmax temperature.

    Returns:
        (total, sample, average), scalars. As in Tencent-Hunyuan/GEAR's tokenizers.
    """
    logits = affinity.reshape(-1, affinity.shape[-1]) / temperature
    probs = F.softmax(logits, dim=-1)
    log_probs = F.log_softmax(logits, dim=-1)
    sample = -(probs * log_probs).sum(dim=-1).mean()
    mean_probs = _mean_over_ranks(probs.mean(dim=0))
    average = -(mean_probs * torch.log(mean_probs + _EPS)).sum()
    return sample - average, sample, average
