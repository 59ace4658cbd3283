"""Files that are to be refused, and how."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gear_engine.checkpoint import read_generator
from gear_engine.errors import CheckpointError, GearError
from tests.checkpoint import files
from tests.checkpoint.files import HEADS

STATE = files.generator_state()


class Payload:
    """Runs a command when unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


def refused(path: Path, match: str, error: type[GearError] = CheckpointError, **given: Any) -> None:
    with pytest.raises(error, match=match) as caught:
        read_generator(path, **HEADS, **given)
    assert str(path) in str(caught.value)
    assert type(caught.value) is error


def save(tmp_path: Path, state: dict[str, Any], **args: Any) -> Path:
    return files.save(tmp_path / "checkpoint.pt", files.stage2(ema=state, args={**files.ARGS, **args}))
