"""A generator's weights as plain tensors, referenced and never copied unless their dtype or device changes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from gear_engine.config import GeneratorConfig
from gear_engine.errors import CheckpointError, ConfigError
from gear_engine.ops.skinny_linear import PackedWeight, PackKind, Weight, pack, packed_nbytes
from gear_engine.pages import LargePages, collapse

__all__ = ["BlockWeights", "GeneratorWeights", "expected_shapes"]

#: Fields that hold linear layers' weights: those that can be packed.
LINEAR: Final = frozenset({"wqkv", "wo", "w1", "w3", "w2", "wqkv_text", "wo_text", "output"})

#: Buffers that an official module holds after sampling: not weights.
_CACHE_KEY = re.compile(r"layers\.\d+\.attention\.kv_cache\..*")


@dataclass(frozen=True)
class BlockWeights:
    """One decoder block. Linear weights are (out, in) tensors or packed; the ``_text`` ones are None in single-stream
    blocks, where text and image tokens share the others."""

    attention_norm: torch.Tensor
    wqkv: Weight
    wo: Weight
    ffn_norm: torch.Tensor
    w1: Weight
    w3: Weight
    w2: Weight
    attention_norm_text: torch.Tensor | None = None
    wqkv_text: Weight | None = None
    wo_text: Weight | None = None


#: Field of BlockWeights -> official key below ``layers.N.``
_BLOCK_KEYS = {
    "attention_norm": "attention_norm.weight",
    "wqkv": "attention.wqkv.weight",
    "wo": "attention.wo.weight",
    "ffn_norm": "ffn_norm.weight",
    "w1": "feed_forward.w1.weight",
    "w3": "feed_forward.w3.weight",
    "w2": "feed_forward.w2.weight",
}
_TEXT_BLOCK_KEYS = {
    "attention_norm_text": "attention_norm_text.weight",
    "wqkv_text": "attention.wqkv_text.weight",
    "wo_text": "attention.wo_text.weight",
}
#: Field of GeneratorWeights -> official key
_KEYS = {"tok_embeddings": "tok_embeddings.weight", "norm": "norm.weight", "output": "output.weight"}
_CLASS_KEYS = {"label_table": "cls_embedding.embedding_table.weight"}
_TEXT_KEYS = {"cap_fc1": "cls_embedding.cap_proj.fc1.weight", "cap_fc2": "cls_embedding.cap_proj.fc2.weight"}
_UNCOND_KEYS = {"uncond_embedding": "cls_embedding.uncond_embedding"}


def _top_keys(config: GeneratorConfig) -> dict[str, str]:
    if config.conditioning == "class":
        return _KEYS | _CLASS_KEYS
    return _KEYS | _TEXT_KEYS | (_UNCOND_KEYS if config.learned_uncond else {})


def _block_keys(config: GeneratorConfig, layer: int) -> dict[str, str]:
    keys = _BLOCK_KEYS | (_TEXT_BLOCK_KEYS if layer < config.n_double_stream_layers else {})
    return {field: f"layers.{layer}.{key}" for field, key in keys.items()}


def expected_shapes(config: GeneratorConfig) -> dict[str, tuple[int, ...]]:
    """Official state-dict key -> shape, for every weight of the model."""
    dim, ffn, qkv = config.dim, config.ffn_dim, config.qkv_dim
    block = {
        "attention_norm": (dim,),
        "attention_norm_text": (dim,),
        "ffn_norm": (dim,),
        "wqkv": (qkv, dim),
        "wqkv_text": (qkv, dim),
        "wo": (dim, dim),
        "wo_text": (dim, dim),
        "w1": (ffn, dim),
        "w3": (ffn, dim),
        "w2": (dim, ffn),
    }
    top: dict[str, tuple[int, ...]] = {
        "tok_embeddings": (config.vocab_size, dim),
        "norm": (dim,),
        "output": (config.vocab_size, dim),
        "label_table": (config.num_classes + config.has_uncond_class, dim),
        "cap_fc1": (dim, config.caption_dim),
        "cap_fc2": (dim, dim),
        "uncond_embedding": (config.cls_token_num, config.caption_dim),
    }
    shapes = {key: top[field] for field, key in _top_keys(config).items()}
    for layer in range(config.n_layer):
        shapes |= {key: block[field] for field, key in _block_keys(config, layer).items()}
    return shapes


@dataclass(frozen=True)
class GeneratorWeights:
    """All weights of a generator.

    Attributes:
        config: the architecture.
        tok_embeddings: (vocab_size, dim).
        norm: (dim,), the last RMSNorm.
        output: (vocab_size, dim), tensor or packed.
        blocks: one per layer.
        label_table: (num_classes + 1, dim) (without the 1 if there is no unconditional row); class models only.
        cap_fc1, cap_fc2: (dim, caption_dim) and (dim, dim), the caption's MLP; text models only.
        uncond_embedding: (cls_token_num, caption_dim), the learned null caption; LlamaGen's text models only.
    """

    config: GeneratorConfig
    tok_embeddings: torch.Tensor
    norm: torch.Tensor
    output: Weight
    blocks: tuple[BlockWeights, ...]
    label_table: torch.Tensor | None = None
    cap_fc1: torch.Tensor | None = None
    cap_fc2: torch.Tensor | None = None
    uncond_embedding: torch.Tensor | None = None

    @classmethod
    def from_state_dict(cls, config: GeneratorConfig, state: Mapping[str, torch.Tensor]) -> GeneratorWeights:
        """References the tensors of an official state dict (ours or the user's module's), without copying any.

        Raises:
            CheckpointError: a weight is missing, unknown, or of another shape, dtype or device; the message names it.
        """
        shapes = expected_shapes(config)
        for key, shape in shapes.items():
            if key not in state:
                raise CheckpointError(f"weight {key} {shape} is missing")
            if tuple(state[key].shape) != shape:
                raise CheckpointError(f"weight {key} has shape {tuple(state[key].shape)}, the model needs {shape}")
            for name in ("dtype", "device"):
                found, wanted = (getattr(state[which], name) for which in (key, "tok_embeddings.weight"))
                if found != wanted:
                    raise CheckpointError(f"weight {key} is {found}, unlike tok_embeddings.weight, which is {wanted}")
        for key in state:
            if key not in shapes and not _CACHE_KEY.fullmatch(key):
                raise CheckpointError(f"unknown weight {key}")

        def pick(keys: Mapping[str, str]) -> dict[str, torch.Tensor]:
            return {field: state[key].detach() for field, key in keys.items()}

        blocks = tuple(BlockWeights(**pick(_block_keys(config, layer))) for layer in range(config.n_layer))
        return cls(config=config, blocks=blocks, **pick(_top_keys(config)))

    @classmethod
    def stream(
        cls,
        config: GeneratorConfig,
        tensor: Callable[[str], torch.Tensor],
        *,
        dtype: torch.dtype | None = None,
        pack_kind: PackKind | None = None,
    ) -> GeneratorWeights:
        """As :meth:`from_state_dict` and :meth:`to`, one tensor after another: no original outlives its conversion.

        Args:
            tensor: official key -> tensor, asked once for each, the largest first: a safetensors file's ``get_tensor``,
                say. Where all weights are converted, a tensor may lie in the memory of the one before.

        Raises:
            CheckpointError: a tensor has another shape.
        """

        def convert(field: str, key: str, shape: tuple[int, ...]) -> Weight:
            found = tensor(key).detach()
            if tuple(found.shape) != shape:
                raise CheckpointError(f"weight {key} has shape {tuple(found.shape)}, the model needs {shape}")
            if pack_kind is not None and field in LINEAR:
                return pack(found, pack_kind, pages)
            return found.to(dtype).contiguous()

        shapes, pages = expected_shapes(config), LargePages()
        top, layers = _top_keys(config), [_block_keys(config, layer) for layer in range(config.n_layer)]
        fields = {key: field for keys in (top, *layers) for field, key in keys.items()}
        by_size = sorted(shapes, key=lambda key: -math.prod(shapes[key]))
        done: dict[str, Any] = {key: convert(fields[key], key, shapes[key]) for key in by_size}

        def pick(keys: Mapping[str, str]) -> dict[str, Any]:
            return {field: done[key] for field, key in keys.items()}

        return cls(config=config, blocks=tuple(BlockWeights(**pick(keys)) for keys in layers), **pick(top))

    @property
    def dtype(self) -> torch.dtype:
        return self.tok_embeddings.dtype

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.device

    def _named(self) -> Iterator[tuple[str, Weight]]:
        """Every weight under its field's name."""
        parts: list[GeneratorWeights | BlockWeights] = [self, *self.blocks]
        for part in parts:
            for name in _weight_fields(part):
                if getattr(part, name) is not None:
                    yield name, getattr(part, name)

    def _tensors(self) -> Iterator[torch.Tensor]:
        for _, weight in self._named():
            parts = (weight,) if isinstance(weight, torch.Tensor) else (weight.data, weight.scales)
            yield from (part for part in parts if part is not None)

    def addresses(self) -> list[int]:
        """Where every weight lies: as long as that stays, what was captured over these weights may be replayed."""
        return [tensor.data_ptr() for tensor in self._tensors()]

    def collapse(self) -> int:
        """Moves weights in CPU memory into large pages, see :func:`gear_engine.pages.collapse`."""
        return collapse(self._tensors())

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(weight.nbytes for _, weight in self._named())

    def nbytes_as(self, dtype: torch.dtype, pack_kind: PackKind | None = None) -> int:
        """Bytes that :meth:`to` allocates on the same device; 0 if every weight is shared.

        Raises :class:`ConfigError` if there is no such packing.
        """
        if pack_kind not in (None, "bf16", "int8"):
            raise ConfigError(f"weights pack as 'bf16' or 'int8', not {pack_kind!r}")
        total = 0
        for name, weight in self._named():
            if not isinstance(weight, torch.Tensor):
                continue
            if pack_kind is not None and name in LINEAR:
                total += packed_nbytes(weight.shape[0], weight.shape[1], pack_kind)
            elif weight.dtype != dtype or not weight.is_contiguous():
                total += weight.numel() * dtype.itemsize
        return total

    def to(
        self,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        pack_kind: PackKind | None = None,
    ) -> GeneratorWeights:
        """The same weights on ``device`` in ``dtype``, contiguous; those that are so already are shared, not copied.

        ``pack_kind`` packs the linear ones (not embedding tables and norms) into the layout of the compiled kernels.

        Raises:
            ConfigError: the weights are on the meta device.
        """
        if self.device.type == "meta":
            raise ConfigError("the weights are on the meta device, where tensors hold no numbers: load some first")

        pages = LargePages()

        def move(name: str, weight: Weight | None) -> Weight | None:
            if weight is None:
                return None
            if isinstance(weight, PackedWeight):
                scales = None if weight.scales is None else weight.scales.to(device)
                return dataclasses.replace(weight, data=weight.data.to(device), scales=scales)
            if pack_kind is not None and name in LINEAR:
                return pack(weight.to(device), pack_kind, pages)
            return weight.to(device=device, dtype=dtype).contiguous()

        def moved(part: GeneratorWeights | BlockWeights) -> dict[str, Any]:
            return {name: move(name, getattr(part, name)) for name in _weight_fields(part)}

        blocks = tuple(dataclasses.replace(block, **moved(block)) for block in self.blocks)
        return dataclasses.replace(self, blocks=blocks, **moved(self))


def _weight_fields(part: GeneratorWeights | BlockWeights) -> list[str]:
    return [field.name for field in dataclasses.fields(part) if field.name not in ("config", "blocks")]
