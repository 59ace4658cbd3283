"""Memory of the CPU decoder: reused pages, one image's activations in channels-last rows, strips of rows.

Fresh pages cost a decoder as much as its arithmetic (a 256 px image at 128 channels is 32 MiB in fp32, every residual
block would map and fault in several of those), so the large tensors live in an :class:`Arena`, in large pages where the
system has them, and convolutions produce strips small enough for the allocator to recycle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from gear_engine.ops import backends
from gear_engine.pages import LargePages

__all__ = ["Arena", "Canvas"]

#: Bytes of one convolution's output: small enough to stay in cache and be recycled, large enough to keep it efficient.
STRIP_BYTES: Final = 4 << 20
STRIP_ROWS: Final = 4


class Arena:
    """Named buffers that grow and are never returned to the system before :meth:`release`."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor in buffer ``name``; what the buffer held before is overwritten."""
        count = dtype.itemsize
        for size in shape:
            count *= size
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[name] = LargePages().zeros((count,), torch.uint8, torch.device("cpu"))
        return buffer[:count].view(dtype).view(shape)

    @property
    def nbytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers.values())

    def release(self) -> None:
        """Gives all memory back."""
        self._buffers.clear()


class Canvas:
    """One image on its way through the decoder: the fp32 residual stream and its moments.

    Attributes:
        x: residual stream, fp32 [H, W, C].
        moments: float64 [H, groups, 2], sums of every row of ``x``; see :mod:`gear_engine.ops.residual_moments`.
        dtype: operands of the convolutions.
    """

    def __init__(self, arena: Arena, dtype: torch.dtype, num_groups: int) -> None:
        self._arena = arena
        self._num_groups = num_groups
        self._parity = 0
        self.dtype = dtype
        cpu = torch.device("cpu")
        self._norm: Callable[..., Any] = backends.resolve("group_norm_silu", cpu, dtype).load()
        self._merge: Callable[..., Any] = backends.resolve("residual_moments", cpu, dtype).load()
        self.x = torch.empty(0, dtype=torch.float32)
        self.moments = torch.empty(0, dtype=torch.float64)

    def replace(self, height: int, width: int, channels: int) -> None:
        """Makes ``x`` a new, uninitialised stream; the old one stays readable until the next call."""
        self._parity ^= 1
        self.x = self._arena.empty(f"x{self._parity}", (height + 2, width, channels), torch.float32)[1:-1]
        self.moments = torch.empty(height, self._num_groups, 2, dtype=torch.float64)

    def strips(self, channels: int, *, tile: int = STRIP_ROWS, overlap: int = 0) -> Iterator[tuple[int, int]]:
        """Cuts the rows of ``x`` so that one strip's convolution output is about ``STRIP_BYTES``.

        Args:
            channels: output channels of the convolution.
            tile: rows of a convolution's tile; every strip but the last has whole ones.
            overlap: rows of its output that a strip has more.
        """
        height, width = self.x.shape[:2]
        most = max(1, STRIP_BYTES // (tile * width * channels * self.dtype.itemsize))
        count = -(-height // (most * tile - overlap))
        # Strips of about one size.
        rows = -(-(height + count * overlap) // (count * tile)) * tile - overlap
        for first in range(0, height, rows):
            yield first, min(first + rows, height)

    def padded(self) -> torch.Tensor:
        """An operand [H + 2, W, C] in the convolutions' dtype with zero rows above and below; rows 1 .. H are free."""
        height, width, channels = self.x.shape
        operand = self._arena.empty("operand", (height + 2, width, channels), self.dtype)
        operand[0] = 0
        operand[-1] = 0
        return operand

    def stream(self) -> torch.Tensor:
        """``x`` as an operand like :meth:`padded`: in fp32 where it lies, between rows that nobody else reads."""
        height, width, channels = self.x.shape
        if self.dtype != torch.float32:
            operand = self.padded()
            operand[1:-1].copy_(self.x)
            return operand
        operand = self._arena.empty(f"x{self._parity}", (height + 2, width, channels), torch.float32)
        operand[0] = 0
        operand[-1] = 0
        return operand

    def normalised(self, norm: torch.nn.GroupNorm, out: torch.Tensor, *, silu: bool = True) -> torch.Tensor:
        """``silu(norm(x))`` written to ``out`` [H, W, C]."""
        self._norm(self.x, self.moments, norm.weight, norm.bias, out, eps=norm.eps, silu=silu)
        return out

    def normalise_strips(
        self, norm: torch.nn.GroupNorm, strips: list[torch.Tensor], moments: torch.Tensor, out: torch.Tensor
    ) -> None:
        """``silu(norm(strips))`` written to ``out``, strip below strip."""
        first = 0
        for strip in strips:
            last = first + strip.shape[0]
            self._norm(strip, moments, norm.weight, norm.bias, out[first:last], eps=norm.eps)
            first = last

    def rescale(self, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> None:
        """``x = group_norm(x) * scale + shift`` in place, per channel."""
        self._norm(self.x, self.moments, scale, shift, self.x, eps=eps, silu=False)
        self.moments_of(self.x, self.moments)

    def moments_of(self, rows: torch.Tensor, moments: torch.Tensor) -> None:
        """Takes the moments of ``rows`` [h, W, C]."""
        self._merge(rows, None, moments)

    def put(self, rows: torch.Tensor, first: int, *, accumulate: bool, phase_offset: int | None = None) -> None:
        """Stores or adds ``rows`` from row ``first`` of ``x`` on and takes their moments."""
        height = rows.shape[0] if phase_offset is None else 2 * (rows.shape[0] - phase_offset)
        part = slice(first, first + height)
        self._merge(rows, self.x[part], self.moments[part], accumulate=accumulate, phase_offset=phase_offset)
