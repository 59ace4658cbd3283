"""Soft read-out of GEAR's dual read-out: every latent vector as a mixture of a table's rows.

For z [N, d], codes e [K, d] and a table [K, C]:

    out = softmax_k(-D / tau) @ table

    l2              D = |z|^2 + |e|^2 - 2 z . e
    l2_normalized   the same of L2-normalised z and e (VQ)
    inner_product   D = -z . e                        (IBQ)
    lfq             D = -2 z . e                      (LFQ; e holds the sign vectors)

The compiled form walks over the codes in blocks with an online softmax, so that no N x K array exists; |z|^2 cancels
and is left out. Results agree with the reference to 1e-4 (max|a - b| / max|b|, fp32).

Source: the soft branch of GEAR ``src/train_gear.py``; distances as the official quantizers return them.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from gear_engine.errors import InvalidRequestError
from gear_engine.ops import backends, native, triton_backend
from gear_engine.ops.readout_kernels import KERNELS, Operands

__all__ = ["Distance", "check_arguments", "reference", "soft_readout"]

Distance = Literal["l2", "l2_normalized", "inner_product", "lfq"]


def soft_readout(
    z: torch.Tensor,
    codebook: torch.Tensor,
    table: torch.Tensor,
    tau: float,
    distance: Distance,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """The module's formula, checked, by the chosen backend. Only the reference is differentiable.

    Args:
        z: (N, d); fp32 for the compiled backend. Any strides.
        codebook: (K, d), K >= 1.
        table: (K, C), of the same dtype and device.
        tau: temperature, positive and finite.
        distance: which D.
        backend: as in :func:`gear_engine.ops.backends.resolve`.

    Returns:
        (N, C).

    Raises:
        InvalidRequestError: a shape, dtype, device, tau or the distance does not fit, or a gradient is asked of a
            compiled backend.
        BackendUnavailableError: the named backend cannot run here.
    """
    check_arguments(z, codebook, table, tau, distance)
    operands = (z, codebook, table)
    chosen = backends.resolve("soft_readout", z.device, z.dtype, backend)
    if chosen.backend != "reference" and torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
        raise InvalidRequestError(
            f"the {chosen.backend!r} backend has no gradient; use dual_readout, backend='reference' or torch.no_grad()"
        )
    out: torch.Tensor = chosen.load()(z, codebook, table, tau, distance)
    return out


def check_arguments(z: torch.Tensor, codebook: torch.Tensor, table: torch.Tensor, tau: float, distance: str) -> None:
    """What soft_readout and dual_readout ask of their arguments.

    Raises:
        InvalidRequestError: a shape, dtype, device, tau or the distance does not fit.
    """
    if distance not in get_args(Distance):
        raise InvalidRequestError(f"distance must be one of {', '.join(get_args(Distance))}, got {distance!r}")
    if not (torch.finfo(z.dtype).tiny if z.is_floating_point() else 0) < tau < math.inf:
        raise InvalidRequestError(f"tau must be positive and finite, 1 / tau too, got {tau}")
    shapes = f"z {tuple(z.shape)}, codebook {tuple(codebook.shape)}, table {tuple(table.shape)}"
    if z.ndim != 2 or codebook.ndim != 2 or table.ndim != 2 or z.shape[1] != codebook.shape[1]:
        raise InvalidRequestError(f"z (N, d), codebook (K, d) and table (K, C) do not fit: {shapes}")
    if min(*codebook.shape, table.shape[1]) < 1 or table.shape[0] != codebook.shape[0]:
        raise InvalidRequestError(f"codebook (K, d) and table (K, C) do not fit or are empty: {shapes}")
    if not (z.dtype == codebook.dtype == table.dtype and z.device == codebook.device == table.device):
        raise InvalidRequestError("z, codebook and table must share dtype and device")


def reference(
    z: torch.Tensor, codebook: torch.Tensor, table: torch.Tensor, tau: float, distance: Distance
) -> torch.Tensor:
    """Plain torch; materialises [N, K]."""
    if distance == "l2_normalized":
        z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
    d = -(z @ codebook.t())  # [N, K]
    if distance != "inner_product":
        d = 2 * d
    if distance in ("l2", "l2_normalized"):
        d = z.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1) + d
    return F.softmax(-d / tau, dim=-1) @ table


def _run(
    backend: str, z: torch.Tensor, codebook: torch.Tensor, table: torch.Tensor, tau: float, distance: Distance
) -> torch.Tensor:
    if distance == "l2_normalized":
        z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
    return KERNELS[backend]().forward(Operands.make(z, codebook, table, tau, distance))[0]


backends.register("soft_readout", "reference", lambda: reference)
triton_backend.register("soft_readout", frozenset({torch.float32}), load=lambda: functools.partial(_run, "triton"))
backends.register(
    "soft_readout",
    "cpu",
    lambda: functools.partial(_run, "cpu"),
    devices=frozenset({"cpu"}),
    dtypes=frozenset({torch.float32}),
    unavailable=lambda: native.unavailable("soft_readout_cpu"),
)
