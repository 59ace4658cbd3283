"""The pass between two convolutions: add to the residual stream and take the sums that the next group norm needs.

    residual[y, x, c]  = source[y, x, c]  or  += source[y, x, c]
    moments[y, g]      = (sum, sum of squares) of row y of the result over the channels of group g

Without ``residual`` the moments are the source's own. Channels last throughout. A row's moments depend on that row
only, so an image may be cut into strips of rows anywhere, and images may be stacked: the bits stay.

With ``phase_offset`` 0 or 1 the source holds the four phases of an image of twice its size, which is put together on
the way: pixel (y, x) of the result is entry (y // 2 + (y % 2) * o, x // 2 + (x % 2) * o, 2 (y % 2) + x % 2) of a source
[H / 2 + o, W / 2 + o, 4, C], o = ``phase_offset``. With 0 that is depth-to-space; with 1 it joins the four 2 x 2
convolutions that equal a nearest upsampling followed by a 3 x 3 convolution.
"""

from __future__ import annotations

import torch

from gear_engine.ops import backends, native, triton_backend

__all__ = ["join_phases", "reference", "residual_moments"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_CHANNEL_MULTIPLE = 16


def residual_moments(
    source: torch.Tensor,
    residual: torch.Tensor | None,
    moments: torch.Tensor,
    *,
    accumulate: bool = False,
    phase_offset: int | None = None,
    backend: str = "auto",
) -> None:
    """The module's formula, checked, by the chosen backend; writes ``residual`` and ``moments``.

    Args:
        source: fp32 or bf16 [H, W, C], or the four phases of it, contiguous.
        residual: fp32 [H, W, C], contiguous; None if only the moments are wanted.
        moments: float64 [H, groups, 2], contiguous.
        accumulate: add to ``residual`` instead of replacing it.
        phase_offset: None, 0 or 1.

    Raises:
        ValueError: a shape, dtype or layout does not fit.
    """
    if residual is None and (accumulate or phase_offset is not None):
        raise ValueError("accumulate and phase_offset need a residual")
    shape = source.shape if residual is None else residual.shape
    if len(shape) != 3:
        raise ValueError(f"rows are [H, W, C], got {tuple(shape)}")
    height, width, channels = shape
    expected: tuple[int, ...] = (height, width, channels)
    if phase_offset is not None:
        if phase_offset not in (0, 1) or height % 2 or width % 2:
            raise ValueError(f"phases (offset {phase_offset}) give even edges, not {height} x {width}")
        expected = (height // 2 + phase_offset, width // 2 + phase_offset, 4, channels)
    if tuple(source.shape) != expected:
        raise ValueError(f"the source is {tuple(source.shape)}, expected {expected}")
    if residual is not None and residual.dtype != torch.float32:
        raise ValueError(f"the residual stream is fp32, not {residual.dtype}")
    groups = moments.shape[1] if moments.dim() == 3 else 0
    if moments.dtype != torch.float64 or tuple(moments.shape) != (height, groups, 2) or groups == 0:
        raise ValueError(f"moments are float64 [{height}, groups, 2], got {moments.dtype} {tuple(moments.shape)}")
    if channels % groups:
        raise ValueError(f"{channels} channels are not divisible into {groups} groups")
    run = backends.resolve("residual_moments", source.device, source.dtype, backend).load()
    run(source, residual, moments, accumulate=accumulate, phase_offset=phase_offset)


def join_phases(source: torch.Tensor, phase_offset: int) -> torch.Tensor:
    """[H / 2 + o, W / 2 + o, 4, C] -> [H, W, C], as the module describes."""
    height, width = (size - phase_offset for size in source.shape[:2])
    joined = source.new_empty(2 * height, 2 * width, source.shape[3])
    for dy in (0, 1):
        for dx in (0, 1):
            y, x = dy * phase_offset, dx * phase_offset
            joined[dy::2, dx::2] = source[y : y + height, x : x + width, 2 * dy + dx]
    return joined


def reference(
    source: torch.Tensor,
    residual: torch.Tensor | None,
    moments: torch.Tensor,
    *,
    accumulate: bool = False,
    phase_offset: int | None = None,
) -> None:
    """Plain torch."""
    result = source if phase_offset is None else join_phases(source, phase_offset)
    if residual is not None:
        if accumulate:
            residual += result
        else:
            residual.copy_(result)
        result = residual
    wide = result.double().unflatten(2, (moments.shape[1], -1))  # [H, W, groups, C / groups]
    moments[..., 0] = wide.sum(dim=(1, 3))
    moments[..., 1] = wide.square().sum(dim=(1, 3))


def _cpu(
    source: torch.Tensor,
    residual: torch.Tensor | None,
    moments: torch.Tensor,
    *,
    accumulate: bool = False,
    phase_offset: int | None = None,
) -> None:
    """Compiled. The bits do not depend on the threads or on how rows are cut into calls.

    Raises:
        ValueError: channels are no multiple of 16, or an operand is not contiguous.
    """
    height, groups = moments.shape[:2]
    width, channels = (source if residual is None else residual).shape[1:]
    if channels % _CHANNEL_MULTIPLE:
        raise ValueError(f"the compiled kernel needs channels in multiples of {_CHANNEL_MULTIPLE}, got {channels}")
    if not all(t is None or t.is_contiguous() for t in (source, residual, moments)):
        raise ValueError("source, residual and moments must be contiguous")
    native.cpu_kernels().residual_moments_cpu(
        source.data_ptr(), _DTYPES[source.dtype], 0 if residual is None else residual.data_ptr(), accumulate,
        -1 if phase_offset is None else phase_offset, moments.data_ptr(), height, width, channels, groups,
    )  # fmt: skip


backends.register("residual_moments", "reference", lambda: reference)
triton_backend.register("residual_moments", frozenset(_DTYPES))
backends.register(
    "residual_moments",
    "cpu",
    lambda: _cpu,
    devices=frozenset({"cpu"}),
    dtypes=frozenset(_DTYPES),
    unavailable=lambda: native.unavailable("residual_moments_cpu"),
)
