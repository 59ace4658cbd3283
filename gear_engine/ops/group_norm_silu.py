"""GroupNorm and SiLU of channels-last rows in one pass, from moments that were taken before.

    mean_g, var_g = of all numbers of group g in the image, from its rows' sums and sums of squares
    y             = silu((x - mean_g) / sqrt(var_g + eps) * weight_c + bias_c)        silu(v) = v / (1 + exp(-v))

The population variance, as torch's GroupNorm. Moments come from :mod:`gear_engine.ops.residual_moments`; x may be a
strip of the image while the moments are the whole image's. Several images may come at once, each with scale and shift
of its own where a norm is adaptive; an image's result does not depend on the others. Where the result is bf16, the
activation may be off by 2^-13 of itself before it is rounded (bf16 rounds by 2^-9).
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
        x: fp32 or bf16 [H, W, C], or B images [B, H, W, C]; contiguous.
        moments: float64 [image rows, groups, 2], or [B, image rows, groups, 2]: sum and sum of squares per row and
            group; contiguous.
        weight, bias: fp32 [C], or [B, C] both; None: 1 and 0.
        out: fp32 or bf16, of x's shape, contiguous; may be x.
        silu: False leaves the activation out.

    Raises:
        ValueError: a shape, dtype or layout does not fit.
    """
    if x.dim() not in (3, 4) or out.shape != x.shape or out.dtype not in _DTYPES:
        raise ValueError(f"x and out are [(B,) H, W, C], got {tuple(x.shape)} and {out.dtype} {tuple(out.shape)}")
    images, channels = tuple(x.shape[:-3]), x.shape[-1]
    shape = tuple(moments.shape)
    if moments.dtype != torch.float64 or len(shape) != x.dim() or shape[:-3] != images or shape[-1] != 2 or 0 in shape:
        raise ValueError(
            f"moments are float64 [(B,) rows, groups, 2], got {moments.dtype} {shape} for {tuple(x.shape)}"
        )
    if channels % shape[-2]:
        raise ValueError(f"{channels} channels are not divisible into {shape[-2]} groups")
    for name, value in (("weight", weight), ("bias", bias)):
        fits = value is None or tuple(value.shape) in ((channels,), (*images, channels))
        if value is not None and not (fits and value.dtype == torch.float32):
            raise ValueError(f"{name} is fp32 [(B,) {channels}], got {value.dtype} {tuple(value.shape)}")
    if weight is not None and bias is not None and weight.shape != bias.shape:
        raise ValueError(f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} are of one shape")
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
    rows, groups, _ = moments.shape[-3:]
    per_group = x.shape[-1] // groups
    mean, square = (moments.sum(dim=-3) / (rows * x.shape[-2] * per_group)).unbind(-1)  # [(B,) groups]
    scale = (torch.rsqrt((square - mean * mean).clamp(min=0) + eps)).repeat_interleave(per_group, dim=-1)
    mean = mean.repeat_interleave(per_group, dim=-1)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    y = x.float() * scale.float()[..., None, None, :] + shift.float()[..., None, None, :]
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
    height, width, channels = x.shape[-3:]
    if channels % _CHANNEL_MULTIPLE:
        raise ValueError(f"the compiled kernel needs channels in multiples of {_CHANNEL_MULTIPLE}, got {channels}")
    if not all(t is None or t.is_contiguous() for t in (x, moments, weight, bias, out)):
        raise ValueError("x, moments, weight, bias and out must be contiguous")
    if x.dim() == 4:
        for image in range(x.shape[0]):
            own = [None if t is None else t if t.dim() == 1 else t[image] for t in (weight, bias)]
            _cpu(x[image], moments[image], own[0], own[1], out[image], eps=eps, silu=silu)
        return
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
