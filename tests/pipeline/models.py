"""Small generators and text towers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from gear_engine.config import GeneratorConfig, TokenizerConfig
from gear_engine.models.transformer import Transformer

CLASS_CONFIG = GeneratorConfig(dim=72, n_layer=2, n_head=2, vocab_size=50, block_size=16, num_classes=7)
GEAR_TEXT_CONFIG = CLASS_CONFIG.replace(
    conditioning="text", cls_token_num=6, caption_dim=20, n_double_stream_layers=1, text_attn="causal"
)
LLAMAGEN_TEXT_CONFIG = GEAR_TEXT_CONFIG.replace(n_double_stream_layers=0, learned_uncond=True)
TOKENIZER_CONFIG = TokenizerConfig(family="vq", codebook_size=50, ch=32, ch_mult=(1, 2), z_channels=32, downsample=2)


def make_generator(config: GeneratorConfig = CLASS_CONFIG) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config).eval()
    nn.init.normal_(model.output.weight, std=2 * config.dim**-0.5)
    return model


class WordTokenizer:
    """Pads to the right with 0; a word's id is its length."""

    def __call__(self, texts: list[str], max_length: int, **_: Any) -> dict[str, torch.Tensor]:
        ids = torch.zeros(len(texts), max_length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            words = [len(word) for word in text.split()][:max_length]
            ids[row, : len(words)] = torch.tensor(words, dtype=torch.long)
            mask[row, : len(words)] = 1
        return {"input_ids": ids, "attention_mask": mask}


class Tower(nn.Module):
    """A text tower whose states are embeddings of position and word."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.config = SimpleNamespace(hidden_size=20)
        self.words = nn.Embedding(12, 20)
        self.places = nn.Parameter(torch.randn(6, 20))
        self.batches: list[int] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        self.batches.append(len(input_ids))
        return SimpleNamespace(last_hidden_state=self.words(input_ids) + self.places)


class TowerThatSeesItsBatch(Tower):
    """One whose states follow the number of prompts, as the rounding of a real one may, only more."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        found = super().forward(input_ids, attention_mask)
        return SimpleNamespace(last_hidden_state=found.last_hidden_state * len(input_ids))
