"""The generator as a module: official state-dict keys, and one parallel, differentiable forward."""

from __future__ import annotations

import torch
from torch import nn

from gear_engine.config import GeneratorConfig
from gear_engine.errors import ConfigError, InvalidRequestError
from gear_engine.models.condition import Condition, TextCondition
from gear_engine.models.layers import CaptionEmbedder, LabelEmbedder, RMSNorm, TransformerBlock
from gear_engine.models.rope import rope_table
from gear_engine.models.weights import GeneratorWeights

__all__ = ["Transformer", "prefix_mask", "weights_of"]


def prefix_mask(mask: torch.Tensor, length: int, text_attn: str) -> torch.Tensor:
    """Who sees whom: bool (B, 1, length, length), True = attends, for captions with ``mask`` (B, T).

    Image tokens see all valid prefix tokens and the image tokens before them. Prefix tokens see valid prefix tokens:
    those before them (``"causal"``) or all (``"prefix"``), never an image token. Every token sees itself.
    """
    prefix = mask.shape[1]
    order = torch.arange(length, device=mask.device)
    seen = order[None, :] <= order[:, None]  # [S, S]
    if text_attn == "prefix":
        seen = seen | ((order[:, None] < prefix) & (order[None, :] < prefix))
    valid = torch.ones(mask.shape[0], length, dtype=torch.bool, device=mask.device)
    valid[:, :prefix] = mask.bool()
    return ((seen & valid[:, None, :]) | (order[None, :] == order[:, None]))[:, None]


class Transformer(nn.Module):
    """A GEAR / LlamaGen generator, class- or text-conditional.

    State-dict keys are the official ones. Sampling goes through :class:`gear_engine.Engine`, which reads the weights in
    place; this module's own forward is the parallel, teacher-forced one, differentiable for training.

    Source: GEAR ``models/llamagen.py`` and ``models/llamagen_t2i.py``, LlamaGen ``autoregressive/models/gpt.py``.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding = LabelEmbedder(config) if config.conditioning == "class" else CaptionEmbedder(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            TransformerBlock(config, double_stream=layer < config.n_double_stream_layers)
            for layer in range(config.n_layer)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal with standard deviation 0.02 everywhere, zeros in the output head."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(std=0.02)
        self.output.weight.zero_()

    def weights(self) -> GeneratorWeights:
        """The weights by reference: later changes of the parameters show."""
        # torch.compile puts its own name into those of the layers that it wraps.
        state = {name.replace("_orig_mod.", ""): tensor for name, tensor in self.state_dict().items()}
        return GeneratorWeights.from_state_dict(self.config, state)

    def forward(self, tokens: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Logits of every position of the sequence [prefix | image tokens].

        Args:
            tokens: int64 (B, n), n <= block_size; or floats (B, n, vocab_size), rows that mix token embeddings.
            condition: int64 labels (B,) or a :class:`TextCondition` (its unconditional half is not used).

        Returns:
            fp32 (B, T + n, vocab_size), T the prefix length; position T - 1 + t predicts image token t.

        Raises:
            InvalidRequestError: the condition or the tokens do not fit the model.
        """
        config = self.config
        if tokens.shape[1] > config.block_size:
            raise InvalidRequestError(f"{tokens.shape[1]} tokens do not fit block_size {config.block_size}")
        length = config.cls_token_num + tokens.shape[1]
        mask = None
        if isinstance(condition, TextCondition):
            condition.check(config)
            prefix = self.cls_embedding(condition.states)
            valid = condition.mask
            if valid is None:
                valid = torch.ones(condition.states.shape[:2], dtype=torch.bool, device=prefix.device)
            mask = prefix_mask(valid, length, config.text_attn)
        else:
            if config.conditioning != "class":
                raise InvalidRequestError("this model is conditioned on captions: pass a TextCondition")
            prefix = self.cls_embedding(condition)
        table = self.tok_embeddings.weight
        embedded = tokens @ table if tokens.is_floating_point() else self.tok_embeddings(tokens)
        h = torch.cat((prefix, embedded), dim=1)  # [B, T + n, dim]
        # Prefix rows of the table are zero, cosine included: prefix queries and keys are zero vectors.
        image = rope_table(config, h.device)
        rope = torch.cat((image.new_zeros(config.cls_token_num, *image.shape[1:]), image))[:length]
        for layer in self.layers:
            h = layer(h, rope, mask)
        logits: torch.Tensor = self.output(self.norm(h)).float()
        return logits


def weights_of(generator: Transformer | GeneratorWeights) -> GeneratorWeights:
    """The weights of a module by reference, or the given ones; raises :class:`ConfigError` in training mode."""
    if isinstance(generator, GeneratorWeights):
        return generator
    if generator.training:
        raise ConfigError("the generator is in training mode: call eval() first")
    return generator.weights()
