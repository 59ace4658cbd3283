"""CPU memory in large pages: 2 MiB instead of 4 KiB, where Linux grants them to who asks.

A decode step reads all weights and a part of the cache, more pages than a core remembers the addresses of: with small
pages it waits for look-ups. Where the system grants none, and on other systems, memory is as ever; no number changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
from collections.abc import Iterable, Sequence
from typing import Final

import torch

__all__ = ["LargePages", "collapse"]

#: Size of a large page on the machines that we know.
PAGE: Final = 2 << 20
#: Bytes of address space that are asked for at a time; what nobody touches takes no memory.
_BLOCK: Final = 64 << 20
_CACHE_LINE: Final = 64
#: ``MADV_COLLAPSE`` of Linux 6.1.
_MADV_COLLAPSE: Final = 25


class LargePages:
    """Hands out tensors from blocks of memory in large pages; a block is free again once all its tensors are."""

    def __init__(self) -> None:
        self._block: mmap.mmap | None = None
        self._begin = self._end = 0

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
        """As ``torch.zeros``; raises MemoryError."""
        size = math.prod(shape) * dtype.itemsize
        advice = getattr(mmap, "MADV_HUGEPAGE", None)
        if advice is None or size == 0 or (device or torch.get_default_device()).type != "cpu":
            return torch.zeros(tuple(shape), dtype=dtype, device=device)
        begin = -(-self._begin // _CACHE_LINE) * _CACHE_LINE
        if self._block is None or begin + size > self._end:
            self._block, begin, self._end = _new_block(max(size, _BLOCK), advice)
        self._begin = begin + size
        flat = torch.frombuffer(self._block, dtype=dtype, count=math.prod(shape), offset=begin)
        return flat.view(tuple(shape))


def _new_block(size: int, advice: int) -> tuple[mmap.mmap, int, int]:
    """Memory, zero, and where its ``size`` bytes begin and end: at a large page."""
    length = size + PAGE
    try:
        block = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{length} bytes: {error}") from error
    with contextlib.suppress(OSError):  # a kernel that was built without large pages
        block.madvise(advice)
    begin = -torch.frombuffer(block, dtype=torch.uint8, count=1).data_ptr() % PAGE
    return block, begin, begin + size


def collapse(tensors: Iterable[torch.Tensor]) -> int:
    """Moves the memory of CPU tensors into large pages, as far as it fills some and Linux can; returns their bytes.

    Contents and addresses stay. Takes up to a few seconds per gigabyte.
    """
    if not sys.platform.startswith("linux"):
        return 0
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    spans = sorted({(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors if t.is_cpu})
    done, reached = 0, 0
    for address, size in spans:
        # Neighbours share pages: whole pages from the one that a tensor begins in to the one it ends in. What else lies
        # there moves too; a page that does not belong to this process as a whole is refused.
        end = -(-(address + size) // PAGE) * PAGE
        for page in range(max(address // PAGE * PAGE, reached), end, PAGE):
            done += PAGE if libc.madvise(page, PAGE, _MADV_COLLAPSE) == 0 else 0
        reached = max(reached, end)
    return done
