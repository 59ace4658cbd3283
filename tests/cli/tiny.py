"""Tiny checkpoints in the official formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gear_engine.config import GeneratorConfig, TokenizerConfig
from gear_engine.models.transformer import Transformer
from gear_engine.tokenizers import build_tokenizer, to_uint8
from tests.golden_weights import golden_state_dict
from tests.plain_generator import PlainTransformer, plain_generate

IMAGE_SIZE = 64
NUM_CLASSES = 10

#: The narrowest published width, so that the number of heads is known; everything else is smaller.
GENERATOR = GeneratorConfig(dim=384, n_layer=1, n_head=12, vocab_size=64, block_size=16, num_classes=NUM_CLASSES)
TEXT_GENERATOR = GENERATOR.replace(
    conditioning="text", cls_token_num=6, caption_dim=24, n_double_stream_layers=1, num_classes=1000, n_layer=2
)
TOKENIZER = TokenizerConfig(
    family="vq", codebook_size=64, z_channels=32, ch=32, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1
)


def moved(weights: dict[str, torch.Tensor], by: float) -> dict[str, torch.Tensor]:
    """Other weights of the same shapes."""
    return {name: tensor * (1 + by) for name, tensor in weights.items()}


def stage1(path: Path, config: GeneratorConfig = GENERATOR, **args: Any) -> Path:
    """A GEAR stage-1 file: generator and tokenizer, live and EMA weights, args."""
    ar, vq = golden_state_dict(Transformer(config)), golden_state_dict(build_tokenizer(TOKENIZER))
    described = {
        "image_size": IMAGE_SIZE,
        "downsample_ratio": 16,
        "codebook_size": 64,
        "codebook_embed_dim": 8,
        "num_classes": config.num_classes,
        "cls_token_num": config.cls_token_num,
        **({"text_attn": config.text_attn} if config.conditioning == "text" else {}),
        **args,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "ar": moved(ar, 0.25),
            "ema": ar,
            "vq": moved(vq, 0.1),
            "vq_ema": vq,
            "args": described,
            "steps": 7,
        },
        path,
    )
    return path


def official_run(count: int, batch: int, seed: int, rank: int = 0, world: int = 1, **settings: Any) -> dict[int, Any]:
    """What one process of the official class-conditional program draws: image number -> (label, pixels).

    Tokens come from the plain sampler and torch's global generator, seeded after the models are built.
    """
    model = PlainTransformer(GENERATOR).eval()
    model.load_state_dict(golden_state_dict(Transformer(GENERATOR)))
    tokenizer = build_tokenizer(TOKENIZER)
    tokenizer.load_state_dict(golden_state_dict(tokenizer))
    torch.manual_seed(seed + rank)
    label_source = torch.Generator().manual_seed(seed * world + rank)
    images: dict[int, Any] = {}
    total = 0
    while total < count:
        labels = torch.randint(0, NUM_CLASSES, (batch,), generator=label_source)
        uncond = torch.full_like(labels, NUM_CLASSES)
        tokens = plain_generate(model, labels, GENERATOR.block_size, uncond=uncond, **settings)
        with torch.no_grad():
            pixels = to_uint8(tokenizer.decode_code(tokens, (batch, 8, 4, 4))).numpy()
        for i in range(batch):
            index = i * world + rank + total
            if index < count:
                images[index] = (int(labels[i]), np.asarray(pixels[i]))
        total += batch * world
    return images
