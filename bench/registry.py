"""Every benchmark by name: its fields, its presets, and what prepares a case of it.

A benchmark module calls :func:`register` when it is imported; :mod:`gear_engine.bench.suite` imports them all. A
benchmark's grid is a cross product of values per field; a preset holds one grid or several.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gear_engine.bench.counts import Counts
from gear_engine.cuda_graph import CaptureCost
from gear_engine.errors import InvalidRequestError
from gear_engine.report.record import row_id

__all__ = [
    "PRESETS", "Benchmark", "Case", "Check", "Context", "Implementation", "Skip", "Value", "Work", "benchmarks",
    "register", "select",
]  # fmt: skip

PRESETS = ("quick", "standard", "full")
Value = str | int | float | bool
_LARGEST = 2**31 - 1
#: Whole numbers that count nothing, and so may be 0.
_FROM_ZERO = frozenset({"position", "top_k"})
#: Values per field; a case takes one of each.
Grid = Mapping[str, Sequence[Value]]


class Skip(Exception):
    """A case or an implementation cannot run here; the message says why. It is listed, never hidden."""


@dataclass(frozen=True)
class Context:
    """What all cases of a run share.

    Attributes:
        device: where the work runs.
        seed: of weights and inputs.
        backends: backends of gear_engine to measure; ``"auto"`` is the one that an engine would take.
        peers: which of ``compiled``, ``official``, ``faiss`` to measure beside them; ``reference`` (torch eager) too.
        official: checkout of the official code, for the peer ``official``.
        rotate_bytes: operands are copied until this much lies between two uses of the same copy.
    """

    device: torch.device
    seed: int = 0
    backends: tuple[str, ...] = ("auto",)
    peers: frozenset[str] = frozenset({"reference"})
    official: Path | None = None
    rotate_bytes: int = 0

    def copies(self, operand_bytes: int) -> int:
        """How many copies of ``operand_bytes`` to rotate: enough for :attr:`rotate_bytes`, between 1 and 64."""
        return max(1, min(64, -(-self.rotate_bytes // max(1, operand_bytes))))

    def generator(self, salt: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed * 1000 + salt)


@dataclass(frozen=True)
class Implementation:
    """A way to do the work: ``call(i)`` does it on copy i of the operands and returns the result."""

    name: str
    role: str
    call: Callable[[int], Any]


@dataclass(frozen=True)
class Check:
    """How an output is held against the reference's: ``error(output, reference)`` is at most ``bound``."""

    reference: Callable[[int], Any]
    error: Callable[[Any, Any], float]
    bound: float
    measure: str


@dataclass(frozen=True)
class Work:
    """A case made ready.

    Attributes:
        implementations: measured in alternation, in this order.
        counts: bytes and operations of one call, if they are counted.
        rate_dtype: which multiply rate bounds it: ``fp32``, ``bf16`` or ``int8``.
        items, item: how many of what one call makes.
        copies: how many copies of the operands the calls rotate through.
        check: comparison with the reference, or None where outputs cannot be compared.
        breakdown: implementation name -> function that runs one call and returns its parts, kernel by kernel, the last
            of them the gap between kernels.
        timeline: implementation name -> function that runs one call and returns its phases.
        capture: implementation name -> function that says what capturing graphs has taken by then.
        skipped: implementations that were asked for and cannot run: name -> reason.
    """

    implementations: Sequence[Implementation]
    counts: Counts | None
    rate_dtype: str | None
    items: float
    item: str
    copies: int = 1
    check: Check | None = None
    breakdown: Mapping[str, Callable[[], list[dict[str, Any]]]] = field(default_factory=dict)
    timeline: Mapping[str, Callable[[], list[dict[str, Any]]]] = field(default_factory=dict)
    capture: Mapping[str, Callable[[], CaptureCost]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)


Prepare = Callable[[dict[str, Any], Context], Work]


@dataclass(frozen=True)
class Benchmark:
    """A named benchmark.

    Attributes:
        name: what users select it by; an op's name for an op.
        summary: one line.
        prepare: makes a case's work ready; may raise :class:`Skip`.
        grids: preset -> grids; ``standard`` holds what ``quick`` lacks, not the other way round.
    """

    name: str
    summary: str
    prepare: Prepare
    grids: Mapping[str, Sequence[Grid]]

    @property
    def fields(self) -> dict[str, tuple[Value, ...]]:
        """Field -> the values that its presets use."""
        found: dict[str, dict[Value, None]] = {}
        for grid in itertools.chain.from_iterable(self.grids.values()):
            for name, values in grid.items():
                found.setdefault(name, {}).update(dict.fromkeys(values))
        return {name: tuple(values) for name, values in found.items()}

    def cases(self, preset: str, overrides: Grid) -> list[Case]:
        """The preset's cases, with the fields in ``overrides`` replaced; no case twice."""
        cases: dict[str, Case] = {}
        for grid in self.grids.get(preset, ()):
            values = {name: overrides.get(name, default) for name, default in grid.items()}
            for combination in itertools.product(*values.values()):
                case = Case(self, dict(zip(values, combination, strict=True)))
                cases[case.id] = case
        return list(cases.values())


@dataclass(frozen=True)
class Case:
    """A benchmark with a value for each field."""

    benchmark: Benchmark
    params: dict[str, Any]

    @property
    def id(self) -> str:
        return row_id(self.benchmark.name, self.params)


_REGISTRY: dict[str, Benchmark] = {}


def register(benchmark: Benchmark) -> None:
    """Adds a benchmark; a second one of the same name is a programming error."""
    if benchmark.name in _REGISTRY:
        raise ValueError(f"there are two benchmarks {benchmark.name!r}")
    names = [tuple(grid) for grids in benchmark.grids.values() for grid in grids]
    if len(set(names)) != 1 or not set(benchmark.grids) <= set(PRESETS):
        raise ValueError(f"the grids of {benchmark.name!r} need the same fields and known presets")
    _REGISTRY[benchmark.name] = benchmark


def benchmarks() -> dict[str, Benchmark]:
    """All benchmarks by name."""
    from gear_engine.bench import suite

    assert suite
    return dict(_REGISTRY)


def _unknown(kind: str, name: str, known: Iterable[str]) -> InvalidRequestError:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return InvalidRequestError(f"there is no {kind} {name!r}{hint} There are: {', '.join(known)}".replace("??", "?"))


def _convert(text: str, like: Value, benchmark: str, name: str) -> Value:
    """``text`` as the type that the field's values have."""
    where = f"{benchmark}, field {name}"
    if isinstance(like, bool):
        if text.lower() in ("true", "yes", "1", "false", "no", "0"):
            return text.lower() in ("true", "yes", "1")
        raise InvalidRequestError(f"{where}: {text!r} is not true or false")
    if isinstance(like, str):
        return text
    try:
        value = int(text) if isinstance(like, int) else float(text)
    except ValueError:
        raise InvalidRequestError(f"{where}: {text!r} is not a number") from None
    least = 0 if name in _FROM_ZERO or isinstance(like, float) else 1
    if not least <= value <= _LARGEST:
        raise InvalidRequestError(f"{where}: {text} must lie between {least} and {_LARGEST}")
    return value


def select(names: Sequence[str], preset: str, grid: Mapping[str, Sequence[str]], pattern: str | None) -> list[Case]:
    """The cases of a run.

    Args:
        names: benchmarks; none means all.
        preset: ``quick``, ``standard`` or ``full``.
        grid: field -> values as text; each replaces the preset's values where a benchmark has that field.
        pattern: keeps the cases whose name holds this text.

    Raises:
        InvalidRequestError: an unknown benchmark, preset or field, a value of the wrong type, or nothing left.
    """
    known = benchmarks()
    for name in names:
        if name not in known:
            raise _unknown("benchmark", name, known)
    if preset not in PRESETS:
        raise _unknown("preset", preset, PRESETS)
    chosen = [known[name] for name in dict.fromkeys(names)] or list(known.values())
    every = {name for benchmark in chosen for name in benchmark.fields}
    for name in grid:
        if name not in every:
            raise _unknown("field", name, every)
    cases = []
    for benchmark in chosen:
        fields = benchmark.fields
        overrides = {
            name: [_convert(text, fields[name][0], benchmark.name, name) for text in texts]
            for name, texts in grid.items()
            if name in fields
        }
        cases += benchmark.cases(preset, overrides)
    cases = [case for case in cases if pattern is None or pattern in case.id]
    if not cases:
        raise InvalidRequestError("no case is left: loosen --filter, or choose another --preset")
    return cases
