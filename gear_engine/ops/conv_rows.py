"""fp32 convolution of channels-last rows whose sums are short.

    y[r, x, o] = bias[o] + sum over chunks of 16 input channels ( sum over i in chunk, dy, dx  of
                 source[r + dy, x + dx - padding, i] weight[o, i, dy, dx] )          columns outside of source are zeros

Adding all in * k * k products of an output one after another, as channels-last convolutions commonly do, loses five
times as much of fp32 over 4608 products as adding up chunks. Rows are not padded: y has k - 1 rows fewer than source.

A kernel may be packed for Winograd's F(2 x 2, 3 x 3) or F(4 x 4, 3 x 3), 4 or 2.25 products per output and input
channel in place of 9, or F(5 x 5, 2 x 2), 1.44 in place of 4, summed over at most 128 channels at a time. Source: Lavin
and Gray, CVPR 2016. ``python -m gear_engine.bench.conv_rows`` shows the error of each form beside its speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gear_engine.ops import backends, native

__all__ = ["PackedKernel", "conv_rows", "pack", "packed_shape", "reference"]

_BLOCK = 64
_CHUNK = 16
_PANEL = 32
#: tile -> the left inverse of its kernel transform G: [k, tile + k - 1].
_KERNEL_INVERSES = {
    2: ((1, 0, 0, 0), (0, 1, -1, 0), (0, 0, 0, 1)),
    4: ((225 / 256, 0, 0, 0, 0, 0), (0, -595 / 512, 595 / 512, 0, 0, 0), (0, 0, 0, 0, 0, 1)),
    5: ((225 / 256, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 1)),
}


@dataclass(frozen=True)
class PackedKernel:
    """A convolution's weight in the compiled kernel's order.

    Attributes:
        data: fp32 [ceil(out / 64), ceil(in / 16), k, k, 16, 64], zeros where channels end; for a tile
            [(tile + k - 1)^2, ceil(out / 32), 16 ceil(in / 16), 32].
        out_channels, in_channels, edge: of the weight [out, in, edge, edge].
        tile: outputs along the edge of a Winograd tile, 2 or 4 (k = 3) or 5 (k = 2); 0: no Winograd.
    """

    data: torch.Tensor
    out_channels: int
    in_channels: int
    edge: int
    tile: int = 0

    def unpack(self) -> torch.Tensor:
        """The weight [out, in, edge, edge]; up to rounding for a tile."""
        if self.tile:
            inverse = torch.tensor(_KERNEL_INVERSES[self.tile], dtype=torch.float32)
            spectra = self.data.permute(1, 3, 2, 0).flatten(0, 1).unflatten(-1, (inverse.shape[1], -1))
            weight: torch.Tensor = inverse @ spectra @ inverse.T
            return weight[: self.out_channels, : self.in_channels]
        full = self.data.permute(0, 5, 1, 4, 2, 3).reshape(-1, self.data.shape[1] * _CHUNK, self.edge, self.edge)
        return full[: self.out_channels, : self.in_channels]


def packed_shape(shape: tuple[int, ...], tile: int = 0) -> tuple[int, ...]:
    """Shape of the numbers that :func:`pack` makes of a weight of ``shape`` [out, in, k, k]."""
    out_channels, in_channels, edge = shape[:3]
    chunks = -(-in_channels // _CHUNK)
    if tile:
        return ((tile + edge - 1) ** 2, -(-out_channels // _PANEL), chunks * _CHUNK, _PANEL)
    return (-(-out_channels // _BLOCK), chunks, edge, edge, _CHUNK, _BLOCK)


def pack(weight: torch.Tensor, tile: int = 0, data: torch.Tensor | None = None) -> PackedKernel:
    """Packs an fp32 CPU weight [out, in, k, k], k = 1, 2 or 3; for Winograd if ``tile`` is 2 or 4 (k = 3) or 5 (k = 2).

    Args:
        data: contiguous fp32 memory of :func:`packed_shape` for the result, or None.

    Raises:
        ValueError: another shape, dtype, device or tile.
    """
    square = weight.dim() == 4 and weight.shape[2] == weight.shape[3] and weight.shape[2] in (1, 2, 3)
    if not square or weight.numel() == 0 or weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ValueError(f"a CPU fp32 weight [out, in, k, k] with k 1, 2 or 3 is wanted, got {tuple(weight.shape)}")
    weight = weight.detach().contiguous()
    out_channels, in_channels, edge = weight.shape[:3]
    if tile and (tile not in _KERNEL_INVERSES or len(_KERNEL_INVERSES[tile]) != edge):
        raise ValueError(f"tiles are 2 or 4 for 3 x 3 kernels and 5 for 2 x 2, not {tile} for {edge} x {edge}")
    shape = packed_shape(tuple(weight.shape), tile)
    if data is None:
        data = torch.empty(shape, dtype=torch.float32)
    elif data.shape != shape or data.dtype != torch.float32 or not data.is_contiguous():
        raise ValueError(f"data must be contiguous fp32 {shape}, got {data.dtype} {tuple(data.shape)}")
    operands = (weight.data_ptr(), data.data_ptr(), out_channels, in_channels)
    if tile:
        native.cpu_kernels().winograd_rows_pack_cpu(*operands, tile)
    else:
        native.cpu_kernels().conv_rows_pack_cpu(*operands, edge)
    return PackedKernel(data, out_channels, in_channels, edge, tile)


def conv_rows(
    source: torch.Tensor,
    kernel: PackedKernel,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    padding: int = 1,
    backend: str = "auto",
) -> None:
    """The module's formula, checked, by the chosen backend; writes ``out``.

    Args:
        source: fp32 [rows + k - 1, W, in], contiguous.
        kernel: from :func:`pack`.
        bias: fp32 [out]; None: 0.
        out: fp32 [rows, W + 2 padding - k + 1, out], contiguous.
        padding: columns of zeros at either side, less than k.

    Raises:
        ValueError: a shape, dtype or layout does not fit.
    """
    if source.dim() != 3 or source.shape[2] != kernel.in_channels or not 0 <= padding < kernel.edge:
        raise ValueError(f"source is [rows, W, {kernel.in_channels}], got {tuple(source.shape)} (padding {padding})")
    rows, width = source.shape[0] - kernel.edge + 1, source.shape[1] + 2 * padding - kernel.edge + 1
    if rows < 1 or width < 1 or tuple(out.shape) != (rows, width, kernel.out_channels):
        raise ValueError(f"out is [{rows}, {width}, {kernel.out_channels}], got {tuple(out.shape)}")
    if bias is not None and tuple(bias.shape) != (kernel.out_channels,):
        raise ValueError(f"bias is [{kernel.out_channels}], got {tuple(bias.shape)}")
    if any(t is not None and t.dtype != torch.float32 for t in (source, bias, out)):
        raise ValueError("source, bias and out are fp32")
    run = backends.resolve("conv_rows", source.device, source.dtype, backend).load()
    run(source, kernel, bias, out, padding=padding)


def reference(
    source: torch.Tensor, kernel: PackedKernel, bias: torch.Tensor | None, out: torch.Tensor, *, padding: int = 1
) -> None:
    """Plain torch."""
    image = source.permute(2, 0, 1).unsqueeze(0).contiguous()
    out.copy_(F.conv2d(image, kernel.unpack(), bias, padding=(0, padding))[0].permute(1, 2, 0))


def _cpu(
    source: torch.Tensor, kernel: PackedKernel, bias: torch.Tensor | None, out: torch.Tensor, *, padding: int = 1
) -> None:
    """Compiled. The bits do not depend on the threads or on how rows are cut into calls (for a tile, at its multiples).

    Raises:
        ValueError: an operand is not contiguous.
    """
    if not all(t is None or t.is_contiguous() for t in (source, bias, out)):
        raise ValueError("source, bias and out must be contiguous")
    kernels = native.cpu_kernels()
    operands = (
        *(source.data_ptr(), kernel.data.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr()),
        *(out.shape[0], source.shape[1], out.shape[1], kernel.in_channels, kernel.out_channels),
    )
    if kernel.tile:
        kernels.winograd_rows_cpu(*operands, padding, kernel.tile)
    else:
        kernels.conv_rows_cpu(*operands, kernel.edge, padding)


backends.register("conv_rows", "reference", lambda: reference)
backends.register(
    "conv_rows",
    "cpu",
    lambda: _cpu,
    devices=frozenset({"cpu"}),
    dtypes=frozenset({torch.float32}),
    unavailable=lambda: native.unavailable("conv_rows_cpu"),
)
