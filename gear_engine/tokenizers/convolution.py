"""The convolutions of the CPU decoder: channels-last rows, in strips, in fp32 or bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
import torch.nn as nn

from gear_engine.ops import backends, conv_rows
from gear_engine.tokenizers.canvas import Arena

__all__ = ["PHASE_TILE", "Convolution", "Memory", "phase_weights"]

#: Output channels from which on Winograd pays.
_FEWEST_CHANNELS: Final = 16
#: Rows of a tile where the phases of a large image go by Winograd: strips of whole ones leave no rest.
PHASE_TILE: Final = 5
#: Edge of a kernel -> edge of its Winograd tiles in small images and in large ones; 0: none.
_TILES: Final = {1: (0, 0), 2: (0, PHASE_TILE), 3: (2, 4)}
#: Pixels of a large image. At 32 x 32 tiles of 4 still save 2 to 7% of a decode's time, but the sums over 512 channels
#: there are where their error weighs most: 6.5e-6 of float64 rather than 5e-6.
_LARGE_PIXELS: Final = 4096
#: (first row, row after the last, output [last - first (+ 1 for phases), W', out]).
_Strip = tuple[int, int, torch.Tensor]
#: Rows [h + k - 1, W, in] -> [h, W', out].
_Convolve = Callable[[torch.Tensor], torch.Tensor]


def phase_weights(weight: torch.Tensor) -> torch.Tensor:
    """[out, in, 3, 3] -> [4 out, in, 2, 2]: the 3 x 3 taps that fall on each of the two rows and columns of a phase."""
    # Phase 0 sees (the row above, its own row): taps {0}, {1, 2}; phase 1 (its own row, the row below): {0, 1}, {2}.
    fold = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # [phase, row, tap]
    phases = torch.einsum("pyi,qxj,ocij->pqocyx", fold, fold, weight)
    return phases.reshape(4 * weight.shape[0], weight.shape[1], 2, 2)


@dataclass(frozen=True)
class Memory:
    """What a decoder's convolutions share.

    Attributes:
        arena: reused buffers.
        keep_weights: converted weights are kept for the next call.
        kept: bytes of each that is.
    """

    arena: Arena
    keep_weights: bool
    kept: list[int] = field(default_factory=list)


class Convolution:
    """A convolution over channels-last rows that were padded above and below: [h + k - 1, W, in] -> [h, W', out].

    In fp32 by :mod:`gear_engine.ops.conv_rows` (by Winograd where that pays), in bf16 by oneDNN. oneDNN's channels-last
    fp32 convolution adds up to 4608 products one after another, which costs five times what the modules lose; its bf16
    one sums pairs in fp32, well below what rounding the operands costs.

    Both need the weight in an order of their own; with ``memory.keep_weights`` it is converted once, else at every
    call, so that weights are read where they lie and nothing of them is kept. Spectra are up to sixteen times a weight
    and quickly made: they are never kept. oneDNN's order is made for operands of one shape, so the weight is converted
    again for those of another: what a call computes never depends on the calls before.
    """

    def __init__(self, conv: nn.Conv2d, memory: Memory, dtype: torch.dtype, *, phases: bool = False) -> None:
        self._conv, self._memory, self._dtype, self._phases = conv, memory, dtype, phases
        kernel = 2 if phases else conv.kernel_size[0]
        self._halo = kernel - 1
        self.out_channels = conv.out_channels * (4 if phases else 1)
        self._kept: tuple[torch.Size | None, _Convolve] | None = None

    def _convolve(self, strip: torch.Tensor, pixels: int) -> _Convolve:
        """The convolution of operands like ``strip``, a part of an image of ``pixels``, its weight converted."""
        tile = _TILES[self._halo + 1][pixels >= _LARGE_PIXELS] if self.out_channels >= _FEWEST_CHANNELS else 0
        bf16 = self._dtype == torch.bfloat16
        shape = strip.shape if bf16 else None
        if self._kept is not None and self._kept[0] == shape and (bf16 or not tile):
            return self._kept[1]
        weight, bias = self._conv.weight.detach(), self._conv.bias
        if self._phases:
            weight = phase_weights(weight)
            bias = None if bias is None else bias.repeat(4)
        if bias is not None:
            bias = bias.detach().to(self._dtype)
        if bf16:
            found = _onednn(weight.to(self._dtype), bias, strip)
        elif tile:
            return _winograd(weight, bias, tile, self._memory.arena)
        else:
            found = _short_sums(conv_rows.pack(weight), bias)
        if self._memory.keep_weights:
            if self._kept is None:
                self._memory.kept.append(weight.numel() * self._dtype.itemsize)
            self._kept = shape, found
        return found

    def __call__(self, operand: torch.Tensor, bounds: Sequence[tuple[int, int]]) -> Iterator[_Strip]:
        """Yields ``(first, last, output)`` for every pair in ``bounds``; ``operand`` has one row more above and below.

        Args:
            operand: [H + 2, W, in]; [H, W, in] for a 1 x 1 convolution.
            bounds: rows of H; their outputs have one row more for phases.
        """
        halo = 2 if self._halo else 0
        convolve: _Convolve | None = None
        for first, last in bounds:
            strip = operand[first : last + halo]
            if convolve is None:
                convolve = self._convolve(strip, (operand.shape[0] - halo) * operand.shape[1])
            yield first, last, convolve(strip)

    def whole(self, operand: torch.Tensor) -> torch.Tensor:
        """The output for all rows at once."""
        rows = operand.shape[0] - (2 if self._halo else 0)
        return next(self(operand, [(0, rows)]))[2]


def _short_sums(packed: conv_rows.PackedKernel, bias: torch.Tensor | None) -> _Convolve:
    """fp32 convolution with a kernel of one to three rows and columns."""
    run = backends.resolve("conv_rows", torch.device("cpu"), torch.float32).load()
    less = packed.edge - 1
    padding = min(less, 1)

    def convolve(strip: torch.Tensor) -> torch.Tensor:
        out = torch.empty(
            strip.shape[0] - less, strip.shape[1] + 2 * padding - less, packed.out_channels, dtype=torch.float32
        )
        run(strip, packed, bias, out, padding=padding)
        return out

    return convolve


def _winograd(weight: torch.Tensor, bias: torch.Tensor | None, tile: int, arena: Arena) -> _Convolve:
    """As :func:`_short_sums`, in tiles; the weight's spectra lie in the arena until the next convolution's do."""
    shape = conv_rows.packed_shape(tuple(weight.shape), tile)
    return _short_sums(conv_rows.pack(weight, tile, arena.empty("spectra", shape, torch.float32)), bias)


def _onednn(weight: torch.Tensor, bias: torch.Tensor | None, strip: torch.Tensor) -> _Convolve:
    """oneDNN's channels-last convolution; its weight is reordered for operands like ``strip``."""
    layout = ([0, 1 if weight.shape[2] > 1 else 0], [1, 1], [1, 1], 1)
    shape = [1, strip.shape[2], *strip.shape[:2]]
    reordered = torch.ops.mkldnn._reorder_convolution_weight(weight, *layout, shape)

    def convolve(strip: torch.Tensor) -> torch.Tensor:
        image = strip.permute(2, 0, 1).unsqueeze(0)  # [1, in, h, W], channels last
        out = torch.ops.mkldnn._convolution_pointwise(image, reordered, bias, *layout, "none", [], "")
        rows: torch.Tensor = out.squeeze(0).permute(1, 2, 0).contiguous()
        return rows

    return convolve
