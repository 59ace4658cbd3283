"""Which images a process draws, and in which batches."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["chunks", "official_batches", "strided"]


def official_batches(count: int, batch: int, world_size: int, rank: int) -> list[list[int]]:
    """The batches of GEAR ``src/inference.py``: all full; numbers from ``count`` on are drawn and dropped.

    Entry i of a batch is image ``i * world_size + rank`` plus the images of the batches before.
    """
    step = batch * world_size
    return [[start + i * world_size + rank for i in range(batch)] for start in range(0, count, step)]


def strided(count: int, world_size: int, rank: int) -> list[int]:
    """Every ``world_size``-th image from ``rank`` on: rank's share in each program of GEAR."""
    return list(range(rank, count, world_size))


def chunks(indices: Iterable[int], size: int) -> list[list[int]]:
    """``indices`` in order, ``size`` at a time, the last chunk as long as is left."""
    items = list(indices)
    return [items[start : start + size] for start in range(0, len(items), size)]
