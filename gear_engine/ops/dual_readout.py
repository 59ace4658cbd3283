"""The dual read-out of GEAR: the hard code of every latent vector, and a mixture of a table's rows that has gradients.

For z [N, d], codes e [K, d] and a table [K, C]:

    indices = argmin_k D                    the official hard indices; no gradient
    soft    = softmax_k(-D / tau) @ table   gradients to z, to the codes and to the table

    l2              D = |z|^2 + |e|^2 - 2 z . e
    l2_normalized   the same of L2-normalised z and e (VQ); gradients pass through both normalisations
    inner_product   D = -z . e                        (IBQ)
    lfq             D = -2 z . e over the K = 2^d sign vectors in the order of their indices (LFQ); indices are the
                    sign bits of z. Of several groups, each is a row of its own

It is attention with the latent as a short query and the codes as keys, so the recomputation of FlashAttention applies:
forward keeps the log-sum-exp of every row, backward recomputes the probabilities block by block. With G the gradient of
``soft`` and S = scale (z . e + bias) = -D / tau (up to a term that is the same for all codes):

    P = exp(S - lse)         dS = P * (G table^T - rowsum(G * soft))
    dz = scale dS e          de = scale (dS^T z - [l2] rowsum(dS^T) e)          dtable = P^T G

No backend but the reference holds an N x K array. Source: the soft branch of GEAR ``src/train_gear.py`` with the
distances of its quantizers; recomputation: FlashAttention (arXiv 2205.14135).
"""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
import torch.nn.functional as F

from gear_engine.errors import BackendUnavailableError, InvalidRequestError
from gear_engine.ops import backends, codebook_quantize, native, sign_bits, soft_readout, triton_backend
from gear_engine.ops.readout_kernels import KERNELS, Kernels, Operands
from gear_engine.ops.soft_readout import Distance, check_arguments

__all__ = ["Distance", "dual_readout", "reference"]

DTYPES: Final = frozenset({torch.float32, torch.float64})


def dual_readout(
    z: torch.Tensor,
    codebook: torch.Tensor,
    table: torch.Tensor,
    tau: float,
    distance: Distance,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The module's formulas, checked, by the chosen backend; differentiable once, by the reference any number of times.

    Under autocast the operands are taken in fp32, as torch does for softmax.

    Args:
        z: (N, d), N >= 0; fp32 or fp64. Any strides.
        codebook: (K, d), K >= 1, not normalised; for ``"lfq"`` all of {-1, 1}^d, bit i of the row = channel i.
        table: (K, C), of the same dtype and device.
        tau: temperature, positive and finite.
        distance: which D.
        backend: as in :func:`gear_engine.ops.backends.resolve`.

    Returns:
        (indices int64 (N,), soft (N, C)).

    Raises:
        InvalidRequestError: a shape, dtype, device, tau or the distance does not fit.
        BackendUnavailableError: the named backend cannot run here; or a second derivative was asked of a backend that
            has none.
    """
    if torch.is_autocast_enabled(z.device.type):
        z, codebook, table = z.float(), codebook.float(), table.float()
    check_arguments(z, codebook, table, tau, distance)
    if z.dtype not in DTYPES:
        raise InvalidRequestError(f"dual_readout takes fp32 or fp64, not {z.dtype}")
    if distance == "lfq" and codebook.shape[0] != 2 ** codebook.shape[1]:
        raise InvalidRequestError(f"an lfq codebook of width d has 2^d rows, not {tuple(codebook.shape)}")
    if backend == "reference":
        return reference(z, codebook, table, tau, distance)
    if distance == "l2_normalized":
        # Outside of the op: torch's own normalisation has torch's own gradient.
        z, codebook, distance = F.normalize(z.contiguous(), dim=-1), F.normalize(codebook, dim=-1), "l2"
    soft, _, indices = _forward(z, codebook, table, tau, distance, backend)
    return indices, soft


def reference(
    z: torch.Tensor, codebook: torch.Tensor, table: torch.Tensor, tau: float, distance: Distance
) -> tuple[torch.Tensor, torch.Tensor]:
    """The official form in plain torch; materialises [N, K]. Any float dtype, any order of derivatives."""
    with torch.no_grad():
        if distance == "lfq":
            indices = sign_bits.reference(z)[0][:, 0]
        else:
            indices = codebook_quantize.reference(z, codebook, distance)[0]
    return indices, soft_readout.reference(z, codebook, table, tau, distance)


# ---- the op as torch sees it -----------------------------------------------------------------------------------------


def _kernels(z: torch.Tensor, backend: str) -> Kernels:
    return KERNELS[backends.resolve("dual_readout", z.device, z.dtype, backend).backend]()


@torch.library.custom_op("gear_engine::dual_readout", mutates_args=())
def _forward(
    z: torch.Tensor, codebook: torch.Tensor, table: torch.Tensor, tau: float, distance: str, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(soft, lse of S, indices); z and codebook as they enter the distance."""
    kernels = _kernels(z, backend)
    operands = Operands.make(z, codebook, table, tau, distance)
    if distance == "lfq":
        indices = sign_bits.sign_bits(operands.z)[0][:, 0].contiguous()
    else:
        metric: Any = distance
        indices = codebook_quantize.hard_indices(operands.z, operands.codebook, metric)
    return *kernels.forward(operands), indices


@_forward.register_fake
def _(
    z: torch.Tensor, codebook: torch.Tensor, table: torch.Tensor, tau: float, distance: str, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = z.shape[0]
    return z.new_empty(n, table.shape[1]), z.new_empty(n), z.new_empty(n, dtype=torch.int64)


@torch.library.custom_op("gear_engine::dual_readout_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    delta: torch.Tensor,
    lse: torch.Tensor,
    z: torch.Tensor,
    codebook: torch.Tensor,
    table: torch.Tensor,
    tau: float,
    distance: str,
    needs: list[bool],
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of z, codebook and table; empty where ``needs`` says no."""
    operands = Operands.make(z, codebook, table, tau, distance)
    found = _kernels(z, backend).backward(grad.contiguous(), delta, lse, operands, needs)
    if found.codebook is not None and found.bias is not None and distance == "l2":
        found.codebook.addcmul_(found.bias[:, None], codebook, value=-1)  # bias = -|e|^2 / 2
    none = z.new_empty(0)
    dz, dcodebook, dtable = (none.clone() if one is None else one for one in (found.z, found.codebook, found.table))
    return dz, dcodebook, dtable


@_backward.register_fake
def _(
    grad: torch.Tensor,
    delta: torch.Tensor,
    lse: torch.Tensor,
    z: torch.Tensor,
    codebook: torch.Tensor,
    table: torch.Tensor,
    tau: float,
    distance: str,
    needs: list[bool],
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = [operand.shape if need else (0,) for operand, need in zip((z, codebook, table), needs, strict=True)]
    dz, dcodebook, dtable = (z.new_empty(shape) for shape in shapes)
    return dz, dcodebook, dtable


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    z, codebook, table, ctx.tau, ctx.distance, ctx.backend = inputs
    ctx.save_for_backward(z, codebook, table, *output[:2])


def _differentiate(
    ctx: Any, grad: torch.Tensor, grad_lse: torch.Tensor, _indices: Any
) -> tuple[torch.Tensor | None, ...]:
    z, codebook, table, soft, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    delta = torch.linalg.vecdot(grad, soft) - grad_lse  # d lse / dS = P
    found = _backward(grad, delta, lse, z, codebook, table, ctx.tau, ctx.distance, needs, ctx.backend)
    return *(one if need else None for one, need in zip(found, needs, strict=True)), None, None, None


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise BackendUnavailableError(
        "dual_readout is differentiable once; ask for backend='reference' where second derivatives are needed"
    )


_forward.register_autograd(_differentiate, setup_context=_keep)
_backward.register_autograd(_refuse)


backends.register("dual_readout", "reference", lambda: reference)
backends.register("dual_readout", "chunked", lambda: functools.partial(dual_readout, backend="chunked"), dtypes=DTYPES)
triton_backend.register(
    "dual_readout", frozenset({torch.float32}), load=lambda: functools.partial(dual_readout, backend="triton")
)
backends.register(
    "dual_readout",
    "cpu",
    lambda: functools.partial(dual_readout, backend="cpu"),
    devices=frozenset({"cpu"}),
    dtypes=frozenset({torch.float32}),
    unavailable=lambda: native.unavailable("dual_readout_backward_cpu"),
)
