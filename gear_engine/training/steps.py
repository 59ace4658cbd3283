"""One optimizer step of each stage. Source: Tencent-Hunyuan/GEAR ``src/train_{tokenizer,gear,ar}.py``.

The joint step reads one assignment twice. The hard indices, integers, train the generator (next-token cross-entropy and
alignment). The soft read-out goes through the frozen generator up to the tapped block; the alignment there, with the
usual tokenizer losses, trains the tokenizer. Three updates in this order: tokenizer, discriminator, generator.

Every step returns scalars for the log, by the official names where there are such.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F

from gear_engine.training.data import Batch
from gear_engine.training.losses import (
    adaptive_weight,
    alignment_loss,
    hinge_loss,
    lecam_loss,
    quantizer_losses,
    reconstruction_loss,
    spatial_norm,
)
from gear_engine.training.modules import Dropout, GeneratorPass, TokenizerOutput, frozen
from gear_engine.training.optimizers import update_average
from gear_engine.training.state import TrainState

__all__ = ["Scalars", "generator_step", "joint_step", "run_step", "tokenizer_step"]

#: Name -> scalar tensor, without a gradient. ``indices`` [B, L] is the one exception.
Scalars = dict[str, torch.Tensor]


def run_step(state: TrainState, batch: Batch) -> Scalars:
    """One step of the run's stage; ``state.step`` counts it."""
    step = {"tokenizer": tokenizer_step, "joint": joint_step, "generator": generator_step}[state.config.stage]
    scalars = step(state, batch)
    state.step += 1
    return scalars


def tokenizer_step(state: TrainState, batch: Batch) -> Scalars:
    """Stage 0: the tokenizer by reconstruction, perceptual, quantizer and adversarial losses; the discriminator."""
    images = _pixels(state, batch)
    with _autocast(state):
        output: TokenizerOutput = state.passes["vq"](images)
    total, scalars = _tokenizer_loss(state, images, output)
    total.backward()
    scalars |= {"vq_total": total.detach(), "grad_norm_vq": state.optimizers["vq"].step()}
    scalars |= _discriminator_update(state, images, output.restored.detach())
    update_average(state.tokenizer_ema, state.tokenizer, state.config.optimizer.ema_decay)
    return scalars | {"indices": output.indices}


def joint_step(state: TrainState, batch: Batch) -> Scalars:
    """Stage 1; see the module's docstring."""
    config = state.config
    assert state.generator is not None and state.generator_ema is not None
    images, target = _pixels(state, batch), _target(state, batch)
    generator_pass = cast(GeneratorPass, _bare(state.passes["ar"]))
    labels = batch.labels.to(state.device)
    with _autocast(state):
        output: TokenizerOutput = state.passes["vq"](images, state.generator.tok_embeddings.weight.detach())
        _, projected = frozen(generator_pass, labels, embedded=output.soft, tap_only=True)
    total, scalars = _tokenizer_loss(state, images, output)
    alignment = alignment_loss(projected.to(target.dtype), target)
    total = total + config.alignment.tokenizer_weight * alignment
    total.backward()
    scalars |= {
        "proj_loss_vq": alignment.detach(),
        "vq_total": total.detach(),
        "grad_norm_vq": state.optimizers["vq"].step(),
    }
    scalars |= _discriminator_update(state, images, output.restored.detach())
    scalars |= _generator_update(state, batch, output.indices, target)
    update_average(state.generator_ema, state.generator, config.optimizer.ema_decay)
    update_average(state.tokenizer_ema, state.tokenizer, config.optimizer.ema_decay)
    return scalars | {"indices": output.indices}


def generator_step(state: TrainState, batch: Batch) -> Scalars:
    """Stage 2, and with an alignment the LlamaGen-REPA baseline: the generator on the frozen tokenizer's indices."""
    assert state.generator is not None and state.generator_ema is not None
    images = _pixels(state, batch)
    target = _target(state, batch) if state.targets is not None else None
    with torch.no_grad():
        indices = state.tokenizer.encode(images)[2][2].view(images.shape[0], -1)
    scalars = _generator_update(state, batch, indices, target)
    update_average(state.generator_ema, state.generator, state.config.optimizer.ema_decay)
    return scalars | {"indices": indices}


# ---- parts -----------------------------------------------------------------------------------------------------------


def _pixels(state: TrainState, batch: Batch) -> torch.Tensor:
    """uint8 -> [-1, 1]."""
    return batch.images.to(state.device, non_blocking=True).to(state.dtype) / 127.5 - 1.0


def _target(state: TrainState, batch: Batch) -> torch.Tensor:
    """Features [B, L, D] that hidden states are aligned with."""
    assert state.targets is not None
    alignment = state.config.alignment
    with torch.no_grad(), _autocast(state):
        features = state.targets.targets(batch.images.to(state.device))
    return spatial_norm(features.to(state.dtype), alignment.spatial_norm, alignment.spatial_norm_alpha)


def _autocast(state: TrainState) -> torch.autocast:
    return torch.autocast(state.device.type, torch.bfloat16, enabled=state.config.precision == "bf16")


def _bare(module: torch.nn.Module) -> torch.nn.Module:
    wrapped = isinstance(module, torch.nn.parallel.DistributedDataParallel)
    return module.module if wrapped else module  # type: ignore[return-value]


def _tokenizer_loss(state: TrainState, images: torch.Tensor, output: TokenizerOutput) -> tuple[torch.Tensor, Scalars]:
    """The tokenizer's total without the alignment, in the weights' dtype."""
    loss = state.config.loss
    restored = output.restored.to(state.dtype)
    rec = loss.reconstruction_weight * reconstruction_loss(images, restored, loss.reconstruction)
    zero = rec.new_zeros(())
    perceptual = zero if state.perceptual is None else loss.perceptual_weight * state.perceptual(images, restored)
    quantizer = quantizer_losses(output.diff, rec)
    adversarial, weight = zero, zero
    if loss.adversarial_weight > 0 and state.step >= loss.adversarial_start:
        assert state.discriminator is not None
        adversarial = -frozen(state.discriminator, restored).mean()
        weight = rec.new_tensor(loss.adversarial_weight)
        if loss.adaptive:
            weight = weight * _mean_over_ranks(
                state, adaptive_weight(rec + perceptual, adversarial, state.tokenizer.decoder.last_layer)
            )
    total = rec + perceptual + loss.quantizer_weight * quantizer.total + weight * adversarial
    scalars = {
        "reconstruction_loss": rec,
        "perceptual_loss": perceptual,
        "vq_loss": quantizer.codebook,
        "commit_loss": quantizer.commitment,
        "entropy_loss": quantizer.entropy,
        "sample_entropy": quantizer.sample_entropy,
        "avg_entropy": quantizer.average_entropy,
        "gan_loss": adversarial,
        "gan_weight": weight,
    }
    return total, {name: value.detach() for name, value in scalars.items()}


def _discriminator_update(state: TrainState, images: torch.Tensor, restored: torch.Tensor) -> Scalars:
    """Hinge loss on real and restored images, plus LeCam regularisation."""
    loss = state.config.loss
    optimizer = state.optimizers["disc"]
    if loss.adversarial_weight == 0:
        return {}
    started = state.step >= loss.adversarial_start
    if not started and loss.lecam_weight == 0:
        optimizer.step_without_loss()
        return {}
    real, fake = state.passes["disc"](images, restored.to(state.dtype))
    # Officially the regularisation does not wait for the start.
    total = hinge_loss(real, fake) if started else real.new_zeros(())
    if loss.lecam_weight > 0:
        local = torch.stack((real.mean(), fake.mean()))
        # The mean over all processes forward, this one's gradient backward: averaged over them it is the whole's.
        means = local + _mean_over_ranks(state, local.detach().clone()) - local.detach()
        total = total + loss.lecam_weight * lecam_loss(means[0], means[1], state.lecam)
        state.lecam = loss.lecam_decay * state.lecam + (1 - loss.lecam_decay) * means.detach()
    total.backward()
    return {
        "d_loss": total.detach(),
        "logits_real": real.detach().mean(),
        "logits_fake": fake.detach().mean(),
        "grad_norm_disc": optimizer.step(),
    }


def _generator_update(state: TrainState, batch: Batch, indices: torch.Tensor, target: torch.Tensor | None) -> Scalars:
    """Next-token cross-entropy and alignment; generator and projectors move, nothing else."""
    settings = state.config.generator
    assert settings is not None and state.generator is not None
    labels = batch.labels.to(state.device)
    drops = batch.drops.to(state.device) < settings.label_dropout
    labels = torch.where(drops, state.generator.config.num_classes, labels)
    with _autocast(state):
        logits, projected = state.passes["ar"](
            labels, tokens=indices[:, :-1], dropout=Dropout(settings.token_dropout, settings.dropout)
        )
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), indices.flatten())
    total = cross_entropy
    scalars: dict[str, Any] = {"ce_loss": cross_entropy.detach()}
    if target is not None:
        alignment = alignment_loss(projected.to(target.dtype), target)
        total = total + state.config.alignment.generator_weight * alignment
        scalars["proj_loss_ar"] = alignment.detach()
    total.backward()
    return scalars | {"ar_total": total.detach(), "grad_norm_ar": state.optimizers["ar"].step()}


def _mean_over_ranks(state: TrainState, value: torch.Tensor) -> torch.Tensor:
    if state.world.size > 1:
        torch.distributed.all_reduce(value)
        value = value / state.world.size
    return value
