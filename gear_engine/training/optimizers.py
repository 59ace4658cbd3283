"""Optimizers, learning-rate schedules and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from gear_engine.training.sections import OptimizerConfig

__all__ = ["Optimizer", "make_optimizer", "rate_factor", "update_average"]


def rate_factor(settings: OptimizerConfig, steps: int) -> Callable[[int], float]:
    """Step (from 0) -> factor of the learning rate: linear warm-up from 0, then constant or cosine."""
    warmup = settings.warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        if settings.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return settings.final_ratio + (1 - settings.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


@dataclass
class Optimizer:
    """AdamW over some parameters, its schedule, and the clipping before each step."""

    parameters: list[nn.Parameter]
    adamw: torch.optim.AdamW
    schedule: LambdaLR
    max_grad_norm: float

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.adamw.param_groups[0]["lr"])

    def step(self) -> torch.Tensor:
        """One step with the gradients at hand, which are then dropped; returns their total norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm, foreach=True)
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def step_without_loss(self) -> None:
        """What a step with a loss of zero does: nothing to the weights, one count more for AdamW's bias correction."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.step()


def make_optimizer(parameters: Iterable[nn.Parameter], rate: float, settings: OptimizerConfig, steps: int) -> Optimizer:
    """AdamW as the official trainers set it up. The fused form keeps the weights' and moments' passes in one."""
    kept = list(parameters)
    adamw = torch.optim.AdamW(
        kept,
        lr=rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    return Optimizer(kept, adamw, LambdaLR(adamw, rate_factor(settings, steps)), settings.max_grad_norm)


@torch.no_grad()
def update_average(average: nn.Module, live: nn.Module, decay: float) -> None:
    """``average = decay * average + (1 - decay) * live`` for all parameters and float buffers; others are copied."""
    kept, new = _floats(average), _floats(live)
    torch._foreach_mul_(kept, decay)
    torch._foreach_add_(kept, new, alpha=1 - decay)
    for old, buffer in zip(average.buffers(), live.buffers(), strict=True):
        if not buffer.is_floating_point():
            old.copy_(buffer)


def _floats(module: nn.Module) -> list[torch.Tensor]:
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    return [*(parameter.data for parameter in module.parameters()), *buffers]
