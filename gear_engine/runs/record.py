"""``run.json``: what a folder of samples was made with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gear_engine.errors import ResumeMismatchError
from gear_engine.files import write_atomic

__all__ = ["Settings", "add_measured", "check_or_write", "first_difference", "read_record"]

#: Everything that decides a run's images, by name; JSON values.
Settings = dict[str, Any]

#: Settings that do not decide an image that has a random stream of its own.
_FREE_UNDER_PHILOX = frozenset({"world_size", "per_proc_batch_size"})
_ABSENT = "nothing"


def first_difference(recorded: Settings, asked: Settings) -> tuple[str, Any, Any] | None:
    """(name, recorded value, asked value) of the first setting that differs, or None.

    Names of nested settings are joined by dots. Under ``rng = "philox"`` an image depends on neither batch nor number
    of processes, so those may differ.
    """
    independent = recorded.get("rng") == asked.get("rng") == "philox"
    recorded, asked = dict(_flat(recorded)), dict(_flat(asked))
    for name in [*asked, *(n for n in recorded if n not in asked)]:
        if independent and name in _FREE_UNDER_PHILOX:
            continue
        old, new = recorded.get(name, _ABSENT), asked.get(name, _ABSENT)
        if old != new:
            return name, old, new
    return None


def _flat(settings: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def read_record(path: Path) -> tuple[Settings, dict[str, Any]] | None:
    """(settings, environment) recorded at ``path``, or None if there is no file.

    Raises:
        ResumeMismatchError: the file is not a record of a run.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return dict(record["settings"]), dict(record.get("environment", {}))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeMismatchError(
            f"{path} cannot be read as the record of a run ({error}); choose another --tag or remove the folder"
        ) from error


def check_or_write(path: Path, settings: Settings, environment: dict[str, Any], *, write: bool = True) -> list[str]:
    """Compares ``settings`` with the record at ``path``, or writes the record if there is none.

    Args:
        environment: versions and the like: recorded, and reported when they differ, but no reason to refuse.
        write: False only compares.

    Returns:
        One line for each difference of the environment.

    Raises:
        ResumeMismatchError: the folder was made with other settings; the message names the first one.
    """
    settings = json.loads(json.dumps(settings))
    found = read_record(path)
    if found is None:
        if write:
            record = {"settings": settings, "environment": environment}
            write_atomic(path, (json.dumps(record, indent=2) + "\n").encode())
        return []
    recorded, made_with = found
    difference = first_difference(recorded, settings)
    if difference is not None:
        name, old, new = difference
        raise ResumeMismatchError(
            f"{path.parent} was made with {name} = {json.dumps(old)}, this run asks for {json.dumps(new)}. "
            "Choose another --tag or --output-dir, or remove that folder"
        )
    asked = json.loads(json.dumps(environment))
    return [
        f"{name}: {json.dumps(made_with.get(name))} then, {json.dumps(value)} now"
        for name, value in asked.items()
        if made_with.get(name) != value
    ]


def add_measured(path: Path, name: str, value: Any) -> None:
    """Adds what a run has measured to its record: it decides no image, and nothing is compared with it."""
    record = json.loads(path.read_text(encoding="utf-8"))
    record.setdefault("measured", {})[name] = value
    write_atomic(path, (json.dumps(record, indent=2) + "\n").encode())
