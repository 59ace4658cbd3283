"""A tokenizer's configuration from its weights' shapes, the saved arguments and the user's overrides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gear_engine.checkpoint.claims import Shapes, argument, count_indices, settle, size_of
from gear_engine.config import TOKENIZER_PRESETS, TokenizerConfig, TokenizerFamily
from gear_engine.errors import CheckpointError, ConfigError
from gear_engine.tokenizers.infer import default_num_codebooks

__all__ = ["TokenizerOverrides", "infer_tokenizer"]

_MAX_BITS = 64


@dataclass(frozen=True, kw_only=True)
class TokenizerOverrides:
    """What a user can say about a tokenizer; each must agree with the weights.

    Attributes:
        vq_model: official name (``"VQ-16"``, ``"IBQ-16"`` …): family, levels and blocks.
        codebook_size, codebook_embed_dim: codes and their width.
        num_codebooks: groups of sign bits (lfq), which the weights do not tell.
        codebook_l2_norm: whether codes are compared and decoded L2-normalised (vq), which the weights do not tell.
        downsample_ratio: pixels per latent position along an edge.
    """

    vq_model: str | None = None
    codebook_size: int | None = None
    codebook_embed_dim: int | None = None
    num_codebooks: int | None = None
    codebook_l2_norm: bool | None = None
    downsample_ratio: int | None = None


def _family(shapes: Shapes) -> TokenizerFamily:
    if any(key.startswith("encoder.conv_blocks.") for key in shapes):
        return "vq"
    if "quantize.embedding.weight" in shapes:
        return "ibq"
    if any(key.startswith(("decoder.adaptive.", "encoder.mid_block.")) for key in shapes):
        return "lfq"
    raise CheckpointError(
        "the tensors' names are those of no known tokenizer (VQ has encoder.conv_blocks, IBQ quantize.embedding, "
        "LFQ decoder.adaptive)"
    )


def infer_tokenizer(shapes: Shapes, args: Mapping[str, Any], given: TokenizerOverrides) -> TokenizerConfig:
    """The configuration that the weights have.

    Raises:
        CheckpointError: sources that contradict each other; both are named.
    """
    family = _family(shapes)
    levels_key, block_key = ("conv_blocks", "res") if family == "vq" else ("down", "block")
    ch = size_of(shapes, "encoder.conv_in.weight")
    levels = count_indices(shapes, f"encoder.{levels_key}.")
    widths = [size_of(shapes, f"encoder.{levels_key}.{i}.{block_key}.0.norm2.weight") for i in range(levels)]
    for level, width in enumerate(widths):
        if width % ch:
            raise CheckpointError(
                f"encoder level {level} is {width} wide, no multiple of the {ch} channels of encoder.conv_in.weight"
            )
    blocks = count_indices(shapes, f"encoder.{levels_key}.0.{block_key}.")
    fields: dict[str, Any] = {
        "family": family,
        "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),
        "num_res_blocks": blocks,
        "z_channels": size_of(shapes, "encoder.conv_out.bias"),
    }
    found = 2 ** (levels - 1)
    if family == "lfq":
        found = 2 ** sum(f"encoder.down.{i}.downsample.weight" in shapes for i in range(levels))
    # args.downsample_ratio is the token grid's, which the official programs take for the tokenizer's too.
    fields["downsample"] = settle(
        "downsample of the tokenizer",
        ("the weights", found),
        argument(args, int, "downsample_ratio"),
        ("your downsample_ratio", given.downsample_ratio),
    )
    fields |= _lfq_codes(fields, args, given) if family == "lfq" else _codes(shapes, family, args, given)
    _check_name(fields, args, given)
    try:
        return TokenizerConfig(**fields)
    except ConfigError as error:
        raise CheckpointError(f"the weights' shapes are no possible tokenizer: {error}") from error


def _codes(
    shapes: Shapes, family: TokenizerFamily, args: Mapping[str, Any], given: TokenizerOverrides
) -> dict[str, Any]:
    """Codebook of the vq and ibq families: a table in the weights."""
    embed_dim = settle(
        "width of a code",
        ("quant_conv.bias", size_of(shapes, "quant_conv.bias")),
        argument(args, int, "codebook_embed_dim"),
        ("your codebook_embed_dim", given.codebook_embed_dim),
    )
    table = shapes.get("quantize.embedding.weight")
    if table is not None and len(table.shape) == 2 and table.shape[0] == embed_dim != table.shape[1]:
        rows = table.shape[1]
        raise CheckpointError(
            f"tensor 'quantize.embedding.weight' has shape {embed_dim} x {rows}; expected {rows} x {embed_dim}: "
            "it is transposed"
        )
    size = settle(
        "codebook size",
        ("quantize.embedding.weight", size_of(shapes, "quantize.embedding.weight")),
        argument(args, int, "codebook_size"),
        ("your codebook_size", given.codebook_size),
    )
    normalised = settle(
        "L2-normalised codes",
        argument(args, bool, "codebook_l2_norm") if family == "vq" else ("the family", False),
        ("your codebook_l2_norm", given.codebook_l2_norm),
        default=True,
    )
    return {"codebook_embed_dim": embed_dim, "codebook_size": size, "codebook_l2_norm": normalised}


def _lfq_codes(fields: Mapping[str, Any], args: Mapping[str, Any], given: TokenizerOverrides) -> dict[str, Any]:
    """The look-up-free family's codes: one bit per channel. ``args.codebook_embed_dim`` is ignored officially."""
    bits = fields["z_channels"]
    if bits > _MAX_BITS:
        raise CheckpointError(f"encoder.conv_out.bias has {bits} channels; a look-up-free code has at most {_MAX_BITS}")
    settle("width of a code", ("encoder.conv_out.bias", bits), ("your codebook_embed_dim", given.codebook_embed_dim))
    size = settle(
        "codebook size",
        (f"2 ** {bits} (encoder.conv_out.bias)", 2**bits),
        argument(args, int, "codebook_size"),
        ("your codebook_size", given.codebook_size),
    )
    named = _named_preset(args, given)
    groups = settle(
        "number of groups of bits",
        argument(args, int, "entropy_num_groups"),
        ("your num_codebooks", given.num_codebooks),
        default=named.num_codebooks if named else default_num_codebooks(bits),
    )
    return {
        "codebook_embed_dim": bits,
        "codebook_size": size,
        "num_codebooks": groups,
        "codebook_l2_norm": False,
    }


def _named_preset(args: Mapping[str, Any], given: TokenizerOverrides) -> TokenizerConfig | None:
    source, name = argument(args, str, "vq_model")
    name = settle("tokenizer", (source, name), ("your vq_model", given.vq_model), default="")
    if name and name not in TOKENIZER_PRESETS:
        raise CheckpointError(f"tokenizer {name[:100]!r} is not known; known: {', '.join(TOKENIZER_PRESETS)}")
    return TOKENIZER_PRESETS.get(name)


def _check_name(fields: Mapping[str, Any], args: Mapping[str, Any], given: TokenizerOverrides) -> None:
    """The named tokenizer must have the family, levels and blocks of the weights."""
    preset = _named_preset(args, given)
    if preset is None:
        return
    source = "your vq_model" if given.vq_model else "args.vq_model"
    name = given.vq_model or args.get("vq_model")
    for field in ("family", "ch_mult", "num_res_blocks", "downsample"):
        settle(f"tokenizer's {field}", ("the weights", fields[field]), (f"{source} {name}", getattr(preset, field)))
