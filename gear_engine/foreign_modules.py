"""Reads modules that are not ours: the official generators and tokenizers, by structure, weights in place.

Nothing is imported from their packages and nothing is written to them; tensors are referenced for the caller's use
and not kept. Source of the attribute names: GEAR ``models/*.py``, LlamaGen ``autoregressive/models/gpt.py`` and
``tokenizer/tokenizer_image/vq_model.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gear_engine.config import GeneratorConfig, TokenizerConfig
from gear_engine.errors import CheckpointError, ConfigError
from gear_engine.models.transformer import Transformer
from gear_engine.models.weights import GeneratorWeights
from gear_engine.tokenizers import Tokenizer, build_tokenizer

__all__ = ["decode_code", "generator_config", "generator_weights", "innermost", "tokenizer_config", "unwrap"]

#: Buffers of official tokenizers that are no weights.
_TOKENIZER_BUFFERS = ("quantize.codebook_used", "quantize.mask", "quantize.codebook")


def innermost(model: nn.Module) -> nn.Module:
    """The module below DistributedDataParallel (``.module``) and torch.compile (``._orig_mod``)."""
    module = model
    while "tok_embeddings" not in module._modules and "quantize" not in module._modules:
        wrapped = [module._modules[name] for name in ("_orig_mod", "module") if name in module._modules]
        if not wrapped or wrapped[0] is None:
            break
        module = wrapped[0]
    return module


def unwrap(model: nn.Module, attribute: str) -> nn.Module:
    """The innermost module, checked to hold ``attribute`` and to be in eval mode.

    Raises:
        ConfigError: no such module, or it (or a part of it) is in training mode.
    """
    module = innermost(model)
    if attribute not in module._modules:
        raise ConfigError(f"{type(model).__name__} is no model that gear_engine knows: it has no {attribute!r}")
    for name, part in module.named_modules():
        # The official samplers attach caches to a module in eval mode; those start, and stay, in training mode.
        if part.training and "kv_cache" not in name:
            where = name or "the module itself"
            raise ConfigError(f"{type(module).__name__} is in training mode ({where}): call model.eval() first")
    return module


def _get(owner: Any, path: str, module: nn.Module) -> Any:
    for name in path.split("."):
        try:
            owner = getattr(owner, name)
        except AttributeError:
            raise ConfigError(
                f"{type(module).__name__} is no GEAR or LlamaGen model: it has no attribute {path!r}"
            ) from None
    return owner


def generator_config(module: nn.Module) -> GeneratorConfig:
    """The configuration of an official ``Transformer`` module, from its ``config`` and its layers.

    Raises:
        ConfigError: an attribute of the official classes is missing, or the sizes contradict themselves.
    """
    args = _get(module, "config", module)
    layers = _get(module, "layers", module)
    if len(layers) == 0:
        raise ConfigError(f"{type(module).__name__} has no layers")
    double = [hasattr(block.attention, "wqkv_text") for block in layers]
    if any(late and not early for early, late in itertools.pairwise(double)):
        raise ConfigError("double-stream blocks must come before the single-stream ones")
    fields: dict[str, Any] = {
        "dim": _get(args, "dim", module),
        "n_layer": len(layers),
        "n_head": _get(args, "n_head", module),
        "n_kv_head": getattr(args, "n_kv_head", None) or 0,
        "ffn_dim": _get(layers[0], "feed_forward.w1.weight", module).shape[0],
        "vocab_size": _get(module, "tok_embeddings.weight", module).shape[0],
        "block_size": _get(args, "block_size", module),
        "rope_base": float(_get(args, "rope_base", module)),
        "norm_eps": float(_get(args, "norm_eps", module)),
    }
    embedding = _get(module, "cls_embedding", module)
    if hasattr(embedding, "embedding_table"):
        classes = int(_get(args, "num_classes", module))
        rows = embedding.embedding_table.weight.shape[0]
        return GeneratorConfig(**fields, num_classes=classes, has_uncond_class=rows > classes)
    return GeneratorConfig(
        **fields,
        conditioning="text",
        cls_token_num=_get(args, "cls_token_num", module),
        caption_dim=_get(embedding, "cap_proj.fc1.weight", module).shape[1],
        text_attn=getattr(args, "text_attn", "causal"),
        n_double_stream_layers=sum(double),
        learned_uncond=hasattr(embedding, "uncond_embedding"),
    )


def _parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by their official names, also where layers were compiled one by one."""
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in module.named_parameters()}


def generator_weights(module: nn.Module) -> GeneratorWeights:
    """The weights of an official or own Transformer, by reference.

    Raises:
        ConfigError: the module has other parameters than the official classes; the message names the first.
    """
    if isinstance(module, Transformer):
        return module.weights()
    state = _parameters(module)
    uncond = "cls_embedding.uncond_embedding"
    state |= {name: tensor for name, tensor in module.named_buffers() if name == uncond}
    try:
        return GeneratorWeights.from_state_dict(generator_config(module), state)
    except CheckpointError as error:
        raise ConfigError(f"{type(module).__name__} is no GEAR or LlamaGen Transformer: {error}") from error


def tokenizer_config(module: nn.Module) -> TokenizerConfig:
    """The configuration of an official tokenizer module, from its ``config`` and its quantizer."""
    args = _get(module, "config", module)
    quantizer = _get(module, "quantize", module)
    fields: dict[str, Any] = {
        "codebook_embed_dim": _get(args, "codebook_embed_dim", module),
        "ch": _get(module, "decoder.conv_out.weight", module).shape[1],
        "num_res_blocks": getattr(args, "num_res_blocks", 2),
        "codebook_l2_norm": False,
    }
    if not hasattr(module, "quant_conv"):
        mult = tuple(_get(args, "ch_mult", module))
        return TokenizerConfig(
            **fields,
            family="lfq",
            codebook_size=2 ** fields["codebook_embed_dim"],
            z_channels=fields["codebook_embed_dim"],
            ch_mult=mult,
            downsample=getattr(args, "downsample", 2 ** (len(mult) - 1)),
            num_codebooks=getattr(args, "num_codebooks", 1),
        )
    is_vq = hasattr(quantizer, "l2_norm")
    fields["codebook_l2_norm"] = bool(getattr(quantizer, "l2_norm", False))
    mult = tuple(getattr(args, "decoder_ch_mult", None) or _get(args, "ch_mult", module))
    return TokenizerConfig(
        **fields,
        family="vq" if is_vq else "ibq",
        codebook_size=_get(quantizer, "embedding.weight", module).shape[0],
        z_channels=_get(args, "z_channels", module),
        ch_mult=mult,
        downsample=2 ** (len(mult) - 1),
    )


class _Decode(nn.Module):
    """``decode_code`` as a forward, so that the tensors of another module can be lent to it for one call."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, codes: torch.Tensor, shape: Sequence[int] | None, channel_first: bool) -> torch.Tensor:
        return self.tokenizer.decode_code(codes, shape, channel_first)


def decode_code(
    module: nn.Module, codes: torch.Tensor, shape: Sequence[int] | None, channel_first: bool
) -> torch.Tensor:
    """:meth:`Tokenizer.decode_code` with the weights of ``module``, an official tokenizer, in place.

    Raises:
        ConfigError: the module has other parameters than the official classes; the message names the first.
    """
    with torch.device("meta"):
        shell = build_tokenizer(tokenizer_config(module))
    state = _parameters(module)
    expected = {name: tensor.shape for name, tensor in shell.state_dict().items()}
    name_of = type(module).__name__
    for name, shape_wanted in expected.items():
        if name not in state or state[name].shape != shape_wanted:
            found = tuple(state[name].shape) if name in state else "missing"
            raise ConfigError(f"{name_of} is no tokenizer of the family: {name} is {found}, not {tuple(shape_wanted)}")
    for name in [*state, *(name.replace("_orig_mod.", "") for name, _ in module.named_buffers())]:
        if name not in expected and name not in _TOKENIZER_BUFFERS:
            raise ConfigError(f"{name_of} is no tokenizer of the family: unknown tensor {name}")
    lent = {f"tokenizer.{name}": tensor.detach() for name, tensor in state.items()}
    images: torch.Tensor = torch.func.functional_call(_Decode(shell), lent, (codes, shape, channel_first))
    return images
