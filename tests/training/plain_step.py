"""The joint step once more, straight down in plain torch: no module, optimizer or loss of the package.

Written from the official training code's mathematics for the VQ family; weights are dictionaries under the official
keys. One :class:`PlainRun` holds them and their AdamW moments; :meth:`PlainRun.step` returns every loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]


# ---- the tokenizer -----------------------------------------------------------------------------------------------
def conv(w: Weights, name: str, x: torch.Tensor, stride: int = 1, padding: int = 1) -> torch.Tensor:
    return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), stride, padding)


def norm(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = x.shape
    grouped = x.reshape(batch, 32, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
    out = scaled.reshape(batch, channels, height, width)
    return out * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def residual(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    h = conv(w, f"{name}.conv1", swish(norm(w, f"{name}.norm1", x)))
    h = conv(w, f"{name}.conv2", swish(norm(w, f"{name}.norm2", h)))
    return x + h


def attention(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = x.shape
    h = norm(w, f"{name}.norm", x)
    q, k, v = (conv(w, f"{name}.{part}", h, padding=0).reshape(batch, channels, -1) for part in "qkv")
    weights = torch.softmax(torch.bmm(q.transpose(1, 2), k) / math.sqrt(channels), dim=2)  # [B, query, key]
    mixed = torch.bmm(v, weights.transpose(1, 2)).reshape(batch, channels, height, width)
    return x + conv(w, f"{name}.proj_out", mixed, padding=0)


def middle(w: Weights, name: str, h: torch.Tensor) -> torch.Tensor:
    return residual(w, f"{name}.mid.2", attention(w, f"{name}.mid.1", residual(w, f"{name}.mid.0", h)))


def encode(w: Weights, x: torch.Tensor) -> torch.Tensor:
    h = conv(w, "encoder.conv_in", x)
    h = residual(w, "encoder.conv_blocks.0.res.0", h)
    h = conv(w, "encoder.conv_blocks.0.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2, padding=0)
    h = residual(w, "encoder.conv_blocks.1.res.0", h)
    h = attention(w, "encoder.conv_blocks.1.attn.0", h)
    h = middle(w, "encoder", h)
    h = conv(w, "encoder.conv_out", swish(norm(w, "encoder.norm_out", h)))
    return conv(w, "quant_conv", h, padding=0)


def decode(w: Weights, z: torch.Tensor) -> torch.Tensor:
    h = conv(w, "decoder.conv_in", conv(w, "post_quant_conv", z, padding=0))
    h = middle(w, "decoder", h)
    for block in range(2):
        h = residual(w, f"decoder.conv_blocks.0.res.{block}", h)
        h = attention(w, f"decoder.conv_blocks.0.attn.{block}", h)
    h = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    h = conv(w, "decoder.conv_blocks.0.upsample.conv", h)
    for block in range(2):
        h = residual(w, f"decoder.conv_blocks.1.res.{block}", h)
    return conv(w, "decoder.conv_out", swish(norm(w, "decoder.norm_out", h)))


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def quantize(w: Weights, z: torch.Tensor, ratio: float, beta: float) -> tuple[torch.Tensor, ...]:
    """(quantized, distances, indices, codebook loss, commitment, weighted entropy, sample and average entropy)."""
    batch, dim, height, width = z.shape
    rows = unit(z.permute(0, 2, 3, 1).reshape(-1, dim))
    codes = unit(w["quantize.embedding.weight"])
    d = rows.square().sum(1)[:, None] + codes.square().sum(1)[None] - 2 * rows @ codes.T
    indices = d.argmin(1)
    chosen = codes[indices]
    codebook_loss = (chosen - rows.detach()).square().mean()
    commitment = beta * (chosen.detach() - rows).square().mean()
    logits = -d / 0.01
    p = torch.softmax(logits, 1)
    sample = -(p * torch.log_softmax(logits + 1e-5, 1)).sum(1).mean()
    average = -(p.mean(0) * torch.log(p.mean(0) + 1e-5)).sum()
    through = rows + (chosen - rows).detach()
    quantized = through.reshape(batch, height, width, dim).permute(0, 3, 1, 2)
    return quantized, d, indices, codebook_loss, commitment, ratio * (sample - average), sample, average


# ---- the generator -----------------------------------------------------------------------------------------------
def rotations(grid: int, head_dim: int) -> torch.Tensor:
    """complex64 [1 + grid * grid, head_dim / 2]; zero for the prefix token."""
    half = head_dim // 2
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, half, 2).float() / half)
    row, column = torch.meshgrid(torch.arange(grid).float(), torch.arange(grid).float(), indexing="ij")
    angles = torch.cat((row.reshape(-1, 1) * frequencies, column.reshape(-1, 1) * frequencies), dim=1)
    return torch.cat((torch.zeros(1, half, dtype=torch.complex64), torch.complex(angles.cos(), angles.sin())))


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def generate_states(
    w: Weights, inputs: torch.Tensor, labels: torch.Tensor, heads: int, layers: int
) -> list[torch.Tensor]:
    """Hidden states [B, L, dim] after each of ``layers`` blocks."""
    h = torch.cat((w["cls_embedding.embedding_table.weight"][labels][:, None], inputs), dim=1)
    batch, length, dim = h.shape
    turn = rotations(math.isqrt(length), dim // heads)[:length, None]
    turn = turn.to(torch.complex128) if h.dtype == torch.float64 else turn
    causal = torch.full((length, length), -torch.inf, dtype=h.dtype).triu(1)
    states = []
    for number in range(layers):
        name = f"layers.{number}"
        x = rms(h, w[f"{name}.attention_norm.weight"])
        q, k, v = (x @ w[f"{name}.attention.wqkv.weight"].T).reshape(batch, length, 3, heads, -1).unbind(2)
        q, k = (
            torch.view_as_real(torch.view_as_complex(y.reshape(batch, length, heads, -1, 2)) * turn).flatten(3)
            for y in (q, k)
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(dim // heads) + causal
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(batch, length, dim)
        h = h + mixed @ w[f"{name}.attention.wo.weight"].T
        x = rms(h, w[f"{name}.ffn_norm.weight"])
        gate = swish(x @ w[f"{name}.feed_forward.w1.weight"].T) * (x @ w[f"{name}.feed_forward.w3.weight"].T)
        h = h + gate @ w[f"{name}.feed_forward.w2.weight"].T
        states.append(h)
    return states


def project(w: Weights, h: torch.Tensor) -> torch.Tensor:
    for number in (0, 2, 4):
        h = h @ w[f"projs.0.{number}.weight"].T + w[f"projs.0.{number}.bias"]
        h = swish(h) if number < 4 else h
    return h


def minus_cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    per_image = [-(unit(x) * unit(y)).sum(-1).mean() for x, y in zip(a, b, strict=True)]
    return sum(per_image) / len(per_image)  # type: ignore[return-value]


# ---- the discriminator -------------------------------------------------------------------------------------------
def discriminate(w: Weights, x: torch.Tensor) -> torch.Tensor:
    h = F.leaky_relu(conv(w, "main.0", x, stride=2), 0.2)
    h = conv(w, "main.2", h)
    mean, variance = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), unbiased=False, keepdim=True)
    h = (h - mean) / torch.sqrt(variance + 1e-5) * w["main.3.weight"][:, None, None] + w["main.3.bias"][:, None, None]
    return conv(w, "main.5", F.leaky_relu(h, 0.2))


# ---- the step ----------------------------------------------------------------------------------------------------
class Adam:
    """AdamW without decay, gradients clipped to total norm 1, rate 0 at the first step."""

    def __init__(self, *groups: Weights, rate: float) -> None:
        self.weights = [w for group in groups for w in group.values() if w.requires_grad]
        self.rate, self.count = rate, 0
        self.m = [torch.zeros_like(w) for w in self.weights]
        self.v = [torch.zeros_like(w) for w in self.weights]

    @torch.no_grad()
    def step(self, total: torch.Tensor) -> torch.Tensor:
        grads = torch.autograd.grad(total, self.weights)
        length = torch.cat([g.flatten() for g in grads]).square().sum().sqrt()
        rate = self.rate if self.count else 0.0
        self.count += 1
        # All tensors at once: m = 0.9 m + 0.1 g, v = 0.999 v + 0.001 g^2, w -= rate m' / (sqrt(v') + 1e-8).
        grads = torch._foreach_mul(grads, min(1.0, 1.0 / (float(length) + 1e-6)))
        torch._foreach_mul_(self.m, 0.9)
        torch._foreach_add_(self.m, grads, alpha=0.1)
        torch._foreach_mul_(self.v, 0.999)
        torch._foreach_addcmul_(self.v, grads, grads, value=0.001)
        corrected = torch._foreach_sqrt(self.v)
        torch._foreach_div_(corrected, math.sqrt(1 - 0.999**self.count))
        torch._foreach_add_(corrected, 1e-8)
        torch._foreach_addcdiv_(self.weights, self.m, corrected, value=-rate / (1 - 0.9**self.count))
        return length


def trained(key: str) -> bool:
    """All but batch norm's statistics."""
    return "running" not in key and "num_batches" not in key


class PlainRun:
    """Weights under the official keys, by section: ``vq``, ``ar``, ``projectors``, ``discriminator``."""

    def __init__(
        self,
        sections: dict[str, Weights],
        targets: Callable[[torch.Tensor], torch.Tensor],
        perceptual: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        vq_rate: float,
        rate: float,
        heads: int,
        layers: int,
        depth: int,
        tau: float,
        decay: float,
    ) -> None:
        self.w = {
            name: {k: v.detach().clone().requires_grad_(trained(k)) for k, v in section.items()}
            for name, section in sections.items()
        }
        self.averages = {name: {k: v.detach().clone() for k, v in self.w[name].items()} for name in ("vq", "ar")}
        self.targets, self.perceptual = targets, perceptual
        self.heads, self.layers, self.depth, self.tau, self.decay = heads, layers, depth, tau, decay
        self.opt_vq = Adam(self.w["vq"], rate=vq_rate)
        self.opt_disc = Adam(self.w["discriminator"], rate=rate)
        self.opt_ar = Adam(self.w["ar"], self.w["projectors"], rate=rate)

    def step(self, pixels: torch.Tensor, labels: torch.Tensor, dropped: torch.Tensor) -> dict[str, float]:
        """pixels: uint8 [B, 3, H, W]; dropped: bool [B], labels replaced by the unconditional class."""
        vq, ar, disc = self.w["vq"], self.w["ar"], self.w["discriminator"]
        table = ar["tok_embeddings.weight"]
        x = pixels.to(table.dtype) / 127.5 - 1.0
        z_target = self.targets(pixels)
        # 1: the tokenizer
        z = encode(vq, x)
        quantized, d, indices, codebook, commitment, entropy, sample, average = quantize(vq, z, 0.05, 0.25)
        restored = decode(vq, quantized)
        reconstruction = (x - restored).abs().mean()
        perceptual = self.perceptual(x, restored)
        adversarial = -discriminate(disc, restored).mean()
        soft = (torch.softmax(-d / self.tau, 1) @ table).reshape(len(x), -1, table.shape[1])
        hidden = generate_states(ar, soft[:, :-1], labels, self.heads, self.depth)[-1]
        align_vq = minus_cosine(project(self.w["projectors"], hidden), z_target)
        vq_total = reconstruction + perceptual + codebook + commitment + entropy + 0.1 * adversarial + 1.5 * align_vq
        norm_vq = self.opt_vq.step(vq_total)
        # 2: the discriminator
        real, fake = discriminate(disc, x), discriminate(disc, restored.detach())
        d_loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        norm_disc = self.opt_disc.step(d_loss)
        # 3: the generator
        tokens = indices.reshape(len(x), -1)
        classes = ar["cls_embedding.embedding_table.weight"].shape[0] - 1
        states = generate_states(
            ar, table[tokens[:, :-1]], torch.where(dropped, classes, labels), self.heads, self.layers
        )
        logits = rms(states[-1], ar["norm.weight"]) @ ar["output.weight"].T
        cross_entropy = -logits.log_softmax(-1).gather(2, tokens[..., None]).mean()
        align_ar = minus_cosine(project(self.w["projectors"], states[self.depth - 1]), z_target)
        ar_total = cross_entropy + 0.5 * align_ar
        norm_ar = self.opt_ar.step(ar_total)
        with torch.no_grad():
            for name, shadow in self.averages.items():
                live = [self.w[name][key] for key in shadow]
                torch._foreach_lerp_(list(shadow.values()), live, 1 - self.decay)
        scalars = {
            "reconstruction_loss": reconstruction, "perceptual_loss": perceptual, "vq_loss": codebook,
            "commit_loss": commitment, "entropy_loss": entropy, "sample_entropy": sample, "avg_entropy": average,
            "gan_loss": adversarial, "proj_loss_vq": align_vq, "vq_total": vq_total, "grad_norm_vq": norm_vq,
            "d_loss": d_loss, "logits_real": real.mean(), "logits_fake": fake.mean(), "grad_norm_disc": norm_disc,
            "ce_loss": cross_entropy, "proj_loss_ar": align_ar, "ar_total": ar_total, "grad_norm_ar": norm_ar,
        }  # fmt: skip
        return {name: float(value.detach()) for name, value in scalars.items()}
