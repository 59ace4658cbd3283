"""From the flags to models: which file, which weights, which overrides."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from gear_engine.checkpoint import Source
    from gear_engine.cli.sampling import Plan
    from gear_engine.config import GeneratorConfig
    from gear_engine.models.transformer import Transformer
    from gear_engine.tokenizers import Tokenizer

__all__ = ["Models", "load_models", "load_tokenizer_alone", "text_encoder_choice"]

_GENERATOR_FLAGS = (
    "ar_model",
    "image_size",
    "downsample_ratio",
    "n_head",
    "num_classes",
    "codebook_size",
    "cls_token_num",
    "text_attn",
)
_TOKENIZER_FLAGS = ("vq_model", "codebook_size", "codebook_embed_dim", "downsample_ratio")


@dataclass(frozen=True)
class Models:
    """What a sampling command runs, and where the weights came from."""

    generator: Transformer
    tokenizer: Tokenizer
    #: :meth:`Tokenizer.decode_code` in the arithmetic of ``--decode-dtype``.
    decode_code: Callable[..., torch.Tensor]
    generator_source: Source
    tokenizer_source: Source

    @property
    def image_size(self) -> int:
        """Edge of the generated images in pixels."""
        return self.generator.config.grid_size * self.tokenizer.config.downsample


def load_models(plan: Plan) -> Models:
    """Loads the generator and its tokenizer onto the process's device, and says which weights they are.

    Raises:
        CheckpointError: a file is unreadable, incomplete, contradicts a flag, or the two do not fit each other.
    """
    from gear_engine.checkpoint import check_pair, open_generator, open_tokenizer
    from gear_engine.cli.environment import dtype_of
    from gear_engine.cli.sampling import log

    args = plan.args
    # On a CPU the decoder rounds the convolutions' operands itself and keeps residuals and norms in fp32.
    decode_dtype = dtype_of("fp32" if plan.device.type == "cpu" else args.decode_dtype)
    generator, generator_source = open_generator(
        args.ckpt_path,
        plan.device,
        dtype_of(args.dtype),
        ema=args.use_ar_ema,
        **_given(args, _GENERATOR_FLAGS),
    )
    tokenizer, tokenizer_source = open_tokenizer(
        args.vq_ckpt_path or args.ckpt_path,
        plan.device,
        decode_dtype,
        ema=args.use_vq_ema,
        **_given(args, _TOKENIZER_FLAGS),
    )
    check_pair(generator.config, tokenizer.config)
    log(plan.world, f"generator: {generator_source}")
    log(plan.world, f"tokenizer: {tokenizer_source}")
    tokenizer = tokenizer.eval()
    decode_code = _decoder(tokenizer, plan)
    return Models(generator.eval(), tokenizer, decode_code, generator_source, tokenizer_source)


def _decoder(tokenizer: Tokenizer, plan: Plan) -> Callable[..., torch.Tensor]:
    """The weights do not change during a run: the CPU decoder packs them once."""
    from gear_engine.cli.environment import dtype_of
    from gear_engine.tokenizers import decoder_fast

    dtype = plan.args.decode_dtype
    if plan.device.type != "cpu" or (dtype == "fp32" and decoder_fast.unavailable() is not None):
        return tokenizer.decode_code
    return decoder_fast.Decoder(tokenizer, dtype=dtype_of(dtype)).decode_code


def load_tokenizer_alone(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Tokenizer:
    """The tokenizer of ``--tokenizer``."""
    from gear_engine.checkpoint import load_tokenizer

    return load_tokenizer(args.tokenizer, device, dtype, ema=args.use_vq_ema, **_given(args, ("vq_model",))).eval()


def text_encoder_choice(args: argparse.Namespace, config: GeneratorConfig) -> tuple[str | None, str]:
    """Name and precision of the text encoder: the flags, else what the checkpoint's own arguments say.

    See :func:`gear_engine.pipeline_inputs.trained_text_encoder`.
    """
    from gear_engine.pipeline_inputs import trained_text_encoder

    name, dtype = trained_text_encoder(args.ckpt_path, config)
    return args.text_encoder or name, args.text_dtype or dtype


def _given(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
