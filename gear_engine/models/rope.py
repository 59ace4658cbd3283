"""Two-dimensional rotary position embedding of image tokens."""

from __future__ import annotations

import torch

from gear_engine.config import GeneratorConfig

__all__ = ["rope_table"]


def rope_table(config: GeneratorConfig, device: torch.device | None = None) -> torch.Tensor:
    """(cos, sin) of every image-token position: fp32 (block_size, head_dim / 2, 2).

    The first head_dim / 4 pairs turn by the token's row, the next head_dim / 4 by its column, with frequencies
    ``base^(-2j / (head_dim / 2))``, j = 0 ... head_dim / 4 - 1. Prefix tokens have no rows here: the official table
    holds zeros for them, cosine included, so that their queries and keys vanish.

    Source: GEAR ``models/llamagen.py``, ``precompute_freqs_cis_2d``.
    """
    half = config.head_dim // 2
    exponents = torch.arange(0, half, 2, device=device).float() / half
    frequencies = 1.0 / config.rope_base**exponents  # [D / 4]
    angles = torch.outer(torch.arange(config.grid_size, device=device).float(), frequencies)  # [grid, D / 4]
    grid = (config.grid_size, config.grid_size, half // 2)
    by_row = angles[:, None, :].expand(grid)
    by_column = angles[None, :, :].expand(grid)
    both = torch.cat((by_row, by_column), dim=-1).flatten(0, 1)  # [block_size, D / 2]
    return torch.stack((both.cos(), both.sin()), dim=-1)
