"""The static key/value cache: one buffer, allocated once, one slot per row of a batch."""

from __future__ import annotations

import torch

from gear_engine.config import GeneratorConfig
from gear_engine.errors import ConfigError
from gear_engine.models.rope import rope_table

__all__ = ["StaticKVCache"]


class StaticKVCache:
    """Keys and values of ``num_slots`` sequences.

    Entry 0 of a slot is the collapsed prefix: key zero, value = mean of the valid prefix values, and ``prefix_bias`` =
    log(number of valid prefix tokens) as its logit (0 for a class label, -inf without any). Image token t lies at entry
    1 + t. A prompt of 300 tokens thus costs as much as a class label.

    Attributes:
        kv: (n_layer, 2, num_slots, n_kv_head, S, head_dim), S = 1 + max_tokens rounded up to a multiple of 8.
        layers: per layer, the views (k, v) of ``kv``, (num_slots, n_kv_head, S, head_dim) each.
        prefix_bias: fp32 (num_slots,).
        rope: fp32 (block_size, head_dim / 2, 2), (cos, sin) of every image-token position.
        max_tokens: image tokens that a slot can hold.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        num_slots: int,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        if num_slots < 1:
            raise ConfigError(f"a cache needs at least one slot, got {num_slots}")
        if not 1 <= max_tokens <= config.block_size:
            raise ConfigError(f"max_tokens {max_tokens} must lie in [1, block_size = {config.block_size}]")
        self.config = config
        self.num_slots = num_slots
        self.max_tokens = max_tokens
        # Zeros, not garbage: entries that a mask hides are still multiplied by a weight of 0.
        self.kv = torch.zeros(self.shape(config, num_slots, max_tokens), dtype=dtype, device=device)
        self.prefix_bias = torch.zeros(num_slots, dtype=torch.float32, device=device)
        self.rope = rope_table(config, device)
        self.layers = tuple((self.kv[layer, 0], self.kv[layer, 1]) for layer in range(config.n_layer))

    @staticmethod
    def shape(config: GeneratorConfig, num_slots: int, max_tokens: int) -> tuple[int, int, int, int, int, int]:
        entries = -(-(1 + max_tokens) // 8) * 8
        return config.n_layer, 2, num_slots, config.n_kv_head, entries, config.head_dim

    @classmethod
    def nbytes(cls, config: GeneratorConfig, num_slots: int, max_tokens: int, dtype: torch.dtype) -> int:
        """Bytes of ``kv``."""
        total = dtype.itemsize
        for size in cls.shape(config, num_slots, max_tokens):
            total *= size
        return total

    @property
    def dtype(self) -> torch.dtype:
        return self.kv.dtype

    @property
    def device(self) -> torch.device:
        return self.kv.device

    def write_prefix(self, slots: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> None:
        """Starts sequences in ``slots`` (R,): ``values`` (n_layer, R, n_kv_head, head_dim), ``bias`` fp32 (R,)."""
        # Keys of entry 0 stay zero: nobody writes there.
        self.kv[:, 1, :, :, 0][:, slots] = values.to(self.dtype)
        self.prefix_bias[slots] = bias
