"""The ops: one numerical contract each, with a plain-torch reference and faster implementations.

Importing this package fills the registry of :mod:`gear_engine.ops.backends` with every op.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gear_engine.ops import (
    backends,
    codebook_quantize,
    conv_rows,
    decode_attention,
    decode_step,
    decode_steps,
    dual_readout,
    group_norm_silu,
    philox,
    residual_moments,
    sample_tokens,
    sign_bits,
    skinny_linear,
    soft_readout,
    torch_exponential,
)
from gear_engine.ops.packed_weight import Weight

__all__ = [
    "GeneratorOps",
    "backends",
    "codebook_quantize",
    "conv_rows",
    "decode_attention",
    "decode_step",
    "decode_steps",
    "dual_readout",
    "group_norm_silu",
    "philox",
    "residual_moments",
    "sample_tokens",
    "sign_bits",
    "skinny_linear",
    "soft_readout",
    "torch_exponential",
]


@dataclass(frozen=True)
class GeneratorOps:
    """The implementations that one engine uses, chosen once when it is built.

    Attributes:
        decode_attention, skinny_linear, sample_tokens: callables with the signatures of the modules' ``reference``.
        backends: the backend chosen for each of them.
        torch_exponential: likewise; its choice changes no bit and is left out of ``backends``.
        decode_step: the whole model in one call, where the compiled CPU backend was chosen for its parts; see
            :mod:`gear_engine.ops.decode_step`.
        decode_steps: several steps and their draws in one call, where it was chosen for ``sample_tokens`` too; see
            :mod:`gear_engine.ops.decode_steps`.
        draws_as_torch: whether ``decode_steps`` can draw from a torch generator: ``torch_exponential`` is compiled, and
            this torch draws as it does.
    """

    decode_attention: Callable[..., torch.Tensor]
    skinny_linear: Callable[..., torch.Tensor]
    sample_tokens: Callable[..., torch.Tensor]
    backends: Mapping[str, str]
    torch_exponential: Callable[..., None]
    decode_step: Callable[..., torch.Tensor] | None = None
    decode_steps: Callable[..., tuple[int, bool]] | None = None
    draws_as_torch: bool = False

    def logits(self, h: torch.Tensor, weight: Weight, *, norm_weight: torch.Tensor, norm_eps: float) -> torch.Tensor:
        """The head: ``skinny_linear(h, weight)`` in fp32 (R, vocab_size).

        The compiled CUDA kernel writes its fp32 sums (as the compiled CPU steps do, and without a launch that would
        widen them); the others round to h's dtype first.
        """
        if self.backends.get("skinny_linear") == "cuda":
            wide = {"norm_weight": norm_weight, "norm_eps": norm_eps, "out_dtype": torch.float32}
            return self.skinny_linear(h, weight, **wide)
        return self.skinny_linear(h, weight, norm_weight=norm_weight, norm_eps=norm_eps).float()

    @classmethod
    def resolve(
        cls,
        device: torch.device,
        dtype: torch.dtype,
        backend: str | Mapping[str, str] = "auto",
        cache_dtype: torch.dtype | None = None,
    ) -> GeneratorOps:
        """The ops of a generator with weights of ``dtype`` on ``device``; logits are always fp32.

        Args:
            cache_dtype: of keys and values; None means ``dtype``.

        Raises:
            BackendUnavailableError: a backend that was asked for by name cannot run here.
        """
        if not isinstance(backend, str):
            for op in backend:
                backends.implementations(op)
        found: dict[str, Any] = {}
        chosen: dict[str, str] = {}
        cache_dtype = cache_dtype or dtype
        dtypes = {
            "decode_attention": (cache_dtype, dtype),
            "skinny_linear": (dtype, None),
            "sample_tokens": (torch.float32, None),
        }
        for op, (main_dtype, other) in dtypes.items():
            name = backend if isinstance(backend, str) else backend.get(op, "auto")
            implementation = backends.resolve(op, device, main_dtype, name, other=other)
            found[op] = implementation.load()
            chosen[op] = implementation.backend
        if isinstance(backend, str):
            name = "reference" if backend == "reference" else "auto"  # few backends have this op
        else:
            name = backend.get("torch_exponential", "auto")
        exponential = backends.resolve("torch_exponential", device, torch.float32, name)
        found |= {"torch_exponential": exponential.load(), "draws_as_torch": exponential.backend == "cpu"}
        if chosen["skinny_linear"] == chosen["decode_attention"] == "cpu":
            found["decode_step"] = backends.resolve("decode_step", device, dtype, "cpu", other=cache_dtype).load()
            if chosen["sample_tokens"] == "cpu":
                found["decode_steps"] = backends.resolve("decode_steps", device, dtype, "cpu", other=cache_dtype).load()
        if chosen["skinny_linear"] == "cuda":
            # What runs before a layer in an engine's stream writes its input, never its weights.
            found["skinny_linear"] = functools.partial(found["skinny_linear"], overlap=True)
        return cls(**found, backends=chosen)
