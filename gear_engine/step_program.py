"""Decoding by programs: one step per bucket of rows, prepared once and replayed for whole rollouts.

A :class:`StepProgram` reads everything that changes from buffers that stay where they are: the row table
(:mod:`gear_engine.row_table`), a step counter that the step itself increments, the token table that it reads the last
tokens from and writes the drawn ones to, and under ``rng="torch"`` the noise. The host plans segments
(:mod:`gear_engine.segments`), sends a row table where one begins, and launches; it reads no token. Images of classes
start by programs too (:class:`StartProgram`): their labels are in the row table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch

from gear_engine.config import GeneratorConfig
from gear_engine.cuda_graph import CaptureCost, EagerLauncher, Executor, GraphLauncher, Launcher, StagingRing
from gear_engine.errors import BackendUnavailableError, ConfigError
from gear_engine.kv_cache import StaticKVCache
from gear_engine.models.condition import class_rows
from gear_engine.models.weights import GeneratorWeights
from gear_engine.ops import GeneratorOps
from gear_engine.ops.sample_tokens import TokenSink
from gear_engine.prefixes import prefix_labels
from gear_engine.row_table import RowTable
from gear_engine.runner import decode_step, prefill
from gear_engine.sampler import FiniteWatch, Noise, TorchNoise
from gear_engine.scheduler import ScheduledBatch
from gear_engine.segments import Segment, TableRow, buckets, plan_segment
from gear_engine.steps import Steps

__all__ = ["Execution", "ProgramSteps", "StartProgram", "StepBuffers", "StepProgram", "make_steps", "resolve_execution"]

#: How decode steps run. ``"direct"``: op by op, on exactly the rows there are. ``"eager"``: the programs of this
#: module, called. ``"graph"``: the same programs, captured. ``"auto"``: graphs where they can be captured, else direct.
Execution = Literal["auto", "direct", "eager", "graph"]

#: Backends whose ops launch kernels and read nothing on the host.
_CAPTURABLE: Final = ("cuda", "triton")


@dataclass
class StepBuffers:
    """What the programs of one engine share.

    Attributes:
        table: the rows, up to two per image.
        counter: int64 (): steps run so far.
        tokens: int64 (num_slots + 1, max_tokens), see :class:`~gear_engine.steps.Steps`.
        watch: sees the logits of live rows.
        noise: fp32 (rows, V) under ``rng="torch"``: row r's exponential noise; None before it is first asked for.
    """

    table: RowTable
    counter: torch.Tensor
    tokens: torch.Tensor
    watch: FiniteWatch
    noise: torch.Tensor | None = None


class StepProgram:
    """One decode step of the first ``rows`` rows of the table; a function of no arguments.

    Inert rows cost their share of the products and change nothing.
    """

    def __init__(
        self,
        rows: int,
        weights: GeneratorWeights,
        ops: GeneratorOps,
        cache: StaticKVCache,
        buffers: StepBuffers,
        *,
        with_noise: bool,
    ) -> None:
        self.rows = rows
        self._weights, self._ops, self._cache, self._buffers = weights, ops, cache, buffers
        self._sampling = buffers.table.sampling(rows)
        self._sink = TokenSink(buffers.tokens, buffers.table.draw_slots[:rows])
        self._noise = buffers.noise[:rows] if with_noise and buffers.noise is not None else None

    def __call__(self) -> None:
        buffers, table, rows = self._buffers, self._buffers.table, self.rows
        slots = table.slots[:rows]
        live = slots >= 0  # [R]
        # No operand is a number of the host's that would have to be copied: a capture refuses that.
        fed = (table.bases[:rows] + buffers.counter) * live  # [R], image-token index
        logits = self._logits(slots, live, fed)  # [R, V]
        drawn = fed + 1
        self._ops.sample_tokens(
            logits, self._sampling, noise=self._noise, seeds=table.seeds[:rows], positions=drawn, sink=self._sink
        )
        buffers.watch.see(logits, live)
        buffers.counter.add_(1)

    def _logits(self, slots: torch.Tensor, live: torch.Tensor, fed: torch.Tensor) -> torch.Tensor:
        """Of the tokens after those at ``fed``."""
        tokens = self._buffers.tokens[self._buffers.table.image_slots[: self.rows], fed]
        return decode_step(self._weights, self._ops, self._cache, slots, fed, tokens)


class StartProgram(StepProgram):
    """Starts the images of the table, whose rows stand before token 0: class prefixes into the cache, and token 0.

    The ops of :class:`Steps` on the rows of a bucket, so the bits are the same. It is not the step of position 0: that
    would read the labels' rows from a copy of both embedding tables, where weights are read in place, and round a
    prefix for an fp8 cache before it is attended to.
    """

    def _logits(self, slots: torch.Tensor, live: torch.Tensor, fed: torch.Tensor) -> torch.Tensor:
        rows = class_rows(self._buffers.table.labels[: self.rows])
        return prefill(self._weights, self._ops, self._cache, slots, rows, live)


class ProgramSteps(Steps):
    """Decoding by programs, and starts from labels; captions' prefixes as in :class:`Steps`.

    Args:
        launcher: how programs are prepared: called, or captured.
    """

    def __init__(self, config: GeneratorConfig, ops: GeneratorOps, cache: StaticKVCache, launcher: Launcher) -> None:
        super().__init__(config, ops, cache)
        self.max_rows = cache.num_slots
        self._launcher = launcher
        self._staging = StagingRing(RowTable.nbytes(self.max_rows), self.device)
        self._staged = [RowTable(self.max_rows, torch.device("cpu"), buffer) for buffer in self._staging.buffers]
        self._buffers = StepBuffers(
            RowTable(self.max_rows, self.device),
            torch.zeros((), dtype=torch.int64, device=self.device),
            self.tokens,
            self.watch,
        )
        self._launched = 0
        self._programs: dict[tuple[type[StepProgram], int, bool], Executor] = {}
        self._weights: GeneratorWeights | None = None
        self._addresses: list[int] = []
        self._sent: tuple[int, int] | None = None

    @property
    def cost(self) -> CaptureCost:
        """Seconds and memory of all programs there are."""
        return sum((program.cost for program in self._programs.values()), CaptureCost())

    @property
    def num_programs(self) -> int:
        return len(self._programs)

    def reset(self) -> None:
        super().reset()
        self._sent = None

    def unbind(self) -> None:
        self._weights = None
        if self._launcher.warmups == 0:
            # A program that is called refers to the weights; a captured one only to their addresses.
            self._programs.clear()

    def prepare(self, weights: GeneratorWeights, *, with_noise: bool) -> None:
        """Prepares the programs of all buckets."""
        with self._counted():
            for bucket in buckets(self.max_rows):
                self._program(weights, StepProgram, bucket, with_noise)
                if self.config.conditioning == "class":
                    self._program(weights, StartProgram, bucket, with_noise)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Around launches: after an exception it is unknown whether the last one counts, and the device knows."""
        try:
            yield
        except BaseException:
            self._sent = None
            self._launched = int(self._buffers.counter)
            raise

    def prefill(self, weights: GeneratorWeights, batch: ScheduledBatch, noise: Noise | None) -> None:
        if self.config.conditioning != "class":
            super().prefill(weights, batch, noise)
        else:
            labels = prefix_labels(batch, self.config.num_classes)
            self._run(weights, StartProgram, batch, plan_segment(batch, self.max_rows, 1), noise, labels)

    def decode(self, weights: GeneratorWeights, batch: ScheduledBatch, noise: Noise | None, limit: int) -> int:
        """Up to ``limit`` tokens of every image, as long as the rows stay the same."""
        segment = plan_segment(batch, self.max_rows, limit)
        self._run(weights, StepProgram, batch, segment, noise)
        return segment.steps

    def _run(
        self,
        weights: GeneratorWeights,
        kind: type[StepProgram],
        batch: ScheduledBatch,
        segment: Segment,
        noise: Noise | None,
        labels: Sequence[int] = (),
    ) -> None:
        torch_noise = noise if isinstance(noise, TorchNoise) else None
        with self._counted():
            program = self._program(weights, kind, segment.bucket, torch_noise is not None)
            self._send(batch.version, segment, labels)
            for _ in range(segment.steps):
                if torch_noise is not None and self._buffers.noise is not None:
                    torch_noise.fill(
                        self.ops, self._buffers.noise[: segment.images], [row.params for row in segment.rows]
                    )
                program.run()
                self._launched += 1

    def _send(self, version: int, segment: Segment, labels: Sequence[int]) -> None:
        """Sends the rows' table, unless the device has it: the same rows, as far on as the counter is."""
        sent = (version, segment.rows[0].position - self._launched)
        if self._sent != sent:
            self._send_rows(segment.rows, labels)
            self._sent = sent

    def _send_rows(self, rows: Sequence[TableRow], labels: Sequence[int] = ()) -> None:
        self._staged[self._staging.acquire()].fill(rows, self._launched, self.config.vocab_size, labels)
        self._staging.send(self._buffers.table.buffer)

    def _program(self, weights: GeneratorWeights, kind: type[StepProgram], bucket: int, with_noise: bool) -> Executor:
        if weights is not self._weights:
            addresses = weights.addresses()
            if addresses != self._addresses:
                self._programs.clear()
            self._weights, self._addresses = weights, addresses
        key = (kind, bucket, with_noise)
        if key not in self._programs:
            if with_noise and self._buffers.noise is None:
                self._buffers.noise = torch.ones(
                    self.max_rows, self.config.vocab_size, dtype=torch.float32, device=self.device
                )
            program = kind(bucket, weights, self.ops, self.cache, self._buffers, with_noise=with_noise)
            self._sent = None
            if self._launcher.warmups:
                # The step runs for real before it is captured: on inert rows that changes only the counter.
                self._send_rows(())
            self._programs[key] = self._launcher.prepare(program)
            self._launched += self._launcher.warmups
        return self._programs[key]


def resolve_execution(execution: Execution, ops: GeneratorOps, device: torch.device) -> Execution:
    """What ``"auto"`` means, and whether the others can be had.

    Raises:
        ConfigError: there is no such execution.
        BackendUnavailableError: ``"graph"`` without a CUDA device, or with ops that read device numbers on the host.
    """
    if execution not in get_args(Execution):
        raise ConfigError(f"execution must be one of {', '.join(get_args(Execution))}, not {execution!r}")
    reason = _why_not_captured(ops, device)
    if execution == "auto":
        execution = "direct" if reason is not None else "graph"
    if execution == "graph" and reason is not None:
        raise BackendUnavailableError(f"execution='graph' cannot be used: {reason}")
    return execution


def make_steps(execution: Execution, config: GeneratorConfig, ops: GeneratorOps, cache: StaticKVCache) -> Steps:
    """What an engine decodes with; ``execution`` as :func:`resolve_execution` returned it."""
    if execution == "direct" or cache.max_tokens == 1:
        return Steps(config, ops, cache)
    return ProgramSteps(config, ops, cache, EagerLauncher() if execution == "eager" else GraphLauncher(cache.device))


def _why_not_captured(ops: GeneratorOps, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"graphs are captured on CUDA devices, not on {device}"
    others = [f"{op} by {name!r}" for op, name in ops.backends.items() if name not in _CAPTURABLE]
    return f"graphs hold ops of the backends {', '.join(_CAPTURABLE)}, not {', '.join(others)}" if others else None
