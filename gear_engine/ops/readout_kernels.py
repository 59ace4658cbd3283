"""What soft_readout and dual_readout run: the read-out and its gradients, per backend. No op: the checks are theirs.

With S = scale (z . e + bias), which is -D / tau up to a term that is the same for all codes of a row:

    forward     lse = log sum_k exp(S)      soft = exp(S - lse) @ table
    backward    P = exp(S - lse)            dS = scale P * (G table^T - delta)
                dz = dS e                   de = dS^T z        dbias = colsum(dS)        dtable = P^T G

No backend holds an N x K array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import torch

from gear_engine.ops import native, triton_backend

__all__ = ["KERNELS", "Gradients", "Kernels", "Operands"]

#: Scores that the chunked backend holds at once, per array: 16 MiB in fp32.
_BLOCK_SCORES: Final = 2**22


class Operands(NamedTuple):
    """What every kernel reads: contiguous z (N, d), codebook (K, d), bias (K,), table (K, C), and scale.

    -D / tau = scale (z . e + bias) up to a term that is the same for all codes of a row.
    """

    z: torch.Tensor
    codebook: torch.Tensor
    bias: torch.Tensor
    table: torch.Tensor
    scale: float

    @classmethod
    def make(cls, z: torch.Tensor, codebook: torch.Tensor, table: torch.Tensor, tau: float, distance: str) -> Operands:
        """z and codebook as they enter the distance: already normalised."""
        z, codebook, table = z.contiguous(), codebook.contiguous(), table.contiguous()
        if distance in ("l2", "l2_normalized"):
            return cls(z, codebook, codebook.square().sum(dim=1).mul_(-0.5), table, 2.0 / tau)
        scale = (1.0 if distance == "inner_product" else 2.0) / tau
        return cls(z, codebook, codebook.new_zeros(codebook.shape[0]), table, scale)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """N, K, d, C."""
        return self.z.shape[0], *self.codebook.shape, self.table.shape[1]


class Gradients(NamedTuple):
    """None where not asked for; the bias goes with the codebook."""

    z: torch.Tensor | None
    codebook: torch.Tensor | None
    bias: torch.Tensor | None
    table: torch.Tensor | None

    @classmethod
    def allocate(cls, operands: Operands, needs: list[bool]) -> Gradients:
        """z's left as it is, since every row is written once; zeros to add to for the others."""
        zeros = [
            torch.zeros_like(operand) if need else None
            for operand, need in zip(operands[1:4], (needs[1], *needs[1:]), strict=True)
        ]
        return cls(torch.empty_like(operands.z) if needs[0] else None, *zeros)


class Kernels(NamedTuple):
    """One implementation.

    Attributes:
        forward: (operands) -> (soft, lse [N]).
        backward: (grad, delta [N], lse, operands, needs) -> gradients; delta = rowsum(G * soft), needs = for which of
            z, codebook, table; grad is contiguous.
    """

    forward: Callable[[Operands], tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Operands, list[bool]], Gradients]


# ---- plain torch in blocks of rows -----------------------------------------------------------------------------------


def _scores(operands: Operands) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, S of these rows [rows, K]) block by block, in one buffer."""
    z, codebook, bias, _, scale = operands
    block = max(1, _BLOCK_SCORES // codebook.shape[0])
    buffer = z.new_empty(min(block, z.shape[0]), codebook.shape[0])
    for start in range(0, z.shape[0], block):
        part = z[start : start + block]
        scores = buffer[: part.shape[0]]
        torch.addmm(bias, part, codebook.t(), beta=scale, alpha=scale, out=scores)
        yield slice(start, start + part.shape[0]), scores


def _allocate_forward(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    rows, _, _, width = operands.sizes
    return operands.z.new_empty(rows, width), operands.z.new_empty(rows)


def _chunked_forward(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    soft, lse = _allocate_forward(operands)
    for rows, scores in _scores(operands):
        torch.logsumexp(scores, dim=1, out=lse[rows])
        scores.sub_(lse[rows, None]).exp_()
        torch.mm(scores, operands.table, out=soft[rows])
    return soft, lse


def _chunked_backward(
    grad: torch.Tensor, delta: torch.Tensor, lse: torch.Tensor, operands: Operands, needs: list[bool]
) -> Gradients:
    z, codebook, _, table, scale = operands
    found = Gradients.allocate(operands, needs)
    scratch: torch.Tensor | None = None
    for rows, scores in _scores(operands):
        weights = scores.sub_(lse[rows, None]).exp_()
        if found.table is not None:
            found.table.addmm_(weights.t(), grad[rows])
        if not (needs[0] or needs[1]):
            continue
        scratch = torch.empty_like(scores) if scratch is None else scratch[: scores.shape[0]]
        d_scores = torch.mm(grad[rows], table.t(), out=scratch).sub_(delta[rows, None]).mul_(weights)
        if found.z is not None:
            torch.mm(d_scores, codebook, out=found.z[rows]).mul_(scale)
        if found.codebook is not None and found.bias is not None:
            found.codebook.addmm_(d_scores.t(), z[rows], alpha=scale)
            found.bias.add_(d_scores.sum(dim=0), alpha=scale)
    return found


# ---- kernels --------------------------------------------------------------------------------------------------------


def _cpu_forward(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    soft, lse = _allocate_forward(operands)
    native.cpu_kernels().soft_readout_cpu(
        *(operand.data_ptr() for operand in operands[:4]),
        *operands.sizes,
        operands.scale,
        soft.data_ptr(),
        lse.data_ptr(),
    )
    return soft, lse


def _cpu_backward(
    grad: torch.Tensor, delta: torch.Tensor, lse: torch.Tensor, operands: Operands, needs: list[bool]
) -> Gradients:
    found = Gradients.allocate(operands, needs)
    native.cpu_kernels().dual_readout_backward_cpu(
        *(operand.data_ptr() for operand in (grad, delta, lse, *operands[:4])),
        *operands.sizes,
        operands.scale,
        *(0 if one is None else one.data_ptr() for one in found),
    )
    return found


def _triton_kernels() -> Kernels:
    forward, backward = triton_backend.kernel("soft_readout"), triton_backend.kernel("dual_readout")
    return Kernels(
        lambda operands: forward(*operands),
        lambda grad, delta, lse, operands, needs: Gradients(*backward(grad, delta, lse, *operands, needs)),
    )


KERNELS: Final[dict[str, Callable[[], Kernels]]] = {
    "chunked": lambda: Kernels(_chunked_forward, _chunked_backward),
    "cpu": lambda: Kernels(_cpu_forward, _cpu_backward),
    "triton": _triton_kernels,
}
