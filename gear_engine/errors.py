"""The exceptions that a user of gear_engine can catch.

Every error that gear_engine raises on purpose derives from :class:`GearError`; each also derives from
the builtin exception that a caller would expect, so that ``except ValueError`` keeps working.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailableError",
    "CheckpointError",
    "ConfigError",
    "GearError",
    "InvalidRequestError",
    "MissingWeightsError",
    "NumericalError",
    "OutOfMemoryError",
    "ReportError",
    "ResumeMismatchError",
    "UnsafeCheckpointError",
    "WorkerLostError",
]


class GearError(Exception):
    """Base class of every error that gear_engine raises on purpose."""


class ConfigError(GearError, ValueError):
    """A model, tokenizer or engine configuration is impossible or contradicts itself."""


class InvalidRequestError(GearError, ValueError):
    """A label, caption, seed or sampling setting is out of its range."""


class CheckpointError(GearError, ValueError):
    """A checkpoint is unreadable, incomplete, of another architecture, or holds non-finite numbers."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint asks for code to be run, or for memory that its size cannot justify."""


class MissingWeightsError(GearError, FileNotFoundError):
    """Weights of another project that a setting asks for are not there; the message says which and what to do."""


class BackendUnavailableError(GearError, RuntimeError):
    """The backend that was asked for cannot run here; the message says why."""


class NumericalError(GearError, ArithmeticError):
    """The model returned numbers that are not finite; the message says what to try."""


class OutOfMemoryError(GearError, MemoryError):
    """A plan does not fit in memory: the message holds the arithmetic, and nothing was allocated. Or the device ran out
    while it worked: what was in flight is not done, and the engine works on."""


class ReportError(GearError, ValueError):
    """A benchmark report is unreadable, of another schema version, or cannot be compared with another."""


class ResumeMismatchError(GearError, RuntimeError):
    """An output folder holds a run with other settings; the message names the first difference."""


class WorkerLostError(GearError, RuntimeError):
    """Another process of a distributed run ended before its share was done."""
