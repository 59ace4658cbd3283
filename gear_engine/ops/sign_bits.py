"""Lookup-free quantization: the code of a latent vector is its signs, the index their bits.

For z [N, D] in ``groups`` groups of g = D / groups channels:

    quantized = +1 where z > 0, else -1 (zero maps to -1)
    index     = sum_i 2**i [z_i > 0] over a group's channels i = 0 ... g - 1

Source: LFQ-16 and LFQ-8 (one group, GEAR ``models/lfq_model.py``), GLFQ-16 (4 groups of 8, ``models/glfq_model.py``).
"""

from __future__ import annotations

import torch

from gear_engine.ops import backends, native, triton_backend

__all__ = ["reference", "sign_bits"]

MAX_GROUP_WIDTH = 62


def sign_bits(z: torch.Tensor, groups: int = 1, *, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """The module's formula, checked, by the chosen backend. Not differentiable: no gradient is recorded.

    Args:
        z: (N, D) of any strides; fp32 for the compiled backends, fp32, bf16 or fp16 for Triton's.
        groups: indices per vector; divides D, D / groups <= 62.
        backend: as in :func:`gear_engine.ops.backends.resolve`.

    Returns:
        (indices int64 (N, groups), quantized (N, D) of z's dtype).

    Raises:
        ValueError: the shape and the number of groups do not fit.
        BackendUnavailableError: the named backend cannot run here.
    """
    if z.ndim != 2 or groups < 1 or z.shape[1] < 1 or z.shape[1] % groups:
        raise ValueError(f"z (N, D) {tuple(z.shape)} cannot be cut into {groups} groups of channels")
    if z.shape[1] // groups > MAX_GROUP_WIDTH:
        raise ValueError(f"an index holds at most {MAX_GROUP_WIDTH} bits, not {z.shape[1] // groups}; use more groups")
    run = backends.resolve("sign_bits", z.device, z.dtype, backend).load()
    with torch.no_grad():
        found: tuple[torch.Tensor, torch.Tensor] = run(z, groups)
    return found


def reference(z: torch.Tensor, groups: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch."""
    positive = z > 0
    bits = positive.reshape(z.shape[0], groups, z.shape[1] // groups).long()  # [N, G, g]
    indices = (bits << torch.arange(bits.shape[-1], device=z.device)).sum(dim=-1)
    return indices, torch.where(positive, 1.0, -1.0).to(z.dtype)


def _cpu(z: torch.Tensor, groups: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    n, d = z.shape
    indices = torch.empty(n, groups, dtype=torch.int64)
    quantized = torch.empty(n, d, dtype=torch.float32)
    native.module().sign_bits_cpu(z.data_ptr(), *z.stride(), n, d, groups, indices.data_ptr(), quantized.data_ptr())
    return indices, quantized


def _cuda(z: torch.Tensor, groups: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    n, d = z.shape
    indices = torch.empty(n, groups, dtype=torch.int64, device=z.device)
    quantized = torch.empty(n, d, dtype=torch.float32, device=z.device)
    with native.cuda_kernels(z.device) as (kernels, stream):
        kernels.sign_bits_cuda(
            z.data_ptr(), *z.stride(), n, d, groups, indices.data_ptr(), quantized.data_ptr(), stream
        )
    return indices, quantized


backends.register("sign_bits", "reference", lambda: reference)
triton_backend.register("sign_bits")
backends.register(
    "sign_bits",
    "cpu",
    lambda: _cpu,
    devices=frozenset({"cpu"}),
    dtypes=frozenset({torch.float32}),
    unavailable=lambda: native.unavailable("sign_bits_cpu"),
)
backends.register(
    "sign_bits",
    "cuda",
    lambda: _cuda,
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.float32}),
    unavailable=lambda: native.unavailable("sign_bits_cuda"),
)
