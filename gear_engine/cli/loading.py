"""From the flags to models: which file, which weights, which overrides."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from gear_engine.checkpoint import Source
    from gear_engine.cli.sampling import Plan
    from gear_engine.config import GeneratorConfig
    from gear_engine.models.transformer import Transformer
    from gear_engine.tokenizers import Decoder, DeviceDecoder, Tokenizer

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
    #: Decodes in the arithmetic of ``--decode-dtype``; None: the tokenizer does.
    decoder: Decoder | DeviceDecoder | None
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
        BackendUnavailableError: the decoder cannot run here as asked for.
    """
    from gear_engine.checkpoint import check_pair, open_generator, open_tokenizer
    from gear_engine.cli.environment import dtype_of, parse_backend
    from gear_engine.cli.sampling import log
    from gear_engine.tokenizers import choose_decoder, decoder_name

    args = plan.args
    # Decoders round the convolutions' operands themselves and keep residuals and norms in fp32.
    in_fp16 = plan.device.type != "cpu" and args.decode_dtype == "fp16"
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
        dtype_of("fp16" if in_fp16 else "fp32"),
        ema=args.use_vq_ema,
        **_given(args, _TOKENIZER_FLAGS),
    )
    check_pair(generator.config, tokenizer.config)
    log(plan.world, f"generator: {generator_source}")
    log(plan.world, f"tokenizer: {tokenizer_source}")
    tokenizer = tokenizer.eval()
    # Without compiled kernels a CPU decodes fp32 by the modules; run.json says so.
    plain = in_fp16 or (args.decode_dtype == "fp32" and decoder_name(None, tokenizer) == "reference")
    decode_dtype = None if plain else dtype_of(args.decode_dtype)
    batch, backend = min(plan.decode_batch, plan.batch), parse_backend(args.backend)
    decoder = choose_decoder(tokenizer, decode_dtype, batch, backend)
    return Models(generator.eval(), tokenizer, decoder, generator_source, tokenizer_source)


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
