"""Lookup-free quantization: the code is the latent's signs, in one group of bits or several."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gear_engine.errors import InvalidRequestError
from gear_engine.ops.dual_readout import Distance
from gear_engine.ops.sign_bits import sign_bits
from gear_engine.tokenizers.losses import entropy_loss
from gear_engine.tokenizers.quantizers import Quantizer, to_grid, to_rows

__all__ = ["LookupFreeQuantizer"]


class LookupFreeQuantizer(Quantizer):
    """Sign bits (LFQ-16, LFQ-8, GLFQ-16): code = sign(z) with zero mapped to -1, index bit i = channel i of its group.

    ``num_codebooks`` groups of g = dim / num_codebooks channels have one index each; ``d = -2 <z_group, c>`` over the
    2^g vectors c of {-1, 1}^g. Gradient: straight-through.
    """

    def __init__(self, dim: int, num_codebooks: int) -> None:
        super().__init__(2 ** (dim // num_codebooks), num_codebooks, dim, entropy_loss_ratio=1.0)
        self.group_dim = dim // num_codebooks

    def _bits(self, device: torch.device) -> torch.Tensor:
        return torch.arange(self.group_dim, device=device)

    def codebook(self, like: torch.Tensor) -> torch.Tensor:
        """All vectors of {-1, 1}^g, [2^g, g], in the order of their indices."""
        indices = torch.arange(self.num_codes, device=like.device)
        return self._signs(indices).to(like.dtype)

    def _signs(self, indices: torch.Tensor) -> torch.Tensor:
        return ((indices[:, None] >> self._bits(indices.device)) & 1) * 2.0 - 1.0

    def distances(self, z: torch.Tensor) -> torch.Tensor:
        groups = to_rows(z).reshape(-1, self.group_dim)
        return -(2.0 * (groups @ self.codebook(groups).t()))

    def raw_codebook(self, like: torch.Tensor) -> tuple[torch.Tensor, Distance]:
        return self.codebook(like), "lfq"

    def codes_to_rows(self, indices: torch.Tensor) -> torch.Tensor:
        return self._signs(indices).view(-1, self.dim)

    def forward(self, z: torch.Tensor, return_distance: bool = False) -> tuple[Any, ...]:
        if z.shape[1] != self.dim:
            raise InvalidRequestError(f"the latent must have {self.dim} channels, got {z.shape[1]}")
        rows = to_rows(z)
        indices, signs = sign_bits(rows.detach(), self.num_codebooks)
        distance = self.distances(z) if self.training or return_distance else None
        commit_loss = total = sample = average = rows.new_zeros(())
        if self.training:
            assert distance is not None
            groups = (-distance).reshape(-1, self.num_codebooks, self.num_codes).unbind(1)
            losses = [torch.stack(entropy_loss(group, self.entropy_temperature)) for group in groups]
            total, sample, average = torch.stack(losses).mean(dim=0)
            commit_loss = self.beta * F.mse_loss(rows, signs)
        quant = to_grid(rows + (signs - rows).detach(), z).contiguous()
        entropy = (self.entropy_loss_ratio * total, sample, average)
        out = (quant, (None, commit_loss, entropy, 0), (None, None, indices.reshape(-1)))
        return (*out, distance) if return_distance else out
