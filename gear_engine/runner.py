"""The model's two passes over a static cache: :func:`prefill` and :func:`decode_step`.

State travels as arguments: weights, ops, cache, and index tensors that say which row lives in which slot.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gear_engine.kv_cache import StaticKVCache
from gear_engine.models.condition import PrefixRows
from gear_engine.models.weights import BlockWeights, GeneratorWeights
from gear_engine.ops import GeneratorOps
from gear_engine.ops.skinny_linear import PackedWeight, Weight

__all__ = ["PrefixState", "decode_step", "encode_prefix", "prefill"]


@dataclass(frozen=True)
class PrefixState:
    """What decoding needs to know of P prefixes.

    Attributes:
        values: (n_layer, P, n_kv_head, head_dim): mean of the valid prefix values.
        bias: fp32 (P,): log of the number of valid prefix tokens, -inf without any.
        logits: fp32 (P, vocab_size): of the last prefix position; they give the first image token.
    """

    values: torch.Tensor
    bias: torch.Tensor
    logits: torch.Tensor

    def expand(self, count: int) -> PrefixState:
        """``count`` times the one prefix held here."""
        layers, _, heads, width = self.values.shape
        return PrefixState(
            self.values.expand(layers, count, heads, width), self.bias.expand(count), self.logits.expand(count, -1)
        )

    @staticmethod
    def join(states: list[PrefixState]) -> PrefixState:
        """The prefixes of all ``states``, in order."""
        if len(states) == 1:
            return states[0]
        return PrefixState(
            torch.cat([state.values for state in states], dim=1),
            torch.cat([state.bias for state in states]),
            torch.cat([state.logits for state in states]),
        )

    def select(self, index: int) -> PrefixState:
        return PrefixState(
            self.values[:, index : index + 1], self.bias[index : index + 1], self.logits[index : index + 1]
        )


def _gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form of rows (N, dim); a row's bits follow from that row alone.

    On a CPU torch's vector code and the scalar code for what is left over round differently, and where the one ends and
    the other begins follows the number of rows and threads: rows go one by one there.
    """
    if x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    return torch.stack([F.gelu(row, approximate="tanh") for row in x.unbind()])


def _embed(weights: GeneratorWeights, ops: GeneratorOps, rows: PrefixRows) -> torch.Tensor:
    """Prefix rows (N, dim): a label's embedding, or a caption's state through the caption MLP."""
    if weights.label_table is not None:
        return weights.label_table[rows.inputs]
    if weights.cap_fc1 is None or weights.cap_fc2 is None:
        raise ValueError("weights hold neither a label table nor a caption MLP")
    hidden = ops.skinny_linear(rows.inputs.to(weights.dtype), weights.cap_fc1)
    return ops.skinny_linear(_gelu(hidden), weights.cap_fc2)


def _values(
    ops: GeneratorOps, h: torch.Tensor, weight: Weight, norm: torch.Tensor, eps: float, kv_dim: int
) -> torch.Tensor:
    """The value rows (N, kv_dim) of ``wqkv``; a packed weight cannot be cut, so its other outputs are dropped."""
    if isinstance(weight, PackedWeight):
        return ops.skinny_linear(h, weight, norm_weight=norm, norm_eps=eps)[:, -kv_dim:]
    return ops.skinny_linear(h, weight[-kv_dim:], norm_weight=norm, norm_eps=eps)


def _prefix_means(values: torch.Tensor, rows: PrefixRows, bidirectional: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform attention inside the prefixes.

    Prefix queries and keys are zero vectors, so a row's output is the mean of the values that it may see: itself, and
    the valid rows before it (or all valid rows, if ``bidirectional``). Rows are packed, valid ones first, so the
    running mean over a prefix's packed rows is just that, for a padded last row too.

    Returns:
        (N, kv_dim): each row's output; (P, kv_dim): the mean of the valid values, zeros if there are none.
    """
    if rows.width == 1:
        # One row sees itself only; it is the whole prefix, or padding.
        return values, torch.where(rows.valid[:, None] > 0, values, torch.zeros_like(values))
    prefixes = rows.valid.shape[0]
    padded = values.new_zeros(prefixes, rows.width, values.shape[1], dtype=torch.float32)  # [P, W, kv_dim]
    padded[rows.prefix_of, rows.index_in] = values.float()
    counts = torch.arange(1, rows.width + 1, device=values.device)[None, :, None]
    running = padded.cumsum(dim=1) / counts
    overall = running[torch.arange(prefixes, device=values.device), (rows.valid - 1).clamp(min=0)]
    overall = torch.where(rows.valid[:, None] > 0, overall, torch.zeros_like(overall))
    out = running[rows.prefix_of, rows.index_in]
    if bidirectional:
        is_valid = rows.index_in < rows.valid[rows.prefix_of]
        out = torch.where(is_valid[:, None], overall[rows.prefix_of], out)
    return out.to(values.dtype), overall.to(values.dtype)


def _text_stream(block: BlockWeights) -> BlockWeights:
    """The block as prefix tokens see it: the text projections of a double-stream block, the shared ones otherwise."""
    if block.wqkv_text is None or block.wo_text is None or block.attention_norm_text is None:
        return block
    return dataclasses.replace(block, attention_norm=block.attention_norm_text, wqkv=block.wqkv_text, wo=block.wo_text)


def _feed_forward(ops: GeneratorOps, h: torch.Tensor, block: BlockWeights, eps: float) -> torch.Tensor:
    hidden = ops.skinny_linear(h, block.w1, norm_weight=block.ffn_norm, norm_eps=eps, gate=block.w3)
    return ops.skinny_linear(hidden, block.w2, residual=h)


def encode_prefix(weights: GeneratorWeights, ops: GeneratorOps, rows: PrefixRows) -> PrefixState:
    """Runs prefix rows through the model: only the value projection of attention is needed for them."""
    config = weights.config
    eps = config.norm_eps
    h = _embed(weights, ops, rows)  # [N, dim]
    means = []
    for layer, block in enumerate(weights.blocks):
        text = _text_stream(block)
        values = _values(ops, h, text.wqkv, text.attention_norm, eps, config.kv_dim)
        attended, mean = _prefix_means(values, rows, config.text_attn == "prefix")
        means.append(mean)
        if layer == config.n_layer - 1:
            # Only the last position's logits are wanted.
            h, attended = h[rows.last], attended[rows.last]
        if config.n_kv_head != config.n_head:
            heads = attended.view(-1, config.n_kv_head, config.head_dim)
            attended = heads.repeat_interleave(config.n_head // config.n_kv_head, dim=1).flatten(1)
        h = ops.skinny_linear(attended, text.wo, residual=h)
        h = _feed_forward(ops, h, block, eps)
    logits = ops.logits(h, weights.output, norm_weight=weights.norm, norm_eps=eps)
    values = torch.stack(means).unflatten(-1, (config.n_kv_head, config.head_dim))
    return PrefixState(values=values, bias=rows.valid.float().log(), logits=logits)


def prefill(
    weights: GeneratorWeights,
    ops: GeneratorOps,
    cache: StaticKVCache,
    slots: torch.Tensor,
    rows: PrefixRows,
    live: torch.Tensor | None = None,
) -> torch.Tensor:
    """Starts a sequence per prefix.

    Args:
        slots: int64 (R,): where the sequences live from now on.
        rows: R prefixes, from :func:`~gear_engine.models.condition.class_rows` or ``text_rows``.
        live: bool (R,), the leading rows; the others start nothing, see :meth:`StaticKVCache.write_prefix`.

    Returns:
        fp32 (R, vocab_size): logits of image token 0.
    """
    state = encode_prefix(weights, ops, rows)
    cache.write_prefix(slots, state.values, state.bias, live)
    return state.logits


def decode_step(
    weights: GeneratorWeights,
    ops: GeneratorOps,
    cache: StaticKVCache,
    slots: torch.Tensor,
    positions: torch.Tensor,
    tokens: torch.Tensor,
    *,
    first_slot: int | None = None,
    position: int | None = None,
) -> torch.Tensor:
    """One image token per row through the model, its keys and values into the cache.

    Args:
        slots: int64 (R,), distinct, or -1 for inert rows: nothing is written for them, their logits mean nothing.
        positions: int64 (R,): image-token index t of the tokens given.
        tokens: int64 (R,): the tokens at those positions; any token for an inert row.
        first_slot, position: hints from the host, as in :mod:`gear_engine.ops.decode_attention`.

    Returns:
        fp32 (R, vocab_size): logits of image token t + 1.
    """
    config = weights.config
    eps = config.norm_eps
    if ops.decode_step is not None:
        return ops.decode_step(weights, cache, config.n_head, eps, slots, positions, tokens)
    h = weights.tok_embeddings[tokens]  # [R, dim]
    for block, (keys, values), scales in zip(weights.blocks, cache.layers, cache.layer_scales, strict=True):
        qkv = ops.skinny_linear(h, block.wqkv, norm_weight=block.attention_norm, norm_eps=eps)
        attended = ops.decode_attention(
            qkv,
            keys,
            values,
            cache.prefix_bias,
            slots,
            positions,
            cache.rope,
            config.n_head,
            first_slot=first_slot,
            position=position,
            **({} if scales[0] is None else {"k_scale": scales[0], "v_scale": scales[1]}),
        )
        h = ops.skinny_linear(attended, block.wo, residual=h)
        h = _feed_forward(ops, h, block, eps)
    return ops.logits(h, weights.output, norm_weight=weights.norm, norm_eps=eps)
