"""A tokenizer's configuration from the names and shapes of its weights, and a view of a user's own module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn

from gear_engine.config import TokenizerConfig, TokenizerFamily
from gear_engine.errors import ConfigError
from gear_engine.tokenizers.tokenizer import Tokenizer
from gear_engine.tokenizers.vqgan import CODER_NAMES

__all__ = ["default_num_codebooks", "from_module", "infer_config", "unwrap"]

#: Sign bits of one index when a lookup-free latent is too wide for a single codebook; as published (GLFQ-16).
_GROUP_BITS = 8
_MAX_SINGLE_BITS = 24

#: Buffers of official modules that are no weights.
_NO_WEIGHTS = ("quantize.codebook_used", "quantize.mask", "quantize.codebook")


def _count(shapes: Mapping[str, Sequence[int]], prefix: str) -> int:
    """Number of consecutive indices i such that a name starts with ``{prefix}.{i}.``."""
    found = {name[len(prefix) + 1 :].split(".")[0] for name in shapes if name.startswith(prefix + ".")}
    return next(i for i in range(len(found) + 1) if str(i) not in found)


def _family(shapes: Mapping[str, Sequence[int]]) -> TokenizerFamily:
    if "decoder.adaptive.0.gamma.weight" in shapes:
        return "lfq"
    if "quantize.embedding.weight" in shapes:
        for family in ("vq", "ibq"):
            if f"encoder.{CODER_NAMES[family].encoder_levels}.0.{CODER_NAMES[family].blocks}.0.conv1.weight" in shapes:
                return "vq" if family == "vq" else "ibq"
    raise ConfigError(
        "these are not the weights of a VQ, IBQ, LFQ or GLFQ tokenizer: neither 'decoder.adaptive.0.gamma.weight' nor "
        "'quantize.embedding.weight' with 'encoder.conv_blocks.0...' or 'encoder.down.0...' is among them"
    )


def default_num_codebooks(bits: int) -> int:
    """Groups of the sign bits of a lookup-free latent, which no weight tells: one, or groups of 8 above 24 bits."""
    return 1 if bits <= _MAX_SINGLE_BITS else bits // _GROUP_BITS


def infer_config(
    shapes: Mapping[str, Sequence[int]], *, num_codebooks: int | None = None, codebook_l2_norm: bool = True
) -> TokenizerConfig:
    """The configuration that official weights imply.

    Args:
        shapes: shape of every weight by its official name.
        num_codebooks: groups of sign bits, which no shape tells; None: :func:`default_num_codebooks`.
        codebook_l2_norm: vq only; no shape tells it.

    Raises:
        ConfigError: the weights are no tokenizer's, or essential ones are missing.
    """
    family = _family(shapes)
    names = CODER_NAMES.get(family)
    levels, blocks = (names.encoder_levels, names.blocks) if names else ("down", "block")
    try:
        ch = shapes["encoder.conv_in.weight"][0]
        num_levels = _count(shapes, f"encoder.{levels}")
        widths = [shapes[f"encoder.{levels}.{i}.{blocks}.0.conv1.weight"][0] for i in range(num_levels)]
        num_res_blocks = _count(shapes, f"encoder.{levels}.0.{blocks}")
        if family == "lfq":
            dim = z_channels = shapes["encoder.conv_out.weight"][0]
            num_downsamples = sum(f"encoder.{levels}.{i}.downsample.weight" in shapes for i in range(num_levels))
            groups = num_codebooks or default_num_codebooks(dim)
            size = 2**dim
        else:
            size, dim = shapes["quantize.embedding.weight"]
            z_channels = shapes["quant_conv.weight"][1]
            num_downsamples, groups = num_levels - 1, 1
    except KeyError as missing:
        raise ConfigError(f"the tokenizer's weights lack {missing}") from None
    return TokenizerConfig(
        family=family,
        codebook_size=size,
        codebook_embed_dim=dim,
        z_channels=z_channels,
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=num_res_blocks,
        downsample=2**num_downsamples,
        num_codebooks=groups,
        codebook_l2_norm=codebook_l2_norm if family == "vq" else False,
    )


def unwrap(module: nn.Module) -> nn.Module:
    """The module below DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        inner = module._modules.get("_orig_mod")
        if inner is None and isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = module.module
        if inner is None:
            return module
        module = inner


def from_module(module: nn.Module) -> Tokenizer:
    """A :class:`Tokenizer` over the parameters of a user's own official tokenizer, in place.

    The view holds the very same ``Parameter`` objects: nothing is copied, and later changes of the weights, whichever
    way they are made, are seen. It is in eval mode whatever the mode of ``module``, which is left as it is.

    Args:
        module: an official VQModel, IBQModel, LFQModel or GLFQModel (GEAR or LlamaGen), bare or wrapped by
            DistributedDataParallel or torch.compile; or a :class:`Tokenizer`.

    Raises:
        ConfigError: not such a module, or one with a part that gear_engine does not compute.
    """
    official = unwrap(module)
    parameters = {name.replace("_orig_mod.", ""): value for name, value in official.named_parameters()}
    quantize = getattr(official, "quantize", None)
    if getattr(quantize, "cosine_similarity", False):
        raise ConfigError("an IBQ tokenizer with cosine_similarity=True is not supported; published ones have False")
    config = infer_config(
        {name: tuple(value.shape) for name, value in parameters.items()},
        num_codebooks=getattr(quantize, "num_codebooks", None),
        codebook_l2_norm=bool(getattr(quantize, "l2_norm", True)),
    )
    with torch.device("meta"):
        view = Tokenizer(config)
    expected = {name: tuple(value.shape) for name, value in view.named_parameters()}
    found = {name: tuple(value.shape) for name, value in parameters.items() if name not in _NO_WEIGHTS}
    if expected != found:
        name = min(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        raise ConfigError(
            f"the module is no published {config.family} tokenizer: {name} is {found.get(name, 'missing')}, "
            f"expected {expected.get(name, 'no such weight')}"
        )
    for name in expected:
        parent, _, leaf = name.rpartition(".")
        view.get_submodule(parent)._parameters[leaf] = parameters[name]
    return view.eval()
