"""The canonical record: JSON under a versioned schema, validated whenever it is read.

The schema is ``schema.json`` beside this file; ``docs/benchmarking.md`` explains it. A record holds raw samples and
counted bytes and operations; every median, floor and percentage is derived from them by :class:`Row`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from gear_engine.errors import ReportError
from gear_engine.files import write_atomic
from gear_engine.report.privacy import check_private, leaves
from gear_engine.report.statistics import Summary, summarize

__all__ = [
    "SCHEMA_NAME",
    "SCHEMA_VERSION",
    "UNITS",
    "Report",
    "Row",
    "read_report",
    "row_id",
    "validate",
    "write_report",
]

SCHEMA_NAME = "gear-engine-report"
SCHEMA_VERSION = 1
UNITS = {"time": "s", "memory": "B", "bandwidth": "B/s", "rate": "op/s"}


def row_id(benchmark: str, params: dict[str, Any], implementation: str | None = None) -> str:
    """``decode_step[model=LlamaGen-B, images=1] cpu``: the name of a row, equal in every report of the same work."""
    inner = ", ".join(f"{name}={value}" for name, value in params.items())
    name = f"{benchmark}[{inner}]" if inner else benchmark
    return name if implementation is None else f"{name} {implementation}"


@dataclass(frozen=True)
class Row:
    """One implementation of one piece of work, measured. ``data`` is the row as the schema has it."""

    data: dict[str, Any]
    ceilings: dict[str, Any]

    @property
    def benchmark(self) -> str:
        return str(self.data["benchmark"])

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.data["params"])

    @property
    def implementation(self) -> str:
        return str(self.data["implementation"])

    @property
    def role(self) -> str:
        return str(self.data["role"])

    @property
    def work(self) -> str:
        """The row's name without its implementation."""
        return row_id(self.benchmark, self.params)

    @property
    def id(self) -> str:
        return row_id(self.benchmark, self.params, self.implementation)

    @property
    def samples(self) -> list[float]:
        """Seconds per call: between device events where there are any, else of the wall clock."""
        return list(self.data.get("device_samples") or self.data["samples"])

    @functools.cached_property
    def summary(self) -> Summary:
        return summarize(self.samples)

    @property
    def wall_median(self) -> float:
        """Seconds per call by the wall clock: beside device events, what the host adds."""
        return summarize(self.data["samples"]).median

    @property
    def throughput(self) -> float:
        """Items per second."""
        return float(self.data["items"]) / self.summary.median

    @property
    def floor(self) -> tuple[float, str] | None:
        """Seconds below which this device cannot go, and what binds: ``"memory"`` or ``"compute"``.

        max(bytes / measured bandwidth, operations / measured rate). None without counts or without the ceiling.
        """
        bounds = []
        if self.data["bytes"] and self.ceilings["bandwidth"]:
            bounds.append((self.data["bytes"] / self.ceilings["bandwidth"], "memory"))
        rate = self.ceilings["rates"].get(self.data["rate_dtype"])
        if self.data["ops"] and rate:
            bounds.append((self.data["ops"] / rate, "compute"))
        return max(bounds) if bounds else None

    @property
    def reached(self) -> float | None:
        """Floor over median: 1 is the floor itself."""
        return None if self.floor is None else self.floor[0] / self.summary.median


@dataclass(frozen=True)
class Report:
    """A validated record and the name of the file that it came from."""

    data: dict[str, Any]
    source: str = "report"

    @functools.cached_property
    def rows(self) -> tuple[Row, ...]:
        return tuple(Row(row, self.data["ceilings"]) for row in self.data["rows"])

    @property
    def device(self) -> dict[str, Any]:
        return dict(self.data["device"])

    @property
    def commit(self) -> str:
        """Short commit hash, with ``+`` if the source tree was dirty; ``unknown`` outside a checkout."""
        commit = self.data["commit"]
        return "unknown" if commit is None else commit["hash"][:10] + ("+" if commit["dirty"] else "")

    def by_benchmark(self) -> dict[str, list[Row]]:
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.benchmark, []).append(row)
        return groups


@functools.cache
def schema() -> dict[str, Any]:
    text = resources.files("gear_engine.report").joinpath("schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def _check_identity(record: Any, source: str) -> None:
    """The errors that deserve a better message than a schema's."""
    if not isinstance(record, dict) or record.get("schema") != SCHEMA_NAME:
        raise ReportError(f'{source} is no gear-engine report (its "schema" is not {SCHEMA_NAME!r})')
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ReportError(
            f"{source} has schema version {version!r}, this gear-engine reads version {SCHEMA_VERSION}; "
            "use the gear-engine that wrote it, or measure again"
        )
    units = record.get("units")
    if isinstance(units, dict):
        for quantity, unit in UNITS.items():
            if quantity in units and units[quantity] != unit:
                raise ReportError(
                    f"{source} gives {quantity} in {units[quantity]!r}, reports hold {unit!r}: units may not be mixed"
                )


def validate(record: Any, source: str = "report") -> None:
    """Raises :class:`~gear_engine.errors.ReportError` with the first field that breaks the schema."""
    _check_identity(record, source)
    try:
        import jsonschema
    except ImportError as error:
        raise ReportError("reading reports needs the report extra: pip install 'gear-engine[report]'") from error
    validator = jsonschema.Draft202012Validator(schema())
    problem = jsonschema.exceptions.best_match(validator.iter_errors(record))
    if problem is not None:
        where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in problem.absolute_path)
        raise ReportError(f"{source}: report{where}: {problem.message}")
    _check_leaves(record, source)
    seen: set[str] = set()
    for name in _row_ids(record):
        if name in seen:
            raise ReportError(f"{source} holds the row {name} twice")
        seen.add(name)


def _check_leaves(record: dict[str, Any], source: str) -> None:
    """What a schema cannot say: numbers are finite (JSON may hold 1e999), text is text (no escapes for terminals)."""
    for where, value in leaves(record):
        if isinstance(value, float) and not math.isfinite(value):
            raise ReportError(f"{source}: {where}: {value} is not finite")
        if isinstance(value, str) and not value.isprintable():
            raise ReportError(f"{source}: the text at {where!r} holds characters that cannot be printed")


def _row_ids(record: dict[str, Any]) -> Iterator[str]:
    for row in record["rows"]:
        yield row_id(row["benchmark"], row["params"], row["implementation"])


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def read_report(path: Path) -> Report:
    """Reads and validates.

    Raises:
        ReportError: missing, truncated, no report, of another schema version, with other units or unknown fields.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise ReportError(f"there is no {path}; `gear-engine bench --out {path}` writes one") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise ReportError(f"{path} is not complete JSON ({error}); was it truncated?") from error
    except RecursionError as error:
        raise ReportError(f"{path} is no gear-engine report: its JSON is nested too deeply") from error
    validate(record, path.name)
    return Report(record, path.name)


def write_report(record: dict[str, Any], path: Path) -> None:
    """Writes a record whole or not at all, after a look for names and paths.

    Raises:
        ReportError: the record holds a path, a host name or a user name.
    """
    check_private(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
