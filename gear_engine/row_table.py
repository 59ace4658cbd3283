"""The device table that a captured step reads its rows from.

A structure of arrays in one buffer, so that an update is one copy; entry r of every array belongs to row r:

    array         type     meaning
    slots         int64    cache slot, -1 for an inert row
    image_slots   int64    row of the token table that the row's tokens are read from; -1 for an inert row
    draw_slots    int64    row of the token table that its drawn token goes to; -1 for a row that does not draw
    bases         int64    image-token index of the token fed = base + step counter
    partners      int64    row with the unconditional half, -1 without guidance
    seeds         int64    key of the image's random stream
    labels        int64    class whose prefix starts the row, where a row starts
    top_k         int64    in [1, V]
    cfg_scale     fp32
    temperature   fp32     at least 1e-5
    top_p         fp32     in (0, 1]
    greedy        bool
    draws         bool     draw_slots >= 0

The step counter is a device number that every step increments and nobody else writes: the host knows how many steps it
has launched, and chooses ``base = position - launched``, which may be negative. Row -1 of the token table is its last
one, which belongs to no slot: what rows that do not draw write lands there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from gear_engine.ops.sample_tokens import SamplingTable
from gear_engine.segments import INERT, TableRow

__all__ = ["ARRAYS", "RowTable"]

#: (name, dtype) of every array, in the order in which they lie in the buffer.
ARRAYS: Final = (
    ("slots", torch.int64),
    ("image_slots", torch.int64),
    ("draw_slots", torch.int64),
    ("bases", torch.int64),
    ("partners", torch.int64),
    ("seeds", torch.int64),
    ("labels", torch.int64),
    ("top_k", torch.int64),
    ("cfg_scale", torch.float32),
    ("temperature", torch.float32),
    ("top_p", torch.float32),
    ("greedy", torch.bool),
    ("draws", torch.bool),
)
_ALIGNMENT = 16


class RowTable:
    """The arrays as views of one buffer, for up to ``capacity`` rows; each array starts at a multiple of 16 bytes.

    Args:
        buffer: uint8 (nbytes(capacity),) to lie in; None allocates one, every row inert.
    """

    slots: torch.Tensor
    image_slots: torch.Tensor
    draw_slots: torch.Tensor
    bases: torch.Tensor
    partners: torch.Tensor
    seeds: torch.Tensor
    labels: torch.Tensor
    top_k: torch.Tensor
    cfg_scale: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    greedy: torch.Tensor
    draws: torch.Tensor

    def __init__(self, capacity: int, device: torch.device, buffer: torch.Tensor | None = None) -> None:
        self.capacity = capacity
        self.buffer = torch.zeros(self.nbytes(capacity), dtype=torch.uint8, device=device) if buffer is None else buffer
        start = 0
        for name, dtype in ARRAYS:
            size = capacity * dtype.itemsize
            setattr(self, name, self.buffer[start : start + size].view(dtype))
            start += -(-size // _ALIGNMENT) * _ALIGNMENT
        if buffer is None:
            self.fill((), 0, 1)

    @staticmethod
    def nbytes(capacity: int) -> int:
        """Bytes of the buffer."""
        return sum(-(-capacity * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for _, dtype in ARRAYS)

    def fill(self, rows: Sequence[TableRow], launched: int, vocab_size: int, labels: Sequence[int] = ()) -> None:
        """Writes ``rows``, and makes the rest inert; for a table on the host, or one that no step has read yet.

        Args:
            launched: what the step counter holds when the first step on these rows begins.
            vocab_size: V, what top-k 0 means.
            labels: of rows that start, one each.
        """
        params = [row.params for row in rows]
        idle = self.capacity - len(rows)
        columns: dict[str, list[int] | list[float] | list[bool]] = {
            "slots": [row.slot for row in rows] + [INERT] * idle,
            "image_slots": [row.image_slot for row in rows] + [INERT] * idle,
            "draw_slots": [row.slot if row.draws else INERT for row in rows] + [INERT] * idle,
            "bases": [row.position - launched for row in rows] + [0] * idle,
            "partners": [row.partner for row in rows] + [-1] * idle,
            "seeds": [row.seed for row in rows] + [0] * idle,
            "labels": [*labels, *[0] * (self.capacity - len(labels))],
            "top_k": [min(p.top_k, vocab_size) or vocab_size for p in params] + [vocab_size] * idle,
            "cfg_scale": [p.cfg_scale for p in params] + [1.0] * idle,
            "temperature": [max(p.temperature, 1e-5) for p in params] + [1.0] * idle,
            "top_p": [p.top_p for p in params] + [1.0] * idle,
            "greedy": [not p.sample_logits for p in params] + [True] * idle,
            "draws": [row.draws for row in rows] + [False] * idle,
        }
        for name, dtype in ARRAYS:
            getattr(self, name).copy_(torch.tensor(columns[name], dtype=dtype))

    def sampling(self, rows: int) -> SamplingTable:
        """The first ``rows`` rows as the sampler takes them: every row an image, of which some do not draw."""
        return SamplingTable(
            cfg_scale=self.cfg_scale[:rows],
            uncond_rows=self.partners[:rows],
            temperature=self.temperature[:rows],
            top_k=self.top_k[:rows],
            top_p=self.top_p[:rows],
            greedy=self.greedy[:rows],
            rows=rows,
            params=None,
            paired=False,
            uniform=None,
            draws=self.draws[:rows],
        )
