"""The call of the CUDA kernel of :mod:`gear_engine.ops.sample_tokens`, which registers it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gear_engine.ops import native

if TYPE_CHECKING:
    from gear_engine.ops.sample_tokens import SamplingTable, TokenSink

__all__ = ["run"]


def run(
    logits: torch.Tensor,
    table: SamplingTable,
    *,
    noise: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    sink: TokenSink | None = None,
) -> torch.Tensor:
    """Compiled; the arithmetic of the CPU kernel where that has fused multiply-adds. Reads nothing on the host."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    out = torch.empty(table.images, dtype=torch.int64, device=logits.device)
    # Copies are kept alive during the call.
    slots = None if sink is None else sink.slots
    optional = [None if x is None else x.contiguous() for x in (noise, seeds, positions, table.draws, slots)]
    noise_at, seeds_at, positions_at, draws_at, slots_at = (0 if x is None else x.data_ptr() for x in optional)
    kept = (0, 0) if sink is None else (sink.tokens.data_ptr(), sink.tokens.stride(0))
    with native.cuda_kernels(logits.device) as (kernels, stream):
        kernels.sample_tokens_cuda(
            table.images, logits.shape[1], logits.data_ptr(), logits.stride(0), table.uncond_rows.data_ptr(),
            table.cfg_scale.data_ptr(), table.temperature.data_ptr(), table.top_k.data_ptr(), table.top_p.data_ptr(),
            table.greedy.data_ptr(), noise_at, seeds_at, positions_at, draws_at, out.data_ptr(), *kept, slots_at,
            stream,
        )  # fmt: skip
    return out
