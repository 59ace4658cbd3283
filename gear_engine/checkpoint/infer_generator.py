"""A generator's configuration from its weights' shapes, the saved arguments and the user's overrides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gear_engine.checkpoint.claims import Shapes, argument, count_indices, rows_of, settle, size_of
from gear_engine.config import GENERATOR_PRESETS, GeneratorConfig
from gear_engine.errors import CheckpointError, ConfigError

__all__ = ["GeneratorOverrides", "infer_generator"]

_DEFAULT_IMAGE_SIZE = 256
_DEFAULT_DOWNSAMPLE = 16
#: Caption length of GEAR's text models where neither the weights nor the arguments say it.
_DEFAULT_CAPTION_TOKENS = 300
#: Official model names -> preset. GEAR calls its class and text models alike; LlamaGen's text sizes are GPT-*.
_OFFICIAL_NAMES = {
    **{f"LlamaGen-{size}": f"LlamaGen-{size}" for size in ("S", "B", "L", "XL", "XXL", "XXXL")},
    **{f"GPT-{size}": f"LlamaGen-{size}" for size in ("B", "L", "XL", "XXL", "XXXL")},
    "LlamaGen-1B": "GEAR-T2I-1B",
    **{name: name for name in GENERATOR_PRESETS if name.startswith(("GEAR-", "GPT-1B", "GPT-3B", "GPT-7B"))},
}
_HEADS_BY_WIDTH = {preset.dim: preset.n_head for preset in GENERATOR_PRESETS.values()}


@dataclass(frozen=True, kw_only=True)
class GeneratorOverrides:
    """What a user can say about a generator; each must agree with the weights and the saved arguments.

    Attributes:
        ar_model: official name (``"LlamaGen-B"``, ``"GPT-3B"``): layers, heads and width.
        image_size: edge of the images in pixels.
        downsample_ratio: pixels per token along an edge.
        n_head: attention heads; needed for widths that are not published.
        num_classes: labels without the unconditional one.
        codebook_size: vocabulary.
        cls_token_num: prefix length T (text).
        text_attn: ``"causal"`` or ``"prefix"`` (text).
    """

    ar_model: str | None = None
    image_size: int | None = None
    downsample_ratio: int | None = None
    n_head: int | None = None
    num_classes: int | None = None
    codebook_size: int | None = None
    cls_token_num: int | None = None
    text_attn: str | None = None


def infer_generator(
    shapes: Shapes, args: Mapping[str, Any], given: GeneratorOverrides, bundled_downsample: int | None = None
) -> GeneratorConfig:
    """The configuration that the weights have.

    Args:
        shapes: official key -> stored tensor.
        args: the training program's arguments, possibly none.
        given: the user's overrides.
        bundled_downsample: downsample of the tokenizer in the same file, if there is one.

    Raises:
        CheckpointError: sources that contradict each other (both named), or a head count that nobody knows.
    """
    dim = size_of(shapes, "norm.weight")
    n_layer = count_indices(shapes, "layers.")
    n_head = _heads(dim, n_layer, args, given)
    kv_rows = rows_of(shapes, "layers.0.attention.wqkv.weight", dim) - dim
    head_dim = dim // n_head
    if kv_rows <= 0 or kv_rows % (2 * head_dim):
        raise CheckpointError(
            f"tensor 'layers.0.attention.wqkv.weight' has {kv_rows + dim} rows, which are not {dim} for queries and "
            f"twice a multiple of the head size {head_dim} (dim {dim} / n_head {n_head}) for keys and values"
        )
    vocab_size = settle(
        "vocabulary",
        ("tok_embeddings.weight", rows_of(shapes, "tok_embeddings.weight", dim)),
        ("output.weight", rows_of(shapes, "output.weight", dim)),
        argument(args, int, "vocab_size", "codebook_size"),
        ("your codebook_size", given.codebook_size),
    )
    fields: dict[str, Any] = {
        "dim": dim,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": kv_rows // (2 * head_dim),
        "ffn_dim": rows_of(shapes, "layers.0.feed_forward.w1.weight", dim),
        "vocab_size": vocab_size,
        "block_size": _block_size(args, given, bundled_downsample),
    }
    if "cls_embedding.cap_proj.fc1.weight" in shapes:
        fields |= _text_fields(shapes, args, given, dim)
    else:
        fields |= _class_fields(shapes, args, given, dim)
    try:
        return GeneratorConfig(**fields)
    except ConfigError as error:
        raise CheckpointError(f"the weights' shapes are no possible generator: {error}") from error


def _heads(dim: int, n_layer: int, args: Mapping[str, Any], given: GeneratorOverrides) -> int:
    """Head count; also holds the named model sizes against the weights."""
    claims: list[tuple[str, int | None]] = [("your n_head", given.n_head), argument(args, int, "n_head")]
    for source, name in (argument(args, str, "ar_model", "gpt_model"), ("your ar_model", given.ar_model)):
        if name is None:
            continue
        if name not in _OFFICIAL_NAMES:
            raise CheckpointError(f"{source} {name[:100]!r} is no known model; known: {', '.join(_OFFICIAL_NAMES)}")
        preset = GENERATOR_PRESETS[_OFFICIAL_NAMES[name]]
        settle("width", ("norm.weight", dim), (f"{source} {name}", preset.dim))
        settle("number of layers", ("the weights", n_layer), (f"{source} {name}", preset.n_layer))
        claims.append((f"{source} {name}", preset.n_head))
    if all(value is None for _, value in claims):
        if dim not in _HEADS_BY_WIDTH:
            raise CheckpointError(
                f"width {dim} is not a published one, and the number of heads is not in the weights: pass n_head"
            )
        claims.append(("the published size of this width", _HEADS_BY_WIDTH[dim]))
    heads = settle("number of heads", *claims)
    if heads < 1 or dim % heads:
        raise CheckpointError(f"n_head {heads} does not divide the width {dim} (norm.weight)")
    return heads


def _block_size(args: Mapping[str, Any], given: GeneratorOverrides, bundled_downsample: int | None) -> int:
    image_size = settle(
        "image size",
        argument(args, int, "image_size"),
        ("your image_size", given.image_size),
        default=_DEFAULT_IMAGE_SIZE,
    )
    downsample = settle(
        "downsample",
        ("the tokenizer in the file", bundled_downsample),
        argument(args, int, "downsample_ratio", "downsample_size"),
        ("your downsample_ratio", given.downsample_ratio),
        default=_DEFAULT_DOWNSAMPLE,
    )
    if downsample < 1 or image_size < downsample or image_size % downsample or image_size > 2**16:
        raise CheckpointError(f"image size {image_size} is not a positive multiple of the downsample {downsample}")
    return int((image_size // downsample) ** 2)


def _class_fields(shapes: Shapes, args: Mapping[str, Any], given: GeneratorOverrides, dim: int) -> dict[str, Any]:
    name = "cls_embedding.embedding_table.weight"
    rows = rows_of(shapes, name, dim)
    source, classes = argument(args, int, "num_classes")
    classes = settle("number of classes", (source, classes), ("your num_classes", given.num_classes), default=rows - 1)
    if rows not in (classes, classes + 1):
        source = source if source in _present(args, source) else "your num_classes"
        raise CheckpointError(
            f"number of classes: {source} says {classes}, but tensor {name!r} has {rows} rows "
            "(one per class and one for the unconditional class)"
        )
    settle("prefix length", ("a class label", 1), ("your cls_token_num", given.cls_token_num))
    return {"conditioning": "class", "num_classes": classes, "has_uncond_class": rows == classes + 1}


def _present(args: Mapping[str, Any], source: str) -> set[str]:
    return {source} if args.get(source.removeprefix("args.")) is not None else set()


def _text_fields(shapes: Shapes, args: Mapping[str, Any], given: GeneratorOverrides, dim: int) -> dict[str, Any]:
    fc1 = shapes["cls_embedding.cap_proj.fc1.weight"].shape
    if len(fc1) != 2 or dim not in fc1:
        raise CheckpointError(f"tensor 'cls_embedding.cap_proj.fc1.weight' has shape {fc1}; expected {dim} x N")
    if fc1[0] != dim:
        raise CheckpointError(
            f"tensor 'cls_embedding.cap_proj.fc1.weight' has shape {fc1[0]} x {fc1[1]}; expected {fc1[1]} x {fc1[0]}: "
            "it is transposed"
        )
    learned = "cls_embedding.uncond_embedding" in shapes
    tokens = settle(
        "prefix length",
        ("cls_embedding.uncond_embedding", size_of(shapes, "cls_embedding.uncond_embedding") if learned else None),
        argument(args, int, "cls_token_num"),
        ("your cls_token_num", given.cls_token_num),
        default=_DEFAULT_CAPTION_TOKENS,
    )
    double = sum(key.endswith(".attention.wqkv_text.weight") for key in shapes)
    return {
        "conditioning": "text",
        "caption_dim": fc1[1],
        "cls_token_num": tokens,
        "learned_uncond": learned,
        "n_double_stream_layers": double,
        "text_attn": settle(
            "text attention",
            argument(args, str, "text_attn"),
            ("your text_attn", given.text_attn),
            default="causal",
        ),
    }
