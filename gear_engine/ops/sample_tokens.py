"""One token per image from logits: guidance, temperature, top-k, top-p, draw; every image with its own settings.

For image b with conditional logits c = logits[b], in fp32 and in this order:

1. if uncond_rows[b] >= 0:  l = u + (c - u) * cfg_scale[b],  u = logits[uncond_rows[b]];  otherwise l = c
2. l = l / temperature[b]
3. drop l_v < the top_k[b]-th largest of l                            (ties with it stay)
4. if top_p[b] < 1: in descending order of what is left, drop tokens after softmax's running sum first exceeds top_p[b]
   (the first one over it stays)
5. p = softmax(l);  token = argmax p if greedy[b], otherwise argmax_v p_v / q_v;  the lowest index on ties

q is exponential noise: given (``noise``), or Philox's for (seed, position) as in :mod:`gear_engine.ops.philox`.
An image with draws[b] = false takes no part: its token is 0, whatever its logits hold. Logits that make p NaN give some
token of [0, V), 0 in the reference: the next step looks it up before the host hears of them.
``torch.multinomial(p, 1)`` is step 5 with q = ``empty_like(p).exponential_(1)`` from the same generator.

Source: GEAR ``models/generate.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gear_engine.ops import backends, native, philox, sample_tokens_cuda, triton_backend
from gear_engine.request import SamplingParams

__all__ = ["SamplingTable", "TokenSink", "filter_logits", "guide", "reference", "sample_tokens"]


@dataclass(frozen=True)
class SamplingTable:
    """The settings of B images, as tensors for the kernels and as facts for the host.

    Attributes:
        cfg_scale: fp32 (B,).
        uncond_rows: int64 (B,): the logits row of the unconditional half, -1 for an image without guidance.
        temperature: fp32 (B,), at least 1e-5.
        top_k: int64 (B,), in [1, V]; V keeps all.
        top_p: fp32 (B,), in (0, 1]; 1 keeps all.
        greedy: bool (B,).
        rows: number of rows of the logits: B plus one per guided image; B where unconditional rows are images that do
            not draw.
        params: the settings that the tensors were made of, one per image; None where the host does not know them, as
            in a step that is captured once and replayed with other settings.
        paired: every image is guided and ``uncond_rows`` is ``B + arange(B)``.
        uniform: the settings, if all images share them: products with a scalar then round as the official ones do.
        draws: bool (B,): whether an image draws; None means that all do.
    """

    cfg_scale: torch.Tensor
    uncond_rows: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    greedy: torch.Tensor
    rows: int
    params: tuple[SamplingParams, ...] | None
    paired: bool
    uniform: SamplingParams | None
    draws: torch.Tensor | None = None

    @property
    def images(self) -> int:
        """B."""
        return self.cfg_scale.shape[0]

    @classmethod
    def build(
        cls, params: Sequence[SamplingParams], guided: Sequence[bool], vocab_size: int, device: torch.device
    ) -> SamplingTable:
        """Unconditional rows follow the B conditional rows, one per guided image, in the images' order."""
        rows = len(params)
        uncond_rows = []
        for is_guided in guided:
            uncond_rows.append(rows if is_guided else -1)
            rows += is_guided

        def floats(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        return cls(
            cfg_scale=floats([p.cfg_scale for p in params]),
            uncond_rows=torch.tensor(uncond_rows, dtype=torch.int64, device=device),
            temperature=floats([max(p.temperature, 1e-5) for p in params]),
            top_k=torch.tensor([min(p.top_k, vocab_size) or vocab_size for p in params], device=device),
            top_p=floats([p.top_p for p in params]),
            greedy=torch.tensor([not p.sample_logits for p in params], device=device),
            rows=rows,
            params=tuple(params),
            paired=all(guided),
            uniform=params[0] if all(p == params[0] for p in params) else None,
        )


@dataclass(frozen=True)
class TokenSink:
    """Where drawn tokens also go, for the next step to read them on the device.

    Attributes:
        tokens: int64 (N, L), rows contiguous; image b's token is written to ``tokens[slots[b], positions[b]]``.
        slots: int64 (B,); -1 for an image that does not draw: the last row of ``tokens`` belongs to nobody.
    """

    tokens: torch.Tensor
    slots: torch.Tensor

    def write(self, drawn: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """Writes ``drawn`` (B,) and returns it."""
        if positions is None:
            raise ValueError("tokens that go to a table need positions")
        self.tokens[self.slots, positions] = drawn
        return drawn


def sample_tokens(
    logits: torch.Tensor,
    table: SamplingTable,
    *,
    noise: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    sink: TokenSink | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The module's formula, checked, by the chosen backend.

    Args:
        logits: fp32 (table.rows, V); rows [0, B) conditional, then the unconditional ones.
        table: the images' settings.
        noise: fp32 (B, V), positive; or None for Philox.
        seeds, positions: int64 (B,): Philox key and image-token index, unless ``noise`` is given or all are greedy.
        sink: a table that the tokens are also written to; needs ``positions``.

    Returns:
        int64 (B,).

    Raises:
        ValueError: a shape or dtype does not fit, or there is no source of noise for an image that needs it.
    """
    images = table.images
    if logits.dim() != 2 or logits.shape[0] != table.rows or logits.dtype != torch.float32:
        raise ValueError(f"logits must be fp32 ({table.rows}, V), not {logits.dtype} {tuple(logits.shape)}")
    if noise is not None and noise.shape != (images, logits.shape[1]):
        raise ValueError(f"noise {tuple(noise.shape)} must be ({images}, {logits.shape[1]})")
    if noise is None and (table.params is None or any(p.sample_logits for p in table.params)):
        for name, index in (("seeds", seeds), ("positions", positions)):
            if index is None or index.shape != (images,) or index.dtype != torch.int64:
                raise ValueError(f"{name} must be int64 ({images},) when no noise is given")
    run = backends.resolve("sample_tokens", logits.device, logits.dtype, backend).load()
    if sink is not None and (positions is None or sink.tokens.dtype != torch.int64 or sink.tokens.stride(1) != 1):
        raise ValueError("tokens go to an int64 table with contiguous rows, and need positions")
    out: torch.Tensor = run(logits, table, noise=noise, seeds=seeds, positions=positions, sink=sink)
    return out


def guide(logits: torch.Tensor, table: SamplingTable) -> torch.Tensor:
    """Step 1: (B, V). May return a view of ``logits``, which it never writes."""
    images = table.images
    cond = logits[:images]
    if table.params is not None and table.rows == images:
        return cond
    scale = table.uniform.cfg_scale if table.uniform else table.cfg_scale[:, None]
    if table.paired:
        uncond = logits[images:]
        return uncond + (cond - uncond) * scale
    uncond = logits[table.uncond_rows.clamp(min=0)]
    return torch.where(table.uncond_rows[:, None] >= 0, uncond + (cond - uncond) * scale, cond)


def filter_logits(logits: torch.Tensor, table: SamplingTable) -> torch.Tensor:
    """Steps 3 and 4: dropped tokens become -inf. Returns ``logits`` itself when nothing is to be dropped."""
    vocab_size = logits.shape[1]
    if table.params is None:
        top_k, any_top_p = [1, vocab_size], True
    else:
        top_k = [min(p.top_k, vocab_size) or vocab_size for p in table.params]
        any_top_p = min(p.top_p for p in table.params) < 1
    if min(top_k) < vocab_size:
        largest = vocab_size if table.params is None else max(k for k in top_k if k < vocab_size)
        values = torch.topk(logits, largest).values  # [B, k], descending
        threshold = values.gather(1, (table.top_k[:, None] - 1).clamp(max=largest - 1))  # [B, 1]
        logits = logits.masked_fill((logits < threshold) & (table.top_k[:, None] < vocab_size), float("-inf"))
    if any_top_p:
        in_order, order = torch.sort(logits, descending=True)
        total = torch.cumsum(F.softmax(in_order, dim=-1), dim=-1)
        over = (total > table.top_p[:, None]) & (table.top_p[:, None] < 1)
        # A token goes if the sum up to the one before it is already over: the first one over stays.
        over = F.pad(over[:, :-1], (1, 0), value=False)
        logits = logits.masked_fill(over.scatter(1, order, over), float("-inf"))
    return logits


def reference(
    logits: torch.Tensor,
    table: SamplingTable,
    *,
    noise: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    sink: TokenSink | None = None,
) -> torch.Tensor:
    """Plain torch; all images at once, and no pass over the vocabulary that no image asks for."""
    uniform = table.uniform
    scores = guide(logits, table)
    if uniform is None:
        scores = scores / table.temperature[:, None]
    elif uniform.temperature != 1:
        scores = scores / max(uniform.temperature, 1e-5)
    raced = probabilities = F.softmax(filter_logits(scores, table), dim=-1)
    greedy = None if table.params is None else [not p.sample_logits for p in table.params]
    if greedy is None or not all(greedy):
        if noise is None:
            if seeds is None or positions is None:
                raise ValueError("an image that is drawn needs noise, or a seed and a position")
            noise = philox.reference(seeds, positions, logits.shape[1])
        raced = probabilities / noise
        if greedy is None or any(greedy):
            raced = torch.where(table.greedy[:, None], probabilities, raced)
    tokens = raced.argmax(dim=-1)
    if table.draws is not None:
        tokens = torch.where(table.draws, tokens, 0)
    return tokens if sink is None else sink.write(tokens, positions)


def _cpu(
    logits: torch.Tensor,
    table: SamplingTable,
    *,
    noise: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    sink: TokenSink | None = None,
) -> torch.Tensor:
    """Compiled; no sort. An image's token depends on its own logits, settings and noise only.

    The sums of step 4 are doubles over fp32 probabilities, each rounded to fp32 when compared with top_p. Where equal
    logits straddle the limit, the lower indices stay, as a stable sort would have it; torch's own sort is not stable
    and leaves it open which do. Exponentials differ from torch's in their last bits, so a token whose running sum lies
    within about 1e-6 of top_p may fall on the other side.
    """
    logits = logits.contiguous()
    images = table.images
    out = torch.empty(images, dtype=torch.int64)
    noise = None if noise is None else noise.contiguous()
    seeds = None if seeds is None else seeds.contiguous()
    positions = None if positions is None else positions.contiguous()
    native.cpu_kernels().sample_tokens_cpu(
        images, logits.shape[1], logits.data_ptr(), table.uncond_rows.data_ptr(), table.cfg_scale.data_ptr(),
        table.temperature.data_ptr(), table.top_k.data_ptr(), table.top_p.data_ptr(), table.greedy.data_ptr(),
        0 if noise is None else noise.data_ptr(), 0 if seeds is None else seeds.data_ptr(),
        0 if positions is None else positions.data_ptr(), 0 if table.draws is None else table.draws.data_ptr(),
        out.data_ptr(),
    )  # fmt: skip
    return out if sink is None else sink.write(out, positions)


backends.register("sample_tokens", "reference", lambda: reference)
backends.register(
    "sample_tokens",
    "cpu",
    lambda: _cpu,
    devices=frozenset({"cpu"}),
    dtypes=frozenset({torch.float32}),
    unavailable=lambda: native.unavailable("sample_tokens_cpu"),
)
backends.register(
    "sample_tokens",
    "cuda",
    lambda: sample_tokens_cuda.run,
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.float32}),
    unavailable=lambda: native.unavailable("sample_tokens_cuda"),
)
triton_backend.register("sample_tokens", frozenset({torch.float32}))
