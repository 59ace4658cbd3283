"""The training loop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gear_engine.errors import NumericalError, ResumeMismatchError
from gear_engine.files import write_atomic
from gear_engine.runs.world import World
from gear_engine.training import checkpoints
from gear_engine.training.config import TrainConfig
from gear_engine.training.data import Batch, ImageSource, batches, open_source
from gear_engine.training.logs import Log, write_samples
from gear_engine.training.small_encoder import SmallEncoder
from gear_engine.training.state import build_state
from gear_engine.training.steps import Scalars, run_step

__all__ = ["Trainer"]

ONE_PROCESS = World()
_NOISE = 3
_QUIET: Callable[[dict[str, Any]], None] = lambda record: None  # noqa: E731


class Trainer:
    """Trains one stage.

    >>> trainer = Trainer(load_config("joint.toml"))
    >>> for record in trainer.run():      # one step each; a dict of floats at logged steps, else None
    ...     ...
    >>> trainer.state.generator_ema, trainer.state.tokenizer_ema

    Args:
        config: the settings.
        source: the images; by default those of ``config.data.path``.
        resume: continue the run in ``config.folder`` from its newest checkpoint, if there is one.
        world: this process among those of the run; the others must have met already (:meth:`World.join`).
        device: where to train; an accelerator if there is one.
        encoder: a small encoder that is there already (studies share one).
        report: is given each line of the log, and the small encoder's progress.
        write: False leaves the disk alone: no folder, log, pictures or checkpoints.

    Raises:
        ConfigError, MissingWeightsError, CheckpointError: see :func:`gear_engine.training.state.build_state`.
        ResumeMismatchError: the folder holds a run with other settings, or a run and ``resume`` is False.
    """

    def __init__(
        self,
        config: TrainConfig,
        source: ImageSource | None = None,
        *,
        resume: bool = False,
        world: World = ONE_PROCESS,
        device: torch.device | str | None = None,
        encoder: SmallEncoder | None = None,
        report: Callable[[dict[str, Any]], None] = _QUIET,
        write: bool = True,
    ) -> None:
        self.config, self.world, self._report = config, world, report
        self._writes = write and world.is_main
        self.source = source if source is not None else open_source(config.data)
        self._fingerprint = self.source.fingerprint()
        found = checkpoints.latest_checkpoint(config) if write else None
        if found is not None and not resume:
            raise ResumeMismatchError(f"{config.folder} holds a run: resume it, or choose another output.folder")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.state = build_state(config, self.source, world, torch.device(device), report if write else _QUIET, encoder)
        if found is not None:
            checkpoints.restore(self.state, found, self._fingerprint)
        self._log = Log(config.folder / "log.jsonl", self.state.step) if self._writes else None
        if self._writes:
            record = json.dumps(config.to_dict(), indent=2) + "\n"
            write_atomic(config.folder / "config.json", record.encode())

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state.step

    def run(self, until: int | None = None) -> Iterator[dict[str, Any] | None]:
        """Trains up to step ``until`` (default: ``config.steps``), one step per item.

        Yields:
            At logged steps the record: losses (means over the processes), codebook usage of the step's images, gradient
            norms, learning rates, images per second. Else None.

        Raises:
            NumericalError: a loss is not finite; nothing was saved since the last sound checkpoint.
        """
        config = self.config
        last = config.steps if until is None else min(until, config.steps)
        started, counted = time.monotonic(), self.step
        for batch in batches(self.source, config, self.world, self.step, last):
            scalars = self._one_step(batch)
            saves = self._due(config.output.checkpoint_every) or self.step == config.steps
            record = None
            if saves or self._due(config.output.log_every):
                record = self._record(scalars, time.monotonic() - started, self.step - counted)
                started, counted = time.monotonic(), self.step
            if saves:
                self.save()
            if self._writes and self._due(config.output.sample_every):
                write_samples(self.state, batch.images, config.folder / "samples")
            yield record

    def save(self) -> Path | None:
        """Writes a checkpoint now; its path, or None where this process writes nothing."""
        return checkpoints.save(self.state, self._fingerprint) if self._writes else None

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _one_step(self, batch: Batch) -> Scalars:
        """One step whose random numbers follow from (seed, step, rank), whatever happened before."""
        device = self.state.device
        words = np.random.SeedSequence([self.config.seed, _NOISE, self.step, self.world.rank]).generate_state(2)
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            torch.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
            return run_step(self.state, batch)

    def _record(self, scalars: Scalars, seconds: float, steps: int) -> dict[str, Any]:
        indices = self._gathered(scalars.pop("indices"))
        names = list(scalars)
        values = torch.stack([scalars[name].double() for name in names])
        if self.world.size > 1:
            torch.distributed.all_reduce(values)
            values /= self.world.size
        record: dict[str, Any] = {"step": self.step, **dict(zip(names, values.tolist(), strict=True))}
        wrong = [name for name, value in record.items() if value != value or abs(value) == float("inf")]
        if wrong:
            raise NumericalError(
                f"{wrong[0]} is {record[wrong[0]]} at step {self.step}. Lower the learning rate, raise warmup_steps, "
                "or train in fp32; the last checkpoint is sound"
            )
        record["codebook_usage"] = torch.unique(indices).numel() / self.state.tokenizer.quantize.num_codes
        record |= {f"lr_{name}": optimizer.rate for name, optimizer in self.state.optimizers.items()}
        record["images_per_second"] = self.config.batch_size * steps / max(seconds, 1e-9)
        if self._log is not None:
            self._log.write(record)
            self._report(record)
        return record

    def _gathered(self, indices: torch.Tensor) -> torch.Tensor:
        """The indices of all processes."""
        if self.world.size == 1:
            return indices
        parts = [torch.empty_like(indices) for _ in range(self.world.size)]
        torch.distributed.all_gather(parts, indices.contiguous())
        return torch.cat(parts)
