"""The figures of a model of shapes: samples and reconstructions, judged.

    python -m gear_engine.bench.shapes            # the shipped one
    python -m gear_engine.bench.shapes FOLDER

FOLDER is what ``gear-engine convert`` writes; docs/shapes.md says how to train one. A classifier is trained here on
scenes of its own (nothing that the model was trained on) and checked on held-out ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gear_engine.checkpoint import load_generator, load_tokenizer
from gear_engine.files import write_atomic
from gear_engine.pretrained import SHAPES
from gear_engine.training.evaluation import Evaluation, as_record

__all__ = ["figures", "main"]

_FRESH_SEED = 103


def figures(folder: Path, *, count: int, cfg_scale: float, evaluation: Evaluation | None = None) -> dict[str, Any]:
    """Figures of the model in ``folder``: ``count`` samples, as many reconstructions, real scenes for comparison.

    ``evaluation`` holds the judge; by default one is trained.
    """
    generator, tokenizer = load_generator(folder), load_tokenizer(folder)
    if evaluation is None:
        evaluation = Evaluation(generator.config.grid_size * tokenizer.config.downsample)
    real = evaluation.baseline_distance(count, _FRESH_SEED)
    return {
        "judge_accuracy": evaluation.judge_accuracy,
        "real_distance": real,
        "num_codes": tokenizer.config.codebook_size,
        "reconstruction": as_record(evaluation.reconstruction(tokenizer, count)),
        "samples": as_record(evaluation.samples(generator, tokenizer, count=count, cfg_scale=cfg_scale)),
        "samples_without_guidance": as_record(evaluation.samples(generator, tokenizer, count=count, cfg_scale=1.0)),
    }


def _lines(found: dict[str, Any]) -> list[str]:
    restored, codes = found["reconstruction"], found["num_codes"]
    lines = [
        f"judge: {100 * found['judge_accuracy']:.2f}% of held-out scenes; "
        f"Fréchet distance of real scenes {found['real_distance']:.2f}",
        f"reconstruction of {restored['count']} held-out scenes: PSNR {restored['psnr']:.2f} dB, "
        f"class accuracy {100 * restored['class_accuracy']:.1f}%, Fréchet distance {restored['frechet_distance']:.2f}, "
        f"{restored['codes_used']} of {codes} codes used, perplexity {restored['perplexity']:.0f}",
    ]
    for name in ("samples", "samples_without_guidance"):
        drawn = found[name]
        lines.append(
            f"{drawn['count']} samples, guidance {drawn['cfg_scale']:g}: "
            f"class accuracy {100 * drawn['class_accuracy']:.1f}%, Fréchet distance {drawn['frechet_distance']:.2f}, "
            f"{drawn['codes_used']} codes used, perplexity {drawn['perplexity']:.0f}"
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=SHAPES, help="folder (default: the shipped model)")
    parser.add_argument("--count", type=int, default=1024, help="samples and reconstructions (%(default)s)")
    parser.add_argument("--cfg-scale", type=float, default=2.0, help="guidance (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the figures as JSON")
    flags = parser.parse_args(arguments)
    found = figures(flags.model, count=flags.count, cfg_scale=flags.cfg_scale)
    print("\n".join(_lines(found)))
    if flags.output is not None:
        write_atomic(flags.output, (json.dumps(found, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
