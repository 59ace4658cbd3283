"""Quantizers: latent vectors -> code indices and code vectors, with distances for the soft read-out.

Every quantizer is called as the official ones: ``quantize(z [B, d, H, W], return_distance=False)`` returns
``(quant, diff, info)`` or ``(quant, diff, info, d)`` with

* ``quant`` [B, d, H, W]: the code vectors, with the quantizer's gradient estimator;
* ``diff = (vq_loss, commit_loss, entropy, usage)``: training losses (None or zeros in eval mode, as officially), where
  ``entropy = (scaled total, sample entropy, average entropy)``; ``usage`` is 0;
* ``info = (None, None, indices)``: int64 [B * H * W], with several groups [B * H * W * groups], group fastest;
* ``d`` [B * H * W (* groups), K]: ``softmax(-d / tau)`` is the soft assignment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from gear_engine.errors import InvalidRequestError
from gear_engine.ops.codebook_quantize import Metric, hard_indices
from gear_engine.ops.dual_readout import Distance
from gear_engine.tokenizers.losses import entropy_loss

__all__ = [
    "IndexBackpropQuantizer",
    "Quantizer",
    "VectorQuantizer",
    "soft_readout",
    "to_grid",
    "to_rows",
]


def to_rows(z: torch.Tensor) -> torch.Tensor:
    """[B, d, H, W] -> [B * H * W, d]."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def to_grid(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B * H * W, d] -> [B, d, H, W], the shape of ``like``."""
    batch, channels, height, width = like.shape
    return rows.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


class Quantizer(nn.Module):
    """What the three kinds share.

    Attributes:
        num_codes: values of one index.
        num_codebooks: indices per position.
        dim: width d of a latent vector.
        beta, entropy_loss_ratio, entropy_temperature: weights of the training losses; may be assigned.
    """

    def __init__(self, num_codes: int, num_codebooks: int, dim: int, entropy_loss_ratio: float) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.num_codebooks = num_codebooks
        self.dim = dim
        self.beta = 0.25
        self.entropy_loss_ratio = entropy_loss_ratio
        self.entropy_temperature = 0.01

    def distances(self, z: torch.Tensor) -> torch.Tensor:
        """d of the module's docstring, [B * H * W * num_codebooks, num_codes]; differentiable."""
        raise NotImplementedError

    def raw_codebook(self, like: torch.Tensor) -> tuple[torch.Tensor, Distance]:
        """What :func:`gear_engine.ops.dual_readout.dual_readout` takes: codes [K, d], with gradients, and the distance.

        Args:
            like: latent vectors; codes that are no parameter take its dtype and device.
        """
        raise NotImplementedError

    def codes_to_rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Code vectors [N, d] of int indices [N * num_codebooks] that are known to be in range."""
        raise NotImplementedError

    def check_codes(self, indices: torch.Tensor) -> None:
        """Refuses indices that are no integers or name no code.

        Raises:
            InvalidRequestError: wrong dtype, or an index outside [0, num_codes).
        """
        if indices.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
            raise InvalidRequestError(f"codes must be integers, got {indices.dtype}")
        if indices.numel() == 0:
            raise InvalidRequestError("there are no codes to decode")
        low, high = (int(bound) for bound in torch.aminmax(indices))
        if low < 0 or high >= self.num_codes:
            raise InvalidRequestError(f"codes must lie in [0, {self.num_codes}), got values from {low} to {high}")

    def get_codebook_entry(
        self, indices: torch.Tensor, shape: Sequence[int] | None = None, channel_first: bool = True
    ) -> torch.Tensor:
        """Code vectors of ``indices``.

        Args:
            indices: integers, B * H * W * num_codebooks of them in any shape, group fastest.
            shape: (B, d, H, W) of the result, or (B, H, W, d) if not ``channel_first``; None: [N, d].

        Raises:
            InvalidRequestError: codes out of range, or their number does not fit ``shape``.
        """
        self.check_codes(indices)
        if indices.numel() % self.num_codebooks:
            raise InvalidRequestError(f"{indices.numel()} codes are no multiple of {self.num_codebooks} per position")
        num_rows = indices.numel() // self.num_codebooks
        if shape is not None:
            batch, height, width, dim = _split_shape(shape, channel_first)
            if dim != self.dim or batch * height * width != num_rows:
                raise InvalidRequestError(
                    f"{indices.numel()} codes ({self.num_codebooks} per position) of width {self.dim} do not fill "
                    f"shape {tuple(shape)}"
                )
        rows = self.codes_to_rows(indices.reshape(-1).long())
        if shape is None:
            return rows
        grid = rows.view(batch, height, width, dim)
        return grid.permute(0, 3, 1, 2).contiguous() if channel_first else grid


def _split_shape(shape: Sequence[int], channel_first: bool) -> tuple[int, int, int, int]:
    """(batch, height, width, channels) of an official ``shape`` argument."""
    if len(shape) != 4:
        raise InvalidRequestError(f"shape must have four entries, got {tuple(shape)}")
    a, b, c, d = (int(size) for size in shape)
    return (a, c, d, b) if channel_first else (a, b, c, d)


class VectorQuantizer(Quantizer):
    """Nearest code by squared L2 distance, both sides L2-normalised if ``l2_norm`` (VQ-16, VQ-8).

    ``d = (|z|^2 + |e|^2) - 2 <z, e>`` in fp32 with the official rounding; index = argmin, lowest on ties;
    gradient: straight-through.
    """

    def __init__(self, num_codes: int, dim: int, l2_norm: bool) -> None:
        super().__init__(num_codes, 1, dim, entropy_loss_ratio=0.0)
        self.l2_norm = l2_norm
        self.embedding = nn.Embedding(num_codes, dim)

    def reset_parameters(self) -> None:
        """Uniform in +-1 / K, then normalised: the official initialisation."""
        with torch.no_grad():
            weight = self.embedding.weight.uniform_(-1.0 / self.num_codes, 1.0 / self.num_codes)
            if self.l2_norm:
                weight.copy_(F.normalize(weight, dim=-1))

    def codebook(self) -> torch.Tensor:
        weight = self.embedding.weight
        return F.normalize(weight, p=2, dim=-1) if self.l2_norm else weight

    def raw_codebook(self, like: torch.Tensor) -> tuple[torch.Tensor, Distance]:
        return self.embedding.weight, "l2_normalized" if self.l2_norm else "l2"

    def _normalised_rows(self, z: torch.Tensor) -> torch.Tensor:
        rows = to_rows(z)
        return F.normalize(rows, p=2, dim=-1) if self.l2_norm else rows

    @staticmethod
    def _squared_distances(rows: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        # einsum, not mm: the reduction order of the official product decides near-ties.
        product = torch.einsum("bd,dn->bn", rows, codebook.t())
        return torch.sum(rows**2, dim=1, keepdim=True) + torch.sum(codebook**2, dim=1) - 2 * product

    def distances(self, z: torch.Tensor) -> torch.Tensor:
        return self._squared_distances(self._normalised_rows(z), self.codebook())

    def codes_to_rows(self, indices: torch.Tensor) -> torch.Tensor:
        return self.codebook()[indices]

    def forward(self, z: torch.Tensor, return_distance: bool = False) -> tuple[Any, ...]:
        rows, codebook = self._normalised_rows(z), self.codebook()
        distance = None
        if self.training or return_distance:
            distance = self._squared_distances(rows, codebook)
            indices = torch.argmin(distance, dim=1)
        else:
            metric: Metric = "l2_normalized" if self.l2_norm else "l2"
            indices = hard_indices(to_rows(z).detach(), self.embedding.weight.detach(), metric)
        selected = codebook[indices]
        vq_loss = commit_loss = entropy = None
        if self.training:
            assert distance is not None
            vq_loss = torch.mean((selected - rows.detach()) ** 2)
            commit_loss = self.beta * torch.mean((selected.detach() - rows) ** 2)
            total, sample, average = entropy_loss(-distance, self.entropy_temperature)
            entropy = (self.entropy_loss_ratio * total, sample, average)
        quant = to_grid(rows + (selected - rows).detach(), z)
        out = (quant, (vq_loss, commit_loss, entropy, 0), (None, None, indices))
        return (*out, distance) if return_distance else out


class IndexBackpropQuantizer(Quantizer):
    """Largest inner product (IBQ-16): ``d = -<z, e>``, index = argmax softmax(-d), lowest on ties.

    Gradient by index backpropagation: forward the hard one-hot assignment, backward the softmax over all codes.
    """

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__(num_codes, 1, dim, entropy_loss_ratio=1.0)
        self.embedding = nn.Embedding(num_codes, dim)

    def distances(self, z: torch.Tensor) -> torch.Tensor:
        return -(to_rows(z) @ self.embedding.weight.t())

    def raw_codebook(self, like: torch.Tensor) -> tuple[torch.Tensor, Distance]:
        return self.embedding.weight, "inner_product"

    def codes_to_rows(self, indices: torch.Tensor) -> torch.Tensor:
        return self.embedding(indices)  # type: ignore[no-any-return]

    def forward(self, z: torch.Tensor, return_distance: bool = False) -> tuple[Any, ...]:
        rows, weight = to_rows(z), self.embedding.weight
        needs_grad = torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)
        logits = None
        if needs_grad or self.training or return_distance:
            logits = rows @ weight.t()
            # Of the probabilities, not the logits: officially, codes whose probabilities round alike are a tie.
            indices = F.softmax(logits, dim=1).argmax(dim=1)
        else:
            indices = hard_indices(rows.detach(), weight.detach(), "inner_product")
        selected = weight[indices]
        quant = selected
        if needs_grad:
            assert logits is not None
            soft = F.softmax(logits, dim=1)
            hard = torch.zeros_like(soft).scatter_(1, indices[:, None], 1.0)
            quant = (hard - soft.detach() + soft) @ weight
        quant_loss = entropy = None
        if self.training:
            assert logits is not None
            quant_loss = (
                torch.mean((quant - rows) ** 2)
                + torch.mean((selected.detach() - rows) ** 2)
                + self.beta * torch.mean((selected - rows.detach()) ** 2)
            )
            total, sample, average = entropy_loss(logits, self.entropy_temperature)
            entropy = (self.entropy_loss_ratio * total, sample, average)
        out = (to_grid(quant, z), (quant_loss, None, entropy, 0), (None, None, indices))
        return (*out, -logits) if return_distance and logits is not None else out


def soft_readout(distance: torch.Tensor, table: torch.Tensor, tau: float) -> torch.Tensor:
    """Soft read-out ``softmax(-d / tau) @ table`` of GEAR's dual read-out; differentiable.

    Args:
        distance: [N, K], as :meth:`Tokenizer.encode` returns it.
        table: [K, C], for example the generator's token embeddings.
        tau: temperature, positive.

    Returns:
        [N, C].

    Raises:
        InvalidRequestError: tau not positive and finite, or K differs.
    """
    if not (math.isfinite(tau) and tau > 0):
        raise InvalidRequestError(f"tau must be positive and finite, got {tau}")
    if distance.ndim != 2 or table.ndim != 2 or distance.shape[1] != table.shape[0]:
        raise InvalidRequestError(f"distance [N, K] and table [K, C] do not fit: {distance.shape}, {table.shape}")
    return F.softmax(-distance / tau, dim=-1) @ table
