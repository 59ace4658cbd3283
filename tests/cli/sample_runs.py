"""Runs of gear-engine sample and what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gear_engine.cli.main import main
from tests.cli import tiny

FAST = ["--per-proc-batch-size", "2", "--image-size-eval", str(tiny.IMAGE_SIZE), "--device", "cpu"]


def sample(checkpoint: Path, output: Path, *flags: str, count: int = 5) -> int:
    paths = ["--ckpt-path", str(checkpoint), "--output-dir", str(output)]
    return main(["sample", *paths, "--fid-num", str(count), *FAST, *flags])


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def pixels(run: Path) -> np.ndarray:
    with np.load(run / "samples.npz") as archive:
        return np.asarray(archive["arr_0"])


class Interrupt:
    """Raises KeyboardInterrupt in the given call of a run's drawing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
        from gear_engine.cli import sampling

        self.drawn: list[int] = []
        draw = sampling._Draw.__call__

        def counted(this: Any, indices: list[int]) -> np.ndarray:
            if self.calls == call:
                raise KeyboardInterrupt
            self.calls += 1
            self.drawn += indices
            return draw(this, indices)

        self.calls = 0
        monkeypatch.setattr(sampling._Draw, "__call__", counted)
