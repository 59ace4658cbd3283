"""Generators that are not ours, and what a call could leave on a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gear_engine.config import GeneratorConfig
from tests.golden_weights import golden_state_dict
from tests.plain_generator import PlainTransformer

CLASS_CONFIG = GeneratorConfig(dim=72, n_layer=2, n_head=2, vocab_size=97, block_size=16, num_classes=7)
GEAR_TEXT_CONFIG = CLASS_CONFIG.replace(
    conditioning="text", cls_token_num=6, caption_dim=20, n_double_stream_layers=1, text_attn="prefix"
)
LLAMAGEN_TEXT_CONFIG = CLASS_CONFIG.replace(conditioning="text", cls_token_num=6, caption_dim=20, learned_uncond=True)
TOKENS = 16


def plain(config: GeneratorConfig = CLASS_CONFIG, seed: int = 0) -> PlainTransformer:
    torch.manual_seed(seed)
    return PlainTransformer(config).eval()


def labels_null(model: PlainTransformer, labels: torch.Tensor) -> torch.Tensor:
    return torch.full_like(labels, model.num_classes)


def golden_model(entry: dict[str, Any]) -> PlainTransformer:
    names = ("dim", "n_layer", "n_head", "vocab_size", "block_size")
    fields = {name: entry[name] for name in names}
    if entry["kind"] == "c2i":
        config = GeneratorConfig(**fields, num_classes=entry["num_classes"])
    else:
        learned = entry["kind"] == "llamagen_t2i"
        double = entry.get("n_double_stream_layers", max(1, round(entry["n_layer"] / 3)))
        config = GeneratorConfig(
            **fields,
            conditioning="text",
            cls_token_num=entry["cls_token_num"],
            caption_dim=entry["caption_dim"],
            text_attn=entry.get("text_attn", "causal"),
            n_double_stream_layers=0 if learned else double,
            learned_uncond=learned,
        )
    model = PlainTransformer(config)
    model.load_state_dict(golden_state_dict(model))
    return model.eval()


def text_inputs(batch: int = 3, length: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    states = torch.randn(batch, length, 20)
    mask = torch.zeros(batch, length, dtype=torch.long)
    mask[0, :4], mask[1, 3:], mask[2, :] = 1, 1, 1
    return states, mask


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything that a call could leave on a module: attributes, tensors, addresses, versions, modes, hooks."""
    found: list[Any] = []
    for name, module in model.named_modules():
        plain_attributes = {key: id(value) for key, value in vars(module).items() if not key.startswith("_")}
        tables = {key: list(value) for key, value in vars(module).items() if isinstance(value, dict)}
        found.append((name, module.training, plain_attributes, tables))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if tensor.grad is None else tensor.grad.data_ptr()
        state = (tensor.data_ptr(), tensor._version, tensor.dtype, tensor.requires_grad, grad)
        found.append((name, id(tensor), *state, tensor.detach().clone()))
    return found
