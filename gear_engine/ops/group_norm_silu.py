"""GroupNorm and SiLU of channels-last rows in one pass, from moments that were taken before.

    mean_g, var_g = of all numbers of group g in the image, from its rows' sums and sums of squares
    y             = silu((x - mean_g) / sqrt(var_g + eps) * weight_c + bias_c)        silu(v) = v / (1 + exp(-v))

The population variance, as torch's GroupNorm. Moments come from :mod:`gear_engine.ops.residual_moments`; x may be a
strip of the image while the moments are the whole image's. Where the result is bf16, the activation may be off by 2^-13
of itself before it is rounded (bf16 rounds by 2^-9).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gear_engine.ops import backends, native, triton_backend

__all__ = ["group_norm_silu", "reference"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_CHANNEL_MULTIPLE = 16


def group_norm_silu(
    x: torch.Tensor,
    moments: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    eps: float = 1e-6,
    silu: bool = True,
    backend: str = "auto",
) -> None:
    """The module's formula, checked, by the chosen backend; writes ``out``.

    Args:
        x: fp32 or bf16 [H, W, C], contiguous.
        moments: float64 [image rows, groups, 2]: sum and sum of squares per row and group; contiguous.
        weight, bias: fp32 [C]; None: 1 and 0.
        out: fp32 or bf16 [H, W, C], contiguous; may be x.
        silu: False leaves the activation out.

    Raises:
        ValueError: a shape, dtype or layout does not fit.
    """
    if x.dim() != 3 or out.shape != x.shape or out.dtype not in _DTYPES:
        raise ValueError(f"x and out are [H, W, C], got {tuple(x.shape)} and {out.dtype} {tuple(out.shape)}")
    if moments.dim() != 3 or moments.dtype != torch.float64 or moments.shape[2] != 2 or 0 in moments.shape:
        raise ValueError(f"moments are float64 [rows, groups, 2], got {moments.dtype} {tuple(moments.shape)}")
    if x.shape[2] % moments.shape[1]:
        raise ValueError(f"{x.shape[2]} channels are not divisible into {moments.shape[1]} groups")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and (value.dtype != torch.float32 or tuple(value.shape) != (x.shape[2],)):
            raise ValueError(f"{name} is fp32 [{x.shape[2]}], got {value.dtype} {tuple(value.shape)}")
    run = backends.resolve("group_norm_silu", x.device, x.dtype, backend).load()
    run(x, moments, weight, bias, out, eps=eps, silu=silu)


def reference(
    x: torch.Tensor,
    moments: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    eps: float = 1e-6,
    silu: bool = True,
) -> None:
    """Plain torch."""
    groups = moments.shape[1]
    per_group = x.shape[2] // groups
    mean, square = (moments.sum(dim=0) / (moments.shape[0] * x.shape[1] * per_group)).unbind(1)
    scale = (torch.rsqrt((square - mean * mean).clamp(min=0) + eps)).repeat_interleave(per_group)
    mean = mean.repeat_interleave(per_group)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    y = x.float() * scale.float() + shift.float()
    out.copy_(F.silu(y) if silu else y)


def _cpu(
    x: torch.Tensor,
    moments: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    eps: float = 1e-6,
    silu: bool = True,
) -> None:
    """Compiled. The bits do not depend on the threads or on how rows are cut into calls.

    Raises:
        ValueError: channels are no multiple of 16, or an operand is not contiguous.
    """
    height, width, channels = x.shape
    if channels % _CHANNEL_MULTIPLE:
        raise ValueError(f"the compiled kernel needs channels in multiples of {_CHANNEL_MULTIPLE}, got {channels}")
    if not all(t is None or t.is_contiguous() for t in (x, moments, weight, bias, out)):
        raise ValueError("x, moments, weight, bias and out must be contiguous")
    native.cpu_kernels().group_norm_silu_cpu(
        x.data_ptr(), _DTYPES[x.dtype], out.data_ptr(), _DTYPES[out.dtype], height, width, channels,
        moments.data_ptr(), moments.shape[0], moments.shape[1], 0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(), eps, silu,
    )  # fmt: skip


backends.register("group_norm_silu", "reference", lambda: reference)
triton_backend.register("group_norm_silu", frozenset(_DTYPES))
backends.register(
    "group_norm_silu",
    "cpu",
    lambda: _cpu,
    devices=frozenset({"cpu"}),
    dtypes=frozenset(_DTYPES),
    unavailable=lambda: native.unavailable("group_norm_silu_cpu"),
)
