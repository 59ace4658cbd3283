"""What bf16 and int8 weights cost a trained model: divergence, equal draws, and the judge's view of the samples.

    python -m gear_engine.bench.precision [FOLDER] [--images 64] [--cfg-scale 2] [--judge] [--json OUT]

FOLDER is what ``gear-engine convert`` writes for a class-conditional model; without one, the model that ships with the
package. ``kl`` is the mean divergence KL(fp32 || format) of the guided distributions and ``equal_tokens_%`` the share
of equal draws under equal noise, both along tokens that fp32 drew, so that one early difference does not count for all
that follow. ``--judge`` (models of shapes) adds class accuracy and Fréchet distance of 1024 samples per format, see
:mod:`gear_engine.bench.shapes`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gear_engine import Engine, SamplingParams
from gear_engine.bench import timing
from gear_engine.bench.peak_memory import FORMATS
from gear_engine.bench.rollout import quality
from gear_engine.checkpoint import load_generator, load_tokenizer
from gear_engine.models.transformer import Transformer
from gear_engine.pretrained import SHAPES

__all__ = ["errors", "main"]

_JUDGED = 1024


def errors(generator: Transformer, images: int, cfg_scale: float, seed: int) -> list[dict[str, Any]]:
    """One row per format of :data:`gear_engine.bench.peak_memory.FORMATS`, the classes in turn."""
    config = generator.config
    labels = [index % config.num_classes for index in range(images)]
    engines = {
        name: Engine(generator, max_images=images, dtype=dtype, weight_format=kind)
        for name, (dtype, kind) in FORMATS.items()
    }
    seeds = list(range(seed * images, (seed + 1) * images))
    drawn = engines["fp32"].generate(labels, SamplingParams(cfg_scale=cfg_scale), seeds=seeds)
    return [{"format": name, **error} for name, error in quality(engines, labels, drawn, seed, cfg_scale).items()]


def _judged(folder: Path, generator: Transformer, cfg_scale: float, rows: list[dict[str, Any]]) -> None:
    """Adds what the judge sees to every row."""
    from gear_engine.training.evaluation import Evaluation

    tokenizer = load_tokenizer(folder)
    evaluation = Evaluation(generator.config.grid_size * tokenizer.config.downsample)
    for row in rows:
        dtype, kind = FORMATS[row["format"]]
        found = evaluation.samples(
            generator, tokenizer, count=_JUDGED, cfg_scale=cfg_scale, dtype=dtype, weight_format=kind
        )
        row |= {"class_accuracy_%": 100 * found.class_accuracy, "frechet_distance": found.frechet_distance}


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=SHAPES, help="folder (default: the shipped model)")
    parser.add_argument("--images", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--cfg-scale", type=float, default=2.0, help="guidance (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--judge", action="store_true", help="also judge samples (models of shapes only)")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    options = parser.parse_args(arguments)
    generator = load_generator(options.model)
    rows = errors(generator, options.images, options.cfg_scale, options.seed)
    if options.judge:
        _judged(options.model, generator, options.cfg_scale, rows)
    print(timing.render(rows))
    if options.json:
        settings = {"images": options.images, "cfg_scale": options.cfg_scale, "seed": options.seed}
        timing.write_json(options.json, {**timing.provenance(), "settings": settings, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
