"""``gear-engine sample``: class-conditional sampling with the flags and the layout of GEAR's ``src/inference.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gear_engine.cli import options
from gear_engine.errors import ConfigError, InvalidRequestError
from gear_engine.runs import labels as run_labels
from gear_engine.runs.batches import official_batches
from gear_engine.runs.record import Settings
from gear_engine.runs.world import World, detect_world

if TYPE_CHECKING:
    from gear_engine.cli.sampling import Plan
    from gear_engine.config import GeneratorConfig

__all__ = ["ClassSource", "add_parser", "run"]

_OFFICIAL_COUNT = 50_000


def add_parser(subparsers: Any) -> None:
    """Adds ``sample`` to the command line."""
    parser = subparsers.add_parser(
        "sample",
        help="sample images of classes from a checkpoint",
        description="Samples a class-conditional checkpoint into OUTPUT_DIR/EXPERIMENT/STEP/SAMPLING/: "
        "samples/%%06d.png, samples.npz (arr_0, uint8 NHWC) and run.json. An interrupted run resumes exactly. "
        "Start with torchrun or accelerate launch to use several processes.",
    )
    options.add_checkpoint_flags(parser)
    parser.add_argument("--num-classes", type=int, help="number of labels (default: from the checkpoint)")
    options.add_sampling_flags(parser)
    parser.add_argument(
        "--fid-num", type=int, metavar="N", help=f"number of images ({_OFFICIAL_COUNT}; or the labels')"
    )
    parser.add_argument(
        "--labels",
        default="random",
        metavar="random|balanced|FILE",
        help="random; balanced: image k has label k modulo the classes; or a file, one integer per line (%(default)s)",
    )
    options.add_engine_flags(parser)
    options.add_output_flags(parser, image_size_eval=256)


def run(args: argparse.Namespace) -> int:
    """Samples; the exit status."""
    from gear_engine.cli.sampling import build_engine, make_plan, sample_all

    world = detect_world()
    plan = make_plan(args, world)
    given = _given_labels(args)
    world.join()
    try:
        from gear_engine.cli.loading import load_models

        models = load_models(plan)
        if models.generator.config.conditioning != "class":
            raise ConfigError(f"{args.ckpt_path} is a text-to-image model: use gear-engine sample-t2i")
        engine = build_engine(plan, models)
        source = ClassSource.make(plan, models.generator.config, given)
        return sample_all(plan, models, engine, source)
    finally:
        world.leave()


@dataclass(frozen=True)
class ClassSource:
    """Labels in image order; see :class:`gear_engine.cli.sampling.Source`.

    Attributes:
        labels: at least ``count``. Surplus images of an official last batch take the labels behind, or start over.
        kind: ``"random"``, ``"balanced"`` or ``"file"``.
    """

    count: int
    labels: list[int]
    kind: str

    @classmethod
    def make(cls, plan: Plan, config: GeneratorConfig, given: list[int] | None) -> ClassSource:
        """The labels that the flags ask for.

        Raises:
            InvalidRequestError: a label that the model does not have.
        """
        args = plan.args
        count = args.fid_num or (len(given) if given is not None else _OFFICIAL_COUNT)
        kind = "file" if given is not None else args.labels
        if kind == "random" and args.rng == "torch":
            size, device = plan.world.size, str(plan.device)
            return cls(
                count,
                run_labels.official_labels(args.seed, count, config.num_classes, plan.batch, size, device),
                kind,
            )
        if given is not None:
            labels = given
            run_labels.check_labels(labels, config.num_classes if config.has_uncond_class else config.num_classes - 1)
        elif kind == "balanced":
            labels = run_labels.balanced_labels(count, config.num_classes)
        else:
            labels = run_labels.random_labels(args.seed, count, config.num_classes)
        return cls(count, labels, kind)

    def settings(self) -> Settings:
        return {"labels": {"source": self.kind, "sha256": run_labels.text_hash(self.labels[: self.count])}}

    def ordered_batches(self, world: World, batch: int) -> list[list[int]]:
        return official_batches(self.count, batch, world.size, world.rank)

    def torch_seed(self, seed: int, world: World) -> int:
        return seed + world.rank

    def condition(self, indices: Sequence[int]) -> list[int]:
        return [self.labels[index % len(self.labels)] for index in indices]


def _given_labels(args: argparse.Namespace) -> list[int] | None:
    """The labels of ``--labels FILE``, or None; checks ``--fid-num`` too."""
    if args.fid_num is not None and args.fid_num < 1:
        raise InvalidRequestError(f"--fid-num must be at least 1, got {args.fid_num}")
    if args.labels in ("random", "balanced"):
        return None
    path = Path(args.labels)
    if not path.exists():
        raise InvalidRequestError(f"--labels {args.labels}: say random, balanced, or a file with one integer per line")
    return run_labels.read_labels(path, args.fid_num)
