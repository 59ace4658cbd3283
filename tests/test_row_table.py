"""The table of rows: one buffer, aligned, filled with what a step needs to know."""

from __future__ import annotations

from dataclasses import replace

import torch

from gear_engine.request import SamplingParams
from gear_engine.row_table import ARRAYS, RowTable
from gear_engine.segments import TableRow

CPU = torch.device("cpu")

P = SamplingParams


class TestRowTable:
    row = TableRow(slot=4, image_slot=4, position=9, partner=1, seed=2**62 + 1, params=P(cfg_scale=2.5, top_p=0.5))
    other = TableRow(slot=5, image_slot=4, position=9, partner=-1, seed=2**62 + 1, params=row.params)

    def test_layout(self) -> None:
        table = RowTable(6, CPU)
        starts = [getattr(table, name).data_ptr() - table.buffer.data_ptr() for name, _ in ARRAYS]
        assert starts == sorted(starts)
        assert all(start % 16 == 0 for start in starts)
        assert all(getattr(table, name).shape == (6,) for name, _ in ARRAYS)
        assert table.buffer.numel() == RowTable.nbytes(6)

    def test_filled(self) -> None:
        table = RowTable(4, CPU)
        table.fill([self.row, self.other], launched=100, vocab_size=61)
        assert table.slots.tolist() == [4, 5, -1, -1]
        assert table.image_slots.tolist() == [4, 4, -1, -1]
        assert table.draw_slots.tolist() == [4, -1, -1, -1]
        assert table.draws.tolist() == [True, False, False, False]
        assert table.bases.tolist() == [-91, -91, 0, 0]
        assert table.partners.tolist() == [1, -1, -1, -1]
        assert table.seeds.tolist() == [2**62 + 1] * 2 + [0, 0]
        assert table.labels.tolist() == [0] * 4
        assert table.top_k.tolist() == [61] * 4
        assert table.top_p.tolist() == [0.5, 0.5, 1, 1]

    def test_rows_that_start(self) -> None:
        """Their token 0 has index -1 before it; the unconditional half has a label of its own."""
        table = RowTable(4, CPU)
        rows = [replace(self.row, position=-1), replace(self.other, position=-1)]
        table.fill(rows, launched=7, vocab_size=61, labels=[3, 9])
        assert table.labels.tolist() == [3, 9, 0, 0]
        assert table.bases.tolist() == [-8, -8, 0, 0]

    def test_a_copy_of_the_buffer_is_the_table(self) -> None:
        host, device = RowTable(3, CPU), RowTable(3, CPU)
        host.fill([self.row], launched=0, vocab_size=61)
        device.buffer.copy_(host.buffer)
        for name, _ in ARRAYS:
            assert torch.equal(getattr(host, name), getattr(device, name))
