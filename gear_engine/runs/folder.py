"""A run's folder: ``samples/%06d.png``, ``samples.npz``, ``run.json``, as GEAR's sampling programs lay it out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gear_engine.errors import InvalidRequestError, ResumeMismatchError
from gear_engine.files import remove_temporaries
from gear_engine.request import SamplingParams
from gear_engine.runs import record
from gear_engine.runs.npz import write_npz
from gear_engine.runs.png import png_size, read_png, write_png
from gear_engine.runs.states import GeneratorStates

__all__ = ["RunFolder", "check_output", "experiment_name", "sampling_tag", "step_tag"]


def check_output(folder: Path) -> None:
    """Raises :class:`InvalidRequestError` unless ``folder`` can be made or written into; creates nothing."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InvalidRequestError(f"samples cannot be written below {folder}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InvalidRequestError(f"samples cannot be written below {folder}: no permission to write in {there}")


def experiment_name(checkpoint: Path) -> str:
    """The folder that holds ``checkpoints/``, or the checkpoint's own folder in another layout."""
    parent = checkpoint.absolute().parent
    return parent.parent.name if parent.name == "checkpoints" else parent.name


def step_tag(checkpoint: Path) -> str:
    """``0400000.pt`` -> ``step0400000``."""
    return f"step{checkpoint.stem}"


def sampling_tag(params: SamplingParams, tag: str = "") -> str:
    """A folder name for sampling settings, such as ``cfg1.5-temp1-topk100``; ``tag`` is appended.

    Raises:
        InvalidRequestError: ``tag`` would lead to another folder.
    """
    if Path(tag).name != tag:
        raise InvalidRequestError(f"--tag {tag!r} must be part of a folder's name, without slashes")
    parts = [f"cfg{params.cfg_scale:g}"]
    if params.cfg_interval >= 0:
        parts.append(f"cfgint{params.cfg_interval:g}")
    parts.append(f"temp{params.temperature:g}")
    if params.top_k > 0:
        parts.append(f"topk{params.top_k}")
    if params.top_p < 1.0:
        parts.append(f"topp{params.top_p:g}")
    return "-".join([*parts, tag] if tag else parts)


class RunFolder:
    """The images of one run, each either finished or not there.

    Args:
        path: ``<output-dir>/<experiment>/<step>/<sampling>``. Nothing is created before :meth:`open`.
        count: number of images.
        image_size: edge of the written images in pixels.
    """

    def __init__(self, path: Path, count: int, image_size: int) -> None:
        if count < 1:
            raise InvalidRequestError(f"the number of images must be at least 1, got {count}")
        if image_size < 1:
            raise InvalidRequestError(f"the written image size must be at least 1, got {image_size}")
        self.path = path
        self.count = count
        self.image_size = image_size
        self.samples = path / "samples"
        self.npz = path / "samples.npz"
        self.states = path / "generator-states"

    def check(self, settings: record.Settings, environment: dict[str, Any]) -> list[str]:
        """Compares the folder with ``settings`` and touches nothing; differences of the environment come back.

        Raises:
            ResumeMismatchError: the folder was made with other settings, or nobody knows with which.
        """
        if not (self.path / "run.json").exists() and (self.npz.exists() or any(self.samples.glob("*.png"))):
            raise ResumeMismatchError(
                f"{self.path} holds samples but no run.json, so their settings are not known; "
                "choose another --tag or --output-dir, or remove that folder"
            )
        return record.check_or_write(self.path / "run.json", settings, environment, write=False)

    def open(self, settings: record.Settings, environment: dict[str, Any]) -> None:
        """Creates the folder with its ``run.json``, or enters it after :meth:`check`."""
        self.check(settings, environment)
        self.samples.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.samples):
            remove_temporaries(folder)
        record.check_or_write(self.path / "run.json", settings, environment)

    def measured(self, name: str, value: Any) -> None:
        """Adds what the run has measured to ``run.json``."""
        record.add_measured(self.path / "run.json", name, value)

    def image_path(self, index: int) -> Path:
        return self.samples / f"{index:06d}.png"

    def finished(self, indices: Iterable[int]) -> set[int]:
        """Those of ``indices`` whose image is whole and of the run's size."""
        size = (self.image_size, self.image_size)
        return {index for index in indices if png_size(self.image_path(index)) == size}

    def save(self, index: int, image: NDArray[np.uint8]) -> None:
        """Writes one image, [image_size, image_size, 3] uint8."""
        if image.shape != (self.image_size, self.image_size, 3):
            raise ValueError(f"image {index} has shape {image.shape}, not {self.image_size} x {self.image_size} x 3")
        write_png(self.image_path(index), image)

    def pack(self) -> None:
        """Streams the finished images into ``samples.npz``."""
        write_npz(self.npz, self._images(), self.count)

    def tidy(self, *, keep_pngs: bool) -> None:
        """Removes what a complete run no longer needs: generator states and, on request, the PNG files."""
        GeneratorStates.discard(self.states)
        if not keep_pngs and self.npz.exists() and self.samples.is_dir():
            shutil.rmtree(self.samples)

    def _images(self) -> Iterator[NDArray[np.uint8]]:
        for index in range(self.count):
            path = self.image_path(index)
            if png_size(path) != (self.image_size, self.image_size):
                raise ResumeMismatchError(f"{path} is missing or damaged; run the same command again to redraw it")
            yield read_png(path)
