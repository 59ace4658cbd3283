"""Nearest code of every latent vector, with the official index: hard vector quantization.

For vectors z [N, d] and codes e [K, d], all in fp32:

    l2              D = (|z|^2 + |e|^2) - 2 z . e       index = argmin_k D, the lowest of equals
    l2_normalized   the same of z / max(|z|, 1e-12) and e / max(|e|, 1e-12)
    inner_product   p = softmax_k(z . e)                index = argmax_k p, the lowest of equals

    quantized = e[index]                                (of the normalised e for l2_normalized)

Near-ties are decided by rounding, so the compiled implementations say which rounding: |z|^2, |e|^2 and the normalised
vectors are torch's own; z . e is a chain of fused multiply-adds in ascending order of the dimension, which is what the
fp32 product below torch computes for d up to 384 (past that, and for a few rows of d > 128, it splits the sum by a rule
of its own, and the choice among codes whose distances differ by a rounding is as good as its); p's maximum is shared by
the codes with max_k z . e - z . e <= 2^-25, where exp() rounds to 1.

No N x K array exists: memory is O(N + K d). Blocks of rows walk over the codebook with approximate scores in registers;
the codes that the error bound leaves open are decided by the formula above. The idea of a transposed codebook with the
running maximum in registers is that of faiss (``distances_fused``); the formula is GEAR's ``models/vq_model.py`` and
``models/ibq_model.py``.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F

from gear_engine.ops import backends, native, triton_backend

__all__ = ["Metric", "codebook_quantize", "hard_indices", "reference"]

Metric = Literal["l2", "l2_normalized", "inner_product"]

MAX_CODES = 2**18
MAX_WIDTH = 512
#: Elements up to which torch stays on the calling thread (one less than its grain size).
SERIAL_ELEMENTS = 32767
#: Rows per block where the reference would otherwise materialise an [N, K] array.
_BLOCK_ROWS = 4096


def codebook_quantize(
    z: torch.Tensor, codebook: torch.Tensor, metric: Metric, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The module's formula, checked, by the chosen backend. Not differentiable: no gradient is recorded.

    Args:
        z: (N, d), N >= 0, 1 <= d <= 512; fp32 for the compiled backends. Any strides.
        codebook: (K, d), 1 <= K <= 2**18, of z's dtype and device.
        metric: ``"l2"``, ``"l2_normalized"`` or ``"inner_product"``.
        backend: as in :func:`gear_engine.ops.backends.resolve`.

    Returns:
        (indices int64 (N,), quantized (N, d) of z's dtype).

    Raises:
        ValueError: a shape, dtype, device or the metric does not fit.
        BackendUnavailableError: the named backend cannot run here.
    """
    if metric not in get_args(Metric):
        raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}, got {metric!r}")
    if z.ndim != 2 or codebook.ndim != 2 or z.shape[1] != codebook.shape[1]:
        raise ValueError(f"z (N, d) and codebook (K, d) do not fit: {tuple(z.shape)}, {tuple(codebook.shape)}")
    if not 1 <= codebook.shape[0] <= MAX_CODES or not 1 <= codebook.shape[1] <= MAX_WIDTH:
        raise ValueError(f"codebook must have 1 to {MAX_CODES} rows and 1 to {MAX_WIDTH} columns")
    if z.dtype != codebook.dtype or z.device != codebook.device:
        raise ValueError(f"z is {z.dtype} on {z.device}, codebook {codebook.dtype} on {codebook.device}")
    run = backends.resolve("codebook_quantize", z.device, z.dtype, backend).load()
    with torch.no_grad():
        found: tuple[torch.Tensor, torch.Tensor] = run(z, codebook, metric)
    return found


def hard_indices(z: torch.Tensor, codebook: torch.Tensor, metric: Metric) -> torch.Tensor:
    """Indices [N] of :func:`codebook_quantize`, without an [N, K] array whichever backend runs."""
    backend = backends.resolve("codebook_quantize", z.device, z.dtype).backend
    block = _BLOCK_ROWS if backend == "reference" else max(1, z.shape[0])
    return torch.cat([codebook_quantize(part, codebook, metric)[0] for part in torch.split(z, block)])


def reference(z: torch.Tensor, codebook: torch.Tensor, metric: Metric) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch, in the official order of operations; materialises [N, K]."""
    z, codebook = _compared(z, metric), _compared(codebook, metric)
    product = torch.einsum("bd,dn->bn", z, codebook.t())  # [N, K]
    if metric == "inner_product":
        indices = F.softmax(product, dim=1).argmax(dim=1)
    else:
        distance = torch.sum(z**2, dim=1, keepdim=True) + torch.sum(codebook**2, dim=1) - 2 * product
        indices = torch.argmin(distance, dim=1)
    return indices, codebook[indices]


def _compared(x: torch.Tensor, metric: Metric) -> torch.Tensor:
    """One side as it enters the formula."""
    return F.normalize(x, p=2, dim=-1) if metric == "l2_normalized" else x.contiguous()


def _prepared(x: torch.Tensor, metric: Metric) -> tuple[torch.Tensor, torch.Tensor]:
    """(:func:`_compared` [M, d], |.|^2 [M]) as torch rounds them.

    On a CPU by blocks that torch works through on the calling thread: waking its threads for so little costs more than
    the work, and they would go on spinning beside the kernel's.
    """
    block = max(1, SERIAL_ELEMENTS // x.shape[1]) if x.device.type == "cpu" else max(1, x.shape[0])
    if x.shape[0] <= block:
        vectors = _compared(x, metric)
        return vectors, torch.sum(vectors**2, dim=1)
    vectors = torch.empty(x.shape, dtype=x.dtype, device=x.device) if metric == "l2_normalized" else x.contiguous()
    norms = torch.empty(x.shape[0], dtype=x.dtype, device=x.device)
    for start in range(0, x.shape[0], block):
        part = vectors[start : start + block]
        if metric == "l2_normalized":
            part.copy_(_compared(x[start : start + block], metric))
        torch.sum(part**2, dim=1, out=norms[start : start + block])
    return vectors, norms


def _operands(z: torch.Tensor, codebook: torch.Tensor, metric: Metric) -> tuple[torch.Tensor, ...]:
    """(z, |z|^2, codebook, |e|^2, indices, quantized) for a kernel."""
    z, z_norm = _prepared(z, metric)
    codebook, code_norm = _prepared(codebook, metric)
    indices = torch.empty(z.shape[0], dtype=torch.int64, device=z.device)
    return z, z_norm, codebook, code_norm, indices, torch.empty_like(z)


def _cpu(z: torch.Tensor, codebook: torch.Tensor, metric: Metric) -> tuple[torch.Tensor, torch.Tensor]:
    z, z_norm, codebook, code_norm, indices, quantized = _operands(z, codebook, metric)
    native.module().codebook_quantize_cpu(
        z.data_ptr(),
        z_norm.data_ptr(),
        codebook.data_ptr(),
        code_norm.data_ptr(),
        *(z.shape[0], codebook.shape[0], z.shape[1]),
        int(metric == "inner_product"),
        indices.data_ptr(),
        quantized.data_ptr(),
    )
    return indices, quantized


def _cuda(z: torch.Tensor, codebook: torch.Tensor, metric: Metric) -> tuple[torch.Tensor, torch.Tensor]:
    z, z_norm, codebook, code_norm, indices, quantized = _operands(z, codebook, metric)
    problem = (z.shape[0], codebook.shape[0], z.shape[1], int(metric == "inner_product"))
    with native.cuda_kernels(z.device) as (kernels, stream):
        scratch = kernels.codebook_quantize_workspace_cuda(*problem)
        workspace = torch.empty(scratch, dtype=torch.uint8, device=z.device)
        kernels.codebook_quantize_cuda(
            z.data_ptr(),
            z_norm.data_ptr(),
            codebook.data_ptr(),
            code_norm.data_ptr(),
            *problem,
            indices.data_ptr(),
            quantized.data_ptr(),
            workspace.data_ptr(),
            stream,
        )
    return indices, quantized


def _triton(z: torch.Tensor, codebook: torch.Tensor, metric: Metric) -> tuple[torch.Tensor, torch.Tensor]:
    z, z_norm = _prepared(z, metric)
    codebook, code_norm = _prepared(codebook, metric)
    kernel = triton_backend.kernel("codebook_quantize")
    indices: torch.Tensor = kernel(z, z_norm, codebook, code_norm, metric == "inner_product")
    return indices, codebook[indices]


backends.register("codebook_quantize", "reference", lambda: reference)
triton_backend.register("codebook_quantize", frozenset({torch.float32}), load=lambda: _triton)
backends.register(
    "codebook_quantize",
    "cpu",
    lambda: _cpu,
    devices=frozenset({"cpu"}),
    dtypes=frozenset({torch.float32}),
    unavailable=lambda: native.unavailable("codebook_quantize_cpu"),
)
backends.register(
    "codebook_quantize",
    "cuda",
    lambda: _cuda,
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.float32}),
    unavailable=lambda: native.unavailable("codebook_quantize_cuda"),
)
