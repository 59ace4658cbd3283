"""The decoder's network over channels-last maps: what a GPU runs from a latent to floats, in few passes over each map.

Between two convolutions a map is read twice: once where the convolution's output goes into the residual stream, with
the sums that the next norm needs (:mod:`gear_engine.ops.residual_moments`; depth-to-space happens on the way), and once
where norm and activation write the next operand in the convolution's own dtype
(:mod:`gear_engine.ops.group_norm_silu`). The two ops are chosen like any other (:mod:`gear_engine.ops.backends`): by
Triton on a GPU, where it is installed.

The residual stream, moments, norms and width-changing shortcuts are fp32 (fp64 the sums); operands and outputs of the
other convolutions and of attention have the dtype that was asked for, as on the CPU
(:mod:`gear_engine.tokenizers.decoder_fast`).

Not run on hardware yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from gear_engine.ops import backends
from gear_engine.ops.group_norm_silu import group_norm_silu
from gear_engine.ops.residual_moments import residual_moments
from gear_engine.tokenizers import magvit2, vqgan

__all__ = ["NORM_OPS", "DeviceNetwork", "resolve_norms"]

#: What is chosen when a network is built.
NORM_OPS: Final = ("group_norm_silu", "residual_moments")


def resolve_norms(device: torch.device, backend: str | Mapping[str, str] = "auto") -> dict[str, str]:
    """The backend of each of :data:`NORM_OPS` on ``device``.

    Args:
        backend: as an engine takes it. A name per op, ``"auto"`` for those left out; or one name, which is meant for
            all ops that have it: of these there is no ``"cuda"``, so they are ``"auto"`` then.

    Raises:
        BackendUnavailableError: a backend that was asked for by name cannot run here.
    """
    names = {}
    for op in NORM_OPS:
        if not isinstance(backend, str):
            names[op] = backend.get(op, "auto")
        else:
            names[op] = backend if backend in backends.implementations(op) else "auto"
    return {op: backends.resolve(op, device, torch.float32, name).backend for op, name in names.items()}


class _Map(NamedTuple):
    """A map with its moments.

    Attributes:
        rows: [B, H, W, C], contiguous: the fp32 residual stream, or a convolution's output.
        moments: float64 [B, H, groups, 2], sums and sums of squares of every row.
    """

    rows: torch.Tensor
    moments: torch.Tensor


class DeviceNetwork:
    """``network(latent)``: fp32 latent [B, z, h, w] -> fp32 images [B, 3, h f, w f], as the modules.

    It reads nothing on the host and can be captured. Weights of convolutions are copied if they change their dtype or
    layout: :meth:`refresh` reads them again.

    Args:
        decoder: fp32 modules.
        dtype: of the convolutions' operands.
        norms: the backend per op of :data:`NORM_OPS`, resolved.
    """

    def __init__(self, decoder: vqgan.Decoder | magvit2.Decoder, dtype: torch.dtype, norms: Mapping[str, str]) -> None:
        self._decoder, self._dtype, self._norms = decoder, dtype, dict(norms)
        self._groups = decoder.norm_out.num_groups
        self.weights: dict[nn.Conv2d, torch.Tensor] = {}
        self.refresh()

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> None:
        """Reads the convolutions' weights again, into the same places."""
        # Made in inference mode, they could not be written outside it.
        shortcuts = {module for name, module in self._decoder.named_modules() if name.endswith("nin_shortcut")}
        for conv in self._decoder.modules():
            if not isinstance(conv, nn.Conv2d):
                continue
            dtype = torch.float32 if conv in shortcuts else self._dtype
            weight = conv.weight.detach().to(dtype, memory_format=torch.channels_last)
            if conv in self.weights:
                self.weights[conv].copy_(weight)
            else:
                self.weights[conv] = weight.clone(memory_format=torch.preserve_format)

    def __call__(self, latent: torch.Tensor) -> torch.Tensor:
        stream = self._stream(self._convolve(self._decoder.conv_in, latent.permute(0, 2, 3, 1)))
        for module in self._decoder.steps():
            stream = self._apply(module, stream, latent)
        rows = self._convolve(self._decoder.conv_out, self._normed(self._decoder.norm_out, stream))
        return rows.permute(0, 3, 1, 2).float()

    def _apply(self, module: nn.Module, x: _Map, latent: torch.Tensor) -> _Map:
        if isinstance(module, (vqgan.ResidualBlock, magvit2.ResidualBlock)):
            h = self._measured(self._convolve(module.conv1, self._normed(module.norm1, x)))
            branch = self._convolve(module.conv2, self._normed(module.norm2, h))
            shortcut = module._modules.get("nin_shortcut")
            return self._stream(branch, self._convolve(shortcut, x.rows) if isinstance(shortcut, nn.Conv2d) else x.rows)
        if isinstance(module, vqgan.AttentionBlock):
            normed = self._normed(module.norm, x, silu=False)
            q, k, v = (self._convolve(c, normed).flatten(1, 2)[:, None] for c in (module.q, module.k, module.v))
            mixed = F.scaled_dot_product_attention(q, k, v)  # [B, 1, H * W, C]
            return self._stream(self._convolve(module.proj_out, mixed.view(normed.shape)), x.rows)
        if isinstance(module, vqgan.Upsample):
            image = x.rows.to(self._dtype).permute(0, 3, 1, 2)
            doubled = F.interpolate(image, scale_factor=2.0, mode="nearest").permute(0, 2, 3, 1)
            return self._stream(self._convolve(module.conv, doubled))
        if isinstance(module, magvit2.Upsampler):
            return self._stream(self._convolve(module.conv1, x.rows), phases=True)
        if isinstance(module, magvit2.AdaptiveGroupNorm):
            scale, shift = (affine.flatten(1) for affine in module.affine(latent))  # [B, C]
            self._norm(x, scale, shift, x.rows, module.gn.eps, silu=False)
            return self._measured(x.rows)
        raise TypeError(f"a decoder has no step of type {type(module).__name__}")

    def _convolve(self, conv: nn.Conv2d, rows: torch.Tensor) -> torch.Tensor:
        """[B, H, W, C] -> [B, H, W, C'], in the dtype of the weight."""
        weight = self.weights[conv]
        bias = None if conv.bias is None else conv.bias.to(weight.dtype)
        image = rows.to(weight.dtype).contiguous().permute(0, 3, 1, 2)  # channels last
        return F.conv2d(image, weight, bias, conv.stride, conv.padding).permute(0, 2, 3, 1).contiguous()

    def _normed(self, norm: nn.GroupNorm, x: _Map, *, silu: bool = True) -> torch.Tensor:
        """``silu(norm(x))`` as an operand."""
        operand = torch.empty_like(x.rows, dtype=self._dtype)
        self._norm(x, norm.weight, norm.bias, operand, norm.eps, silu=silu)
        return operand

    def _norm(
        self, x: _Map, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, eps: float, *, silu: bool
    ) -> None:
        chosen = self._norms["group_norm_silu"]
        group_norm_silu(x.rows, x.moments, weight, bias, out, eps=eps, silu=silu, backend=chosen)

    def _measured(self, rows: torch.Tensor) -> _Map:
        """``rows`` as they are, with their moments."""
        moments = self._no_moments(rows)
        chosen = self._norms["residual_moments"]
        residual_moments(rows.flatten(0, 1), None, moments.flatten(0, 1), backend=chosen)
        return _Map(rows, moments)

    def _stream(self, branch: torch.Tensor, onto: torch.Tensor | None = None, *, phases: bool = False) -> _Map:
        """The residual stream: ``onto + branch``, written to ``onto``; without it ``branch`` alone.

        Args:
            branch: a convolution's output, [B, H, W, C]; with ``phases`` [B, H / 2, W / 2, 4 C].
        """
        if onto is None and branch.dtype == torch.float32 and not phases:
            return self._measured(branch)
        images, height, width, channels = branch.shape
        accumulate = onto is not None
        if phases:
            height, width, channels = 2 * height, 2 * width, channels // 4
            branch = branch.unflatten(3, (4, channels))
        if onto is None:
            onto = branch.new_empty(images, height, width, channels, dtype=torch.float32)
        moments = self._no_moments(onto)
        residual_moments(
            branch.flatten(0, 1),
            onto.flatten(0, 1),
            moments.flatten(0, 1),
            accumulate=accumulate,
            phase_offset=0 if phases else None,
            backend=self._norms["residual_moments"],
        )
        return _Map(onto, moments)

    def _no_moments(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.new_empty(*rows.shape[:2], self._groups, 2, dtype=torch.float64)
