"""The two ways through a run: images with streams of their own, or batches in one process's fixed order."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gear_engine.runs.batches import chunks
from gear_engine.runs.folder import RunFolder
from gear_engine.runs.states import GeneratorStates

__all__ = ["DrawImages", "Drawn", "ImageWriter", "sample_in_order", "sample_independent"]

Images = NDArray[np.uint8]
#: Images [B, H, W, 3]; or, where a device is still decoding them, what waits for them.
Drawn = Images | Callable[[], Images]


class DrawImages(Protocol):
    """Draws the images of the given numbers."""

    def __call__(self, indices: Sequence[int]) -> Drawn: ...


class ImageWriter:
    """Encodes and writes images beside the drawing of the next batch.

    At most one batch waits in memory for its files. One that is still being decoded is asked for when the next has been
    drawn: a device then decodes batch n while it draws batch n + 1. An error of a worker thread surfaces at a later
    :meth:`submit` or at the end. Leaving the block, by an error or a signal too, lets the images that were drawn reach
    the folder; what cannot reach it then is missing there, and a resumed run draws it again.

    Args:
        progress: called in the caller's thread with the number of images that have been written since.
    """

    def __init__(self, folder: RunFolder, progress: Callable[[int], None]) -> None:
        self._folder = folder
        self._progress = progress
        self._pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1), thread_name_prefix="png")
        self._drawn: deque[tuple[Sequence[int], Drawn, Collection[int]]] = deque()
        self._pending: list[Future[None]] = []

    def submit(self, indices: Sequence[int], images: Drawn, wanted: Collection[int]) -> None:
        """Takes the images of the numbers ``indices``, of which those that are ``wanted`` are written."""
        self._drawn.append((indices, images, wanted))
        self._write_drawn(decoding=1 if callable(images) else 0)

    def _write_drawn(self, decoding: int) -> None:
        """Hands batches to the threads, in order, until ``decoding`` of them are left."""
        while len(self._drawn) > decoding:
            indices, drawn, wanted = self._drawn[0]
            images = drawn() if callable(drawn) else drawn
            self.wait()
            kept = [(i, image) for i, image in zip(indices, images, strict=True) if i in wanted]
            self._pending = [self._pool.submit(self._folder.save, i, image) for i, image in kept]
            self._drawn.popleft()

    def wait(self) -> None:
        """Returns when everything that the threads have got is written."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()
        if pending:
            self._progress(len(pending))

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # Beside an error, what this may raise follows from it or says less.
            with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
                self._write_drawn(decoding=0)
        finally:
            self._pool.shutdown(wait=True)
        if kind is None:
            self.wait()


def sample_independent(
    folder: RunFolder, indices: Sequence[int], batch: int, draw: DrawImages, progress: Callable[[int], None]
) -> None:
    """Draws those of ``indices`` that are not finished, ``batch`` at a time.

    For images that depend on their number alone: how they are batched does not matter.
    """
    finished = folder.finished(indices)
    progress(len(finished))
    with ImageWriter(folder, progress) as writer:
        for chunk in chunks((index for index in indices if index not in finished), batch):
            writer.submit(chunk, draw(chunk), chunk)


def sample_in_order(
    folder: RunFolder,
    batches: Sequence[Sequence[int]],
    draw: DrawImages,
    states: GeneratorStates,
    progress: Callable[[int], None],
) -> None:
    """Draws ``batches`` from one generator in their order, whole batches only.

    A batch with an unfinished image is drawn again from the generator's state before it, so an interrupted run
    continues with the numbers of an unbroken one; where that state is not known, the batch before is drawn again too.
    Numbers from ``folder.count`` on are drawn and dropped.
    """
    kept = [[index for index in indices if index < folder.count] for indices in batches]
    finished = folder.finished(index for indices in kept for index in indices)
    progress(len(finished))
    missing_images = [set(indices) - finished for indices in kept]
    with ImageWriter(folder, progress) as writer:
        for number in _batches_to_draw(missing_images, states):
            states.rewind(number)
            images = draw(batches[number])
            states.keep(number)
            writer.submit(batches[number], images, missing_images[number])


def _batches_to_draw(missing_images: Sequence[set[int]], states: GeneratorStates) -> list[int]:
    """Numbers of the batches with missing images, and of those that lead up to them from a known state."""
    needed: list[int] = []
    for number in reversed(range(len(missing_images))):
        leads_to_next = bool(needed) and needed[-1] == number + 1 and not states.known(number)
        if missing_images[number] or leads_to_next:
            needed.append(number)
    return needed[::-1]
