"""The static key/value cache: one buffer, allocated once, one slot per row of a batch."""

from __future__ import annotations

from typing import Final, Literal

import torch

from gear_engine.config import GeneratorConfig
from gear_engine.errors import ConfigError
from gear_engine.models.rope import rope_table
from gear_engine.ops.decode_attention import FP8, quantize_entries
from gear_engine.pages import LargePages

__all__ = ["CacheDtype", "StaticKVCache", "resolve_cache_dtype"]

#: How a cache's dtype is asked for: torch's, or fp8 by its name on the command line.
CacheDtype = torch.dtype | Literal["fp8"]

#: Entries start at multiples of this many bytes, so that a kernel can read them in whole 16-byte words.
_ALIGNMENT: Final = 16


def resolve_cache_dtype(cache_dtype: CacheDtype | None, dtype: torch.dtype) -> torch.dtype:
    """What an engine that computes in ``dtype`` keeps keys and values in: ``dtype`` (also for None), or fp8.

    Raises:
        ConfigError: something else was asked for.
    """
    found = FP8 if cache_dtype == "fp8" else cache_dtype or dtype
    if found not in (dtype, FP8):
        raise ConfigError(f"a cache holds {dtype} (the engine's dtype) or 'fp8' ({FP8}), not {cache_dtype!r}")
    return found


class StaticKVCache:
    """Keys and values of ``num_slots`` sequences.

    Entry 0 of a slot is the collapsed prefix: key zero, value = mean of the valid prefix values, and ``prefix_bias`` =
    log(number of valid prefix tokens) as its logit (0 for a class label, -inf without any). Image token t lies at entry
    1 + t. A prompt of 300 tokens thus costs as much as a class label.

    In memory a head takes a multiple of 16 bytes; the views below show its ``head_dim`` elements, the rest stays zero.

    With dtype ``torch.float8_e4m3fn`` an entry of one head is stored as ``x / scale``, scale = max|x| / 448 in fp16, as
    :mod:`gear_engine.ops.decode_attention` writes and reads it.

    Attributes:
        kv: (n_layer, 2, num_slots, n_kv_head, S, head_dim), S = 1 + max_tokens rounded up to a multiple of 8.
        scales: fp16 (n_layer, 2, num_slots, n_kv_head, S) of an fp8 cache, otherwise None.
        layers: per layer, the views (k, v) of ``kv``, (num_slots, n_kv_head, S, head_dim) each.
        layer_scales: per layer, the views (k_scale, v_scale) of ``scales``, or (None, None).
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
        shape = self.shape(config, num_slots, max_tokens)
        # Zeros, not garbage: entries that a mask hides are still multiplied by a weight of 0.
        stored = LargePages().zeros((*shape[:-1], _stored_head_dim(config, dtype)), dtype, device)
        self.kv = stored[..., : config.head_dim]
        self.scales = torch.zeros(shape[:-1], dtype=torch.float16, device=device) if dtype == FP8 else None
        self.prefix_bias = torch.zeros(num_slots, dtype=torch.float32, device=device)
        self.rope = rope_table(config, device)
        self.layers = tuple((self.kv[layer, 0], self.kv[layer, 1]) for layer in range(config.n_layer))
        self.layer_scales: tuple[tuple[torch.Tensor, torch.Tensor] | tuple[None, None], ...] = tuple(
            (None, None) if self.scales is None else (self.scales[layer, 0], self.scales[layer, 1])
            for layer in range(config.n_layer)
        )

    @staticmethod
    def shape(config: GeneratorConfig, num_slots: int, max_tokens: int) -> tuple[int, int, int, int, int, int]:
        """Of ``kv``, whose last dimension may take more memory."""
        entries = -(-(1 + max_tokens) // 8) * 8
        return config.n_layer, 2, num_slots, config.n_kv_head, entries, config.head_dim

    @classmethod
    def nbytes(cls, config: GeneratorConfig, num_slots: int, max_tokens: int, dtype: torch.dtype) -> int:
        """Bytes of keys, values and their scales in memory."""
        heads = 1
        for size in cls.shape(config, num_slots, max_tokens)[:-1]:
            heads *= size
        per_head = _stored_head_dim(config, dtype) * dtype.itemsize
        return heads * (per_head + (torch.float16.itemsize if dtype == FP8 else 0))

    @property
    def dtype(self) -> torch.dtype:
        return self.kv.dtype

    @property
    def device(self) -> torch.device:
        return self.kv.device

    def clear(self) -> None:
        """Makes all entries zero."""
        self.kv.zero_()
        if self.scales is not None:
            self.scales.zero_()

    def write_prefix(
        self, slots: torch.Tensor, values: torch.Tensor, bias: torch.Tensor, live: torch.Tensor | None = None
    ) -> None:
        """Starts sequences in ``slots`` (R,): ``values`` (n_layer, R, n_kv_head, head_dim), ``bias`` fp32 (R,).

        ``live``: bool (R,), the leading rows; the others have slot -1 and start nothing. None means all. Nothing is
        read on the host.
        """
        if live is not None:
            # A row that is not live writes what the first row does, or if that is not either, what is there already.
            source = torch.arange(live.shape[0], device=live.device) * live
            slots, values, bias, live = slots[source], values[:, source], bias[source], live[source]
        # Keys of entry 0 stay zero: nobody writes there.
        if self.scales is None:
            _put(self.kv[:, 1, :, :, 0], slots, values.to(self.dtype), live)
        else:
            stored, scales = quantize_entries(values)
            # Bytes are copied as bytes: not every device can index 8-bit floats.
            _put(self.kv.view(torch.uint8)[:, 1, :, :, 0], slots, stored.view(torch.uint8), live)
            _put(self.scales[:, 1, :, :, 0], slots, scales, live)
        _put(self.prefix_bias[None], slots, bias[None], live)


def _put(cache: torch.Tensor, slots: torch.Tensor, values: torch.Tensor, live: torch.Tensor | None) -> None:
    """``cache`` (L, num_slots, ...) at ``slots`` (R,) = ``values`` (L, R, ...); where not ``live``, what is there."""
    if live is not None:
        values = torch.where(live.view(-1, *[1] * (values.dim() - 2)), values, cache[:, slots])
    cache[:, slots] = values


def _stored_head_dim(config: GeneratorConfig, dtype: torch.dtype) -> int:
    """Elements that a head takes in memory."""
    multiple = _ALIGNMENT // dtype.itemsize
    return -(-config.head_dim // multiple) * multiple
