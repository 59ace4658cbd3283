"""The official signatures: sample and decode with the user's own modules, in place, with the official tokens.

A module is recognised by its structure, never by its import path: a GEAR or LlamaGen ``Transformer`` (bare, or wrapped
by DistributedDataParallel or torch.compile), an official tokenizer, or ours. Its weights are read anew at every call,
so weights swapped in by ``p.data.copy_(...)`` are used; between calls only static caches are kept, keyed weakly by the
module and without its weights. :func:`release` drops those too.

Source of the signatures: GEAR ``models/generate.py`` and ``models/generate_t2i.py``, LlamaGen
``autoregressive/models/generate.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import nn

from gear_engine import foreign_modules
from gear_engine.engine import Engine
from gear_engine.errors import InvalidRequestError
from gear_engine.models.condition import Condition, TextCondition
from gear_engine.models.weights import GeneratorWeights
from gear_engine.prefixes import check_conditions
from gear_engine.request import SamplingParams, check_length
from gear_engine.tokenizers import Tokenizer

__all__ = ["decode_code", "generate", "generate_t2i", "release"]

#: What is kept between calls: per module one engine, for its static caches; it holds weights only during a call.
_engines: weakref.WeakKeyDictionary[nn.Module, tuple[str, Engine]] = weakref.WeakKeyDictionary()


def generate(
    model: nn.Module,
    cond: torch.Tensor,
    max_new_tokens: int,
    emb_masks: torch.Tensor | None = None,
    cfg_scale: float = 1.0,
    cfg_interval: float = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    sample_logits: bool = True,
    *,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Image tokens for class labels, or for captions with LlamaGen's text models.

    Draws from torch's global generator of the model's device in the official order: under the same seed the tokens are
    the official ones (fp32), and the generator is left in the same state. Autocast is off inside.

    Args:
        model: a Transformer of ours, of GEAR or of LlamaGen, in eval mode.
        cond: labels (B,), integers; or caption states (B, T, caption_dim) for LlamaGen's text models.
        max_new_tokens: tokens per image, at most the model's ``block_size``.
        emb_masks: (B, T), non-zero where ``cond`` holds a caption token (LlamaGen's text models).
        cfg_scale, cfg_interval, temperature, top_k, top_p, sample_logits: see :class:`SamplingParams`.
        dtype: compute in this dtype (a copy of the weights lives for the call); None: the weights' own.
        generator: draw from this generator in place of the global one.
        backend: kernels to use; ``"auto"`` or a name in ``gear-engine info``.

    Returns:
        (B, max_new_tokens) int32 on the device of ``cond``.

    Raises:
        ConfigError: the module is in training mode, or is no such Transformer.
        InvalidRequestError: a label, mask, shape or setting out of range.
    """
    module = foreign_modules.unwrap(model, "tok_embeddings")
    weights = foreign_modules.generator_weights(module)
    config = weights.config
    condition: Condition
    if config.conditioning == "class":
        if emb_masks is not None and not bool((emb_masks != 0).all()):
            raise InvalidRequestError("a class label cannot be masked: leave emb_masks out for a class model")
        condition = torch.as_tensor(cond)
        if condition.dim() != 1:
            raise InvalidRequestError(f"class labels are one-dimensional, (B,), not {tuple(condition.shape)}")
    elif config.learned_uncond:
        condition = TextCondition(cond, emb_masks)
    else:
        raise InvalidRequestError("this text model has no null caption of its own: call generate_t2i with uncond_emb")
    params = SamplingParams(
        cfg_scale=cfg_scale,
        cfg_interval=cfg_interval,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        sample_logits=sample_logits,
    )
    return _sample(module, weights, condition, max_new_tokens, params, dtype, generator, backend)


def generate_t2i(
    model: nn.Module,
    cond_emb: torch.Tensor,
    uncond_emb: torch.Tensor | None,
    max_new_tokens: int,
    cond_mask: torch.Tensor | None = None,
    uncond_mask: torch.Tensor | None = None,
    cfg_scale: float = 4.0,
    cfg_interval: float = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    sample_logits: bool = True,
    *,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Image tokens for captions with GEAR's text models; tokens, draws and errors as :func:`generate`.

    Args:
        cond_emb, uncond_emb: (B, T, caption_dim) states of the captions and of the empty string; ``uncond_emb`` may be
            None without guidance, and is computed once if all its rows are one (``expand``).
        cond_mask, uncond_mask: (B, T), non-zero where the states hold a token. With guidance, masks count only if both
            are given, as officially.
    """
    module = foreign_modules.unwrap(model, "tok_embeddings")
    weights = foreign_modules.generator_weights(module)
    config = weights.config
    if config.conditioning != "text" or config.learned_uncond:
        raise InvalidRequestError("generate_t2i samples GEAR's text models; call generate for this one")
    params = SamplingParams(
        cfg_scale=cfg_scale,
        cfg_interval=cfg_interval,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        sample_logits=sample_logits,
    )
    if params.uses_guidance:
        if uncond_emb is None:
            raise InvalidRequestError(f"cfg_scale {cfg_scale} needs uncond_emb, the states of the empty caption")
        if cond_mask is None or uncond_mask is None:
            cond_mask = uncond_mask = None
        if _one_row(uncond_emb) and (uncond_mask is None or _one_row(uncond_mask)):
            uncond_emb, uncond_mask = uncond_emb[0], None if uncond_mask is None else uncond_mask[0]
    else:
        uncond_emb = uncond_mask = None
    condition = TextCondition(cond_emb, cond_mask, uncond_emb, uncond_mask)
    return _sample(module, weights, condition, max_new_tokens, params, dtype, generator, backend)


def _one_row(tensor: torch.Tensor) -> bool:
    """Whether all rows are one row in memory, as after ``expand``."""
    return tensor.shape[0] == 1 or tensor.stride(0) == 0


def _sample(
    module: nn.Module,
    weights: GeneratorWeights,
    condition: Condition,
    max_new_tokens: int,
    params: SamplingParams,
    dtype: torch.dtype | None,
    generator: torch.Generator | None,
    backend: str,
) -> torch.Tensor:
    count = check_length(max_new_tokens, weights.config.block_size)
    check_conditions(condition, [params] * len(condition), weights.config)
    engine = _engine(module, weights, len(condition), count, dtype, backend)
    try:
        tokens = engine.generate(condition, params, rng="torch", generator=generator, max_new_tokens=count)
    finally:
        engine.bind(None)
    given = condition if isinstance(condition, torch.Tensor) else condition.states
    return tokens.to(given.device)


def _engine(
    module: nn.Module,
    weights: GeneratorWeights,
    images: int,
    max_new_tokens: int,
    dtype: torch.dtype | None,
    backend: str,
) -> Engine:
    """The module's kept engine with ``weights`` bound to it, or a new one where the kept one is too small or other."""
    kept = _engines.pop(module, None)
    if kept is not None:
        name, engine = kept
        same = (name, engine.config, engine.device, engine.dtype) == (
            backend,
            weights.config,
            weights.device,
            dtype or weights.dtype,
        )
        if same and images <= engine.max_images and max_new_tokens <= engine.max_new_tokens:
            engine.bind(weights)
            _engines[module] = kept
            return engine
        # Its caches go before the larger ones come.
        del kept, engine
    engine = Engine(weights, max_images=images, dtype=dtype, backend=backend, max_new_tokens=max_new_tokens)
    _engines[module] = (backend, engine)
    return engine


def decode_code(
    vq: nn.Module, codes: torch.Tensor, shape: Sequence[int] | None = None, channel_first: bool = True
) -> torch.Tensor:
    """Images of token indices with the user's own tokenizer module (VQ, IBQ, LFQ, GLFQ), weights read in place.

    Args:
        vq: an official tokenizer module or ours, bare or wrapped, in eval mode.
        codes, shape, channel_first: see :meth:`gear_engine.tokenizers.Tokenizer.decode_code`.

    Returns:
        Floats (B, 3, H, W), about [-1, 1], in the module's dtype.
    """
    module = foreign_modules.unwrap(vq, "quantize")
    with torch.no_grad(), torch.autocast(codes.device.type, enabled=False):
        if isinstance(module, Tokenizer):
            return module.decode_code(codes, shape, channel_first)
        return foreign_modules.decode_code(module, codes, shape, channel_first)


def release(model: nn.Module | None = None) -> None:
    """Drop what is kept for ``model`` between calls: static caches, packed weights, captured graphs.

    None drops everything, for every module. The next call builds it again; results do not change.
    """
    if model is None:
        _engines.clear()
    else:
        _engines.pop(foreign_modules.innermost(model), None)
