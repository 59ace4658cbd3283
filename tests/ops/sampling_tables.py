"""Sampling tables as captured steps use them."""

from __future__ import annotations

import torch

from gear_engine.ops.sample_tokens import SamplingTable


def table_of_rows(table: SamplingTable) -> SamplingTable:
    """The same settings with a row of the table per row of logits, where unconditional rows do not draw, and without
    what the host knows of them."""

    def padded(values: torch.Tensor, value: float) -> torch.Tensor:
        return torch.nn.functional.pad(values, (0, table.rows - table.images), value=value)

    return SamplingTable(
        cfg_scale=padded(table.cfg_scale, 1),
        uncond_rows=padded(table.uncond_rows, -1),
        temperature=padded(table.temperature, 1),
        top_k=padded(table.top_k, 1),
        top_p=padded(table.top_p, 1),
        greedy=padded(table.greedy, True),
        rows=table.rows,
        params=None,
        paired=False,
        uniform=None,
        draws=torch.arange(table.rows, device=table.greedy.device) < table.images,
    )
