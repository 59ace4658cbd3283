"""What a trained pair is worth: its samples and its reconstructions, measured against held-out scenes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from gear_engine.metrics import codebook_usage, frechet_distance, psnr
from gear_engine.models.transformer import Transformer
from gear_engine.ops.skinny_linear import PackKind
from gear_engine.pipeline import Pipeline
from gear_engine.tokenizers import Tokenizer, to_uint8
from gear_engine.training.judge import Judge, accuracy, train_judge
from gear_engine.training.scenes import CLASS_NAMES, make_scenes

__all__ = ["HELD_OUT_SEED", "JUDGE_SEED", "Evaluation", "Reconstruction", "SampleQuality", "as_record", "scenes"]

#: Seeds of the scenes that the judge is trained on and of those that nothing is trained on. A training run may take any
#: other seed.
JUDGE_SEED: Final = 101
HELD_OUT_SEED: Final = 102

_BLOCK: Final = 32


def scenes(count: int, seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rendered scenes as tensors: uint8 [count, 3, size, size] and int64 labels [count]."""
    images, labels = make_scenes(count, seed, size)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


@dataclass(frozen=True)
class SampleQuality:
    """Of ``count`` samples at guidance ``cfg_scale``.

    Attributes:
        class_accuracy: share that the judge sees as their label.
        frechet_distance: of the judge's features to those of the held-out images.
        codes_used, perplexity: of the sampled tokens, see :class:`gear_engine.metrics.CodebookUsage`.
    """

    count: int
    cfg_scale: float
    class_accuracy: float
    frechet_distance: float
    codes_used: int
    perplexity: float


@dataclass(frozen=True)
class Reconstruction:
    """Of ``count`` held-out images.

    Attributes:
        psnr: mean over images, dB, of 8-bit pixels.
        class_accuracy, frechet_distance: of the reconstructions: what perfect sampling could reach.
        codes_used, perplexity: of the images' codes.
    """

    count: int
    psnr: float
    class_accuracy: float
    frechet_distance: float
    codes_used: int
    perplexity: float


class Evaluation:
    """A judge trained on scenes of its own, and held-out scenes.

    Args:
        size: edge in pixels.
        held_out: number of held-out scenes.
        judge_images, judge_epochs: the judge's training.
    """

    def __init__(self, size: int, *, held_out: int = 2048, judge_images: int = 4096, judge_epochs: int = 6) -> None:
        images, labels = scenes(judge_images, JUDGE_SEED, size)
        self.judge: Judge = train_judge(images, labels, len(CLASS_NAMES), seed=JUDGE_SEED, epochs=judge_epochs)
        self.images, self.labels = scenes(held_out, HELD_OUT_SEED, size)
        self.judge_accuracy = accuracy(self.judge, self.images, self.labels)
        self._features = self.judge.look(self.images)[1]

    def baseline_distance(self, count: int, seed: int) -> float:
        """The Fréchet distance of ``count`` fresh real scenes: what a perfect model would show."""
        fresh, _ = scenes(count, seed, self.images.shape[-1])
        return frechet_distance(self.judge.look(fresh)[1], self._features)

    def _judged(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        logits, features = self.judge.look(images)
        return {
            "class_accuracy": float((logits.argmax(dim=1) == labels).double().mean()),
            "frechet_distance": frechet_distance(features, self._features),
        }

    @torch.no_grad()
    def samples(
        self,
        generator: Transformer,
        tokenizer: Tokenizer,
        *,
        count: int,
        cfg_scale: float,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        weight_format: PackKind | None = None,
    ) -> SampleQuality:
        """Draws ``count`` images, the classes in turn; image i has the random stream ``seed * count + i``.

        ``dtype`` and ``weight_format`` are those of :class:`gear_engine.Pipeline`.
        """
        labels = torch.arange(count) % len(CLASS_NAMES)
        pipe = Pipeline(
            generator, tokenizer, dtype=dtype, weight_format=weight_format, max_images=_BLOCK, decode_batch=_BLOCK
        )
        pipe.set_progress_bar_config(disable=True)
        seeds = range(seed * count, (seed + 1) * count)
        out = pipe(class_labels=labels, guidance_scale=cfg_scale, seeds=list(seeds), output_type="pt")
        assert isinstance(out.images, torch.Tensor)
        pixels = (out.images * 255).round().to(torch.uint8).cpu()
        usage = codebook_usage(out.tokens, tokenizer.config.codebook_size)
        judged = self._judged(pixels, labels)
        return SampleQuality(count, cfg_scale, codes_used=usage.num_used, perplexity=usage.perplexity, **judged)

    @torch.no_grad()
    def reconstruction(self, tokenizer: Tokenizer, count: int) -> Reconstruction:
        """Encodes and decodes the first ``count`` held-out images."""
        restored, codes = [], []
        for block in self.images[:count].split(_BLOCK):
            quant, _, info = tokenizer.encode(block.to(tokenizer.device, tokenizer.dtype) / 127.5 - 1.0)
            restored.append(to_uint8(tokenizer.decode(quant)).permute(0, 3, 1, 2).cpu())
            codes.append(info[2].cpu())
        images = torch.cat(restored)
        usage = codebook_usage(torch.cat(codes), tokenizer.config.codebook_size)
        return Reconstruction(
            len(images),
            psnr=float(psnr(images, self.images[:count]).mean()),
            codes_used=usage.num_used,
            perplexity=usage.perplexity,
            **self._judged(images, self.labels[:count]),
        )


def as_record(quality: SampleQuality | Reconstruction) -> dict[str, Any]:
    """Plain values for a JSON file."""
    return asdict(quality)
