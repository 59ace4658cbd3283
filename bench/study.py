"""GEAR against LlamaGen-REPA and straight-through under one budget: samples, codebook use and reconstruction by step.

    python -m gear_engine.bench.study --output-dir study            # three seeds, 16 px scenes
    python -m gear_engine.bench.study --preset quick                # the mechanism, in minutes
    python -m gear_engine.bench.study --preset large                # for a GPU

All recipes start from one tokenizer warm-up and see the same images in the same order for the same number of steps.
Killed at any time, the same command goes on. Writes ``<recipe>-<seed>.json`` per run, ``study.json``, ``study.md`` (a
table) and ``study.png``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from gear_engine.bench.study_report import plot, table
from gear_engine.bench.study_runs import RECIPES, SETTINGS, Settings, run_recipe, warm_up
from gear_engine.checkpoint import load_tokenizer
from gear_engine.files import write_atomic
from gear_engine.training.evaluation import Evaluation, as_record

__all__ = ["main", "run_study"]

_FRESH_SEED = 103


def run_study(
    settings: Settings, folder: Path, evaluation: Evaluation, *, seeds: list[int], recipes: list[str], cfg_scale: float
) -> dict[str, Any]:
    """Runs what is not there yet and returns the whole result, which is also in ``folder/study.json``.

    Several processes may share a folder if they take other seeds or recipes and the warm-up is done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start = warm_up(settings, folder)
    facts = _facts(settings, start, evaluation)
    print(f"judge: {100 * facts['judge_accuracy']:.2f}% of held-out scenes", flush=True)
    for seed in seeds:
        for name in recipes:
            run = run_recipe(settings, name, seed, folder, start, evaluation, cfg_scale)
            last = run["curve"][-1]
            print(
                f"{name} seed {seed}: distance {last['samples']['frechet_distance']:.2f}, "
                f"accuracy {100 * last['samples']['class_accuracy']:.1f}%, "
                f"PSNR {last['reconstruction']['psnr']:.2f} dB",
                flush=True,
            )
    runs = [json.loads(path.read_text()) for name in RECIPES for path in sorted(folder.glob(f"{name}-*.json"))]
    return {"settings": vars(settings) | {"cfg_scale": cfg_scale}, "facts": facts, "runs": runs}


def _facts(settings: Settings, start: Path, evaluation: Evaluation) -> dict[str, Any]:
    """What the curves are read against: the judge, real scenes, and the tokenizer after the warm-up."""
    tokenizer = load_tokenizer(start)
    real = evaluation.baseline_distance(settings.samples, _FRESH_SEED)
    return {
        "judge_accuracy": evaluation.judge_accuracy,
        "real_distance": real,
        "warm_up": as_record(evaluation.reconstruction(tokenizer, settings.restored)),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("study"), help="(%(default)s)")
    parser.add_argument("--preset", choices=tuple(SETTINGS), default="standard", help="(%(default)s)")
    parser.add_argument("--quick", dest="preset", action="store_const", const="quick", help="--preset quick")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(1 2 3)")
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=list(RECIPES), help="(all)")
    parser.add_argument("--cfg-scale", type=float, default=1.5, help="guidance of the evaluations (%(default)s)")
    flags = parser.parse_args(arguments)
    settings = SETTINGS[flags.preset]
    result = run_study(
        settings,
        flags.output_dir,
        Evaluation(settings.image_size),
        seeds=flags.seeds,
        recipes=flags.recipes,
        cfg_scale=flags.cfg_scale,
    )
    write_atomic(flags.output_dir / "study.json", (json.dumps(result, indent=1) + "\n").encode())
    text = table(result)
    write_atomic(flags.output_dir / "study.md", text.encode())
    plot(result, flags.output_dir / "study.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
