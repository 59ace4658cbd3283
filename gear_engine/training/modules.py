"""The trainable forward passes: one module per optimizer, each a single call, so that DistributedDataParallel fits.

``frozen(module, ...)`` runs a module with constants in place of its parameters: gradients pass through to its inputs
and none is formed for its weights. That is how the alignment reaches the tokenizer through the generator, and how the
adversarial loss reaches it through the discriminator, without touching either.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from gear_engine.models.layers import TransformerBlock
from gear_engine.models.rope import rope_table
from gear_engine.models.transformer import Transformer
from gear_engine.ops.dual_readout import dual_readout
from gear_engine.tokenizers import Tokenizer
from gear_engine.tokenizers.quantizers import to_rows
from gear_engine.training.sections import AlignmentConfig

__all__ = [
    "DiscriminatorPass",
    "Dropout",
    "GeneratorPass",
    "Projectors",
    "TokenizerOutput",
    "TokenizerPass",
    "frozen",
]


def frozen(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``module(*args, **kwargs)`` with its parameters as constants (the same memory); buffers are its own."""
    constants = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, constants, args, kwargs)


class TokenizerOutput(NamedTuple):
    """restored: images [B, 3, H, W]; diff: the quantizer's losses; indices: int64 [B, L]; soft: [B, L - 1, C] or None.

    ``indices`` are integers: whatever reads them gets no gradient from, and gives none to, the tokenizer.
    """

    restored: torch.Tensor
    diff: tuple[Any, ...]
    indices: torch.Tensor
    soft: torch.Tensor | None


class TokenizerPass(nn.Module):
    """Encodes, quantizes and decodes once; with ``table`` also the differentiable read-out of the same assignment."""

    def __init__(self, tokenizer: Tokenizer, alignment: AlignmentConfig) -> None:
        super().__init__()
        self.tokenizer, self.alignment = tokenizer, alignment

    def forward(self, images: torch.Tensor, table: torch.Tensor | None = None) -> TokenizerOutput:
        """images: [B, 3, H, W] in [-1, 1]; table: [K, C], the generator's token embeddings, without a gradient."""
        tokenizer = self.tokenizer
        z = tokenizer.quant_conv(tokenizer.encoder(images))
        # Nearest codes are decided in full precision also under autocast.
        with torch.autocast(images.device.type, enabled=False):
            z = z.to(images.dtype)
            quant, diff, (_, _, indices) = tokenizer.quantize(z)
            indices = indices.view(images.shape[0], -1)
            soft = None if table is None else self._soft(z, indices, table)
        return TokenizerOutput(tokenizer.decoder(tokenizer.post_quant_conv(quant)), diff, indices, soft)

    def _soft(self, z: torch.Tensor, indices: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """``softmax(-d / tau) @ table`` of all but the last token, [B, L - 1, C]."""
        alignment = self.alignment
        batch, length = indices.shape
        # The last token is nobody's input.
        rows = to_rows(z).view(batch, length, -1)[:, :-1].flatten(0, 1)
        codebook, distance = self.tokenizer.quantize.raw_codebook(rows)
        soft = dual_readout(rows, codebook, table, alignment.tau, distance)[1].view(batch, length - 1, -1)
        if alignment.branch == "straight_through":
            hard = F.embedding(indices[:, :-1], table)
            soft = soft + (hard - soft).detach()
        return soft


class Projectors(nn.Module):
    """Hidden states -> the encoder's feature space: three linear layers with SiLU between.

    Keys are those of the official trainer's bank of projectors (``projs.0.…``), of which this is the first.
    """

    def __init__(self, in_dim: int, hidden: int, out_dim: int) -> None:
        super().__init__()
        self.out_dim = out_dim
        layers = (
            nn.Linear(in_dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, out_dim),
        )
        self.projs = nn.ModuleList([nn.Sequential(*layers)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.projs[0](hidden)
        return out


class Dropout(NamedTuple):
    """Probabilities: on the embedded sequence, and after every attention and feed-forward block."""

    tokens: float = 0.0
    blocks: float = 0.0


NO_DROPOUT = Dropout()


class GeneratorPass(nn.Module):
    """The teacher-forced generator over [label | L - 1 tokens], and the projected hidden states after one block."""

    def __init__(self, generator: Transformer, projectors: Projectors | None, depth: int) -> None:
        super().__init__()
        self.generator, self.projectors, self.depth = generator, projectors, depth

    def forward(
        self,
        labels: torch.Tensor,
        *,
        tokens: torch.Tensor | None = None,
        embedded: torch.Tensor | None = None,
        dropout: Dropout = NO_DROPOUT,
        tap_only: bool = False,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits [B, L, K] and projected hidden states [B, L, D]; position t predicts token t.

        Args:
            labels: int64 [B]; label ``num_classes`` is the unconditional one.
            tokens: int64 [B, L - 1], or
            embedded: [B, L - 1, dim], vectors in place of token embeddings.
            dropout: for training.
            tap_only: stop after the tapped block; the logits are then None.
        """
        model, config = self.generator, self.generator.config
        inputs = model.tok_embeddings(tokens) if embedded is None else embedded
        h = torch.cat((model.cls_embedding(labels), inputs), dim=1)  # [B, L, dim]
        h = F.dropout(h, dropout.tokens)
        image = rope_table(config, h.device)
        # Prefix rows are zero, cosine included: prefix queries and keys are zero vectors.
        rope = torch.cat((image.new_zeros(1, *image.shape[1:]), image))[: h.shape[1]]
        projected = None
        for number, layer in enumerate(model.layers, start=1):
            assert isinstance(layer, TransformerBlock)
            h = h + F.dropout(layer.attention(layer.attention_norm(h), rope, None), dropout.blocks)
            h = h + F.dropout(layer.feed_forward(layer.ffn_norm(h)), dropout.blocks)
            if self.projectors is not None and number == self.depth:
                projected = self.projectors(h)
                if tap_only:
                    return None, projected
        logits: torch.Tensor = model.output(model.norm(h))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), projected


class DiscriminatorPass(nn.Module):
    """Logits of real and of restored images in one call."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: torch.Tensor, fake: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.discriminator(real), self.discriminator(fake)
