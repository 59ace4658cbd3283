"""Small checkpoints in every published format; weights follow the goldens' rule, names are the official ones."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch

from gear_engine.config import GeneratorConfig, TokenizerConfig
from gear_engine.tokenizers import build_tokenizer
from tests.golden_weights import golden_weight

StateDict = dict[str, torch.Tensor]

GENERATOR = GeneratorConfig(dim=48, n_layer=3, n_head=4, ffn_dim=64, vocab_size=64, num_classes=7, block_size=16)
TEXT = GENERATOR.replace(
    num_classes=1000,
    conditioning="text",
    cls_token_num=5,
    caption_dim=20,
    n_double_stream_layers=1,
    text_attn="prefix",
)
VQ = TokenizerConfig(
    family="vq",
    codebook_size=64,
    codebook_embed_dim=4,
    z_channels=8,
    ch=32,
    ch_mult=(1, 2),
    num_res_blocks=1,
    downsample=2,
)
IBQ = VQ.replace(family="ibq", codebook_embed_dim=8, num_res_blocks=2, codebook_l2_norm=False)
LFQ = VQ.replace(
    family="lfq", codebook_embed_dim=6, z_channels=6, ch_mult=(1, 1, 2), downsample=4, codebook_l2_norm=False
)
#: What a GEAR trainer saves for GENERATOR and VQ (``vars(args)``), as far as it matters and a little more.
ARGS: dict[str, Any] = {
    "image_size": 8,
    "downsample_ratio": 2,
    "num_classes": 7,
    "codebook_size": 64,
    "codebook_embed_dim": 4,
    "cls_token_num": 1,
    "dropout_p": 0.1,
    "exp_name": "tiny",
    "resume_step": None,
    "compile": True,
    "adam_betas": [0.9, 0.95],
}
#: No published width: the user has to say it.
HEADS = {"n_head": 4}


def generator_shapes(config: GeneratorConfig) -> dict[str, tuple[int, ...]]:
    """Official key -> shape, written down independently of the module."""
    dim, ffn, qkv = config.dim, config.ffn_dim, config.dim + 2 * config.n_kv_head * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (config.vocab_size, dim)}
    if config.conditioning == "class":
        shapes["cls_embedding.embedding_table.weight"] = (config.num_classes + config.has_uncond_class, dim)
    else:
        shapes["cls_embedding.cap_proj.fc1.weight"] = (dim, config.caption_dim)
        shapes["cls_embedding.cap_proj.fc2.weight"] = (dim, dim)
        if config.learned_uncond:
            shapes["cls_embedding.uncond_embedding"] = (config.cls_token_num, config.caption_dim)
    for layer in range(config.n_layer):
        names = {
            "attention.wqkv.weight": (qkv, dim),
            "attention.wo.weight": (dim, dim),
            "feed_forward.w1.weight": (ffn, dim),
            "feed_forward.w3.weight": (ffn, dim),
            "feed_forward.w2.weight": (dim, ffn),
            "attention_norm.weight": (dim,),
            "ffn_norm.weight": (dim,),
        }
        if layer < config.n_double_stream_layers:
            names |= {
                "attention.wqkv_text.weight": (qkv, dim),
                "attention.wo_text.weight": (dim, dim),
                "attention_norm_text.weight": (dim,),
            }
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in names.items()}
    return shapes | {"norm.weight": (dim,), "output.weight": (config.vocab_size, dim)}


def generator_state(config: GeneratorConfig = GENERATOR, shift: float = 0.0) -> StateDict:
    return dict(_state(config, shift))


def tokenizer_state(config: TokenizerConfig = VQ, shift: float = 0.0) -> StateDict:
    return dict(_state(config, shift))


@functools.cache
def _state(config: GeneratorConfig | TokenizerConfig, shift: float) -> StateDict:
    if isinstance(config, GeneratorConfig):
        shapes = generator_shapes(config)
    else:
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in build_tokenizer(config).state_dict().items()}
    return {name: golden_weight(name, shape) + shift for name, shape in shapes.items()}


def compiled(state: StateDict) -> StateDict:
    """The names after torch.compile."""
    return {f"_orig_mod.{name}": tensor for name, tensor in state.items()}


def optimizer(state: StateDict) -> dict[str, Any]:
    moments = {
        index: {"step": torch.tensor(3.0), "exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}
        for index, tensor in enumerate(state.values())
    }
    return {"state": moments, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "params": list(moments)}]}


def lightning(state: StateDict, averaged: StateDict) -> dict[str, Any]:
    """What TencentARC's trainers save: live keys, shadows without dots, a loss network with shadows of its own."""
    inner: StateDict = {**state, "loss.discriminator.main.0.weight": torch.zeros(2, 2)}
    inner["model_ema.decay"] = torch.tensor(0.999)
    inner["model_ema.num_updates"] = torch.tensor(7)
    inner["model_ema.lossdiscriminatormain0weight"] = torch.zeros(2, 2)
    inner |= {"model_ema." + name.replace(".", ""): tensor for name, tensor in averaged.items()}
    return {
        "epoch": 1,
        "global_step": 7,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": inner,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "dirpath": "x"}},
        "optimizer_states": [optimizer(state)],
        "lr_schedulers": [],
    }


def stage1(**changes: Any) -> dict[str, Any]:
    """GEAR stage 1: live values are the rule's plus one, EMA values the rule's."""
    root = {
        "ar": generator_state(shift=1.0),
        "ema": generator_state(),
        "projectors": {"0.weight": torch.zeros(3, 3)},
        "vq": tokenizer_state(shift=1.0),
        "vq_ema": tokenizer_state(),
        "discriminator": {"main.0.weight": torch.zeros(4, 4)},
        "opt_ar": optimizer(generator_state()),
        "sched_ar": {"last_epoch": 3, "lr_lambdas": [{}], "_last_lr": [1e-4]},
        "args": dict(ARGS),
        "steps": 3,
    }
    root |= changes
    return {name: value for name, value in root.items() if value is not ...}


def stage2(**changes: Any) -> dict[str, Any]:
    return stage1(vq=..., vq_ema=..., discriminator=..., opt_ar=..., sched_ar=..., **changes)


def namespace(**changes: Any) -> argparse.Namespace:
    """LlamaGen's ``args``."""
    return argparse.Namespace(
        **{"image_size": 8, "downsample_size": 2, "num_classes": 7, "vocab_size": 64, "gpt_type": "c2i", **changes}
    )


def save(path: Path, root: Any) -> Path:
    torch.save(root, path)
    return path


def equal(found: StateDict, expected: StateDict) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
