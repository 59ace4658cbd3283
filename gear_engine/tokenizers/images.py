"""From decoded floats to pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gear_engine.errors import InvalidRequestError

__all__ = ["resize", "to_uint8"]


def resize(images: torch.Tensor, size: int | tuple[int, int]) -> torch.Tensor:
    """Bicubic resize of floats [B, C, H, W] to ``size`` (edge, or (height, width)), as the official sampler does.

    It is applied before :func:`to_uint8` clamps; images of that size already are returned as they are.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise InvalidRequestError(f"the size to resize to must be positive, got {height} x {width}")
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, size=(height, width), mode="bicubic")


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """``uint8(clamp(127.5 x + 128, 0, 255))``, truncated: [B, C, H, W] in about [-1, 1] -> uint8 [B, H, W, C].

    The official samplers' conversion; computed in the dtype of ``images``, fp32 at least.
    """
    if images.ndim != 4:
        raise InvalidRequestError(f"images must be [B, C, H, W], got {tuple(images.shape)}")
    floats = images if images.dtype in (torch.float32, torch.float64) else images.float()
    pixels = torch.clamp(127.5 * floats + 128.0, 0, 255)
    return pixels.permute(0, 2, 3, 1).to(torch.uint8).contiguous()
