"""Generator states between batches, so that a sequential run resumes in the middle."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from gear_engine.files import remove_temporaries, write_atomic

if TYPE_CHECKING:
    import torch

__all__ = ["GeneratorStates"]


class GeneratorStates:
    """The state of one process's generator after each batch, one small checksummed file per batch.

    Args:
        folder: holds the files of all ranks.
        rank: this process.
        generator: a ``torch.Generator`` as it is before batch 0.
    """

    def __init__(self, folder: Path, rank: int, generator: torch.Generator) -> None:
        self._folder = folder
        self._rank = rank
        self._generator = generator
        self._first = _to_bytes(generator)
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, batch: int) -> Path:
        return self._folder / f"rank{self._rank:04d}-batch{batch:06d}.state"

    def known(self, batch: int) -> bool:
        """Whether the state after ``batch`` is on the disk, undamaged."""
        return self._read(batch) is not None

    def rewind(self, batch: int) -> None:
        """Puts the generator where it stands before ``batch``; the batch before it must be known."""
        state = self._first if batch == 0 else self._read(batch - 1)
        if state is None:
            raise ValueError(f"the generator state after batch {batch - 1} is not known")
        _from_bytes(self._generator, state)

    def keep(self, batch: int) -> None:
        """Records the generator's present state as the one after ``batch``."""
        state = _to_bytes(self._generator)
        write_atomic(self.path(batch), zlib.crc32(state).to_bytes(4, "little") + state, sync=False)

    def _read(self, batch: int) -> bytes | None:
        try:
            data = self.path(batch).read_bytes()
        except OSError:
            return None
        state = data[4:]
        # A state of another length belongs to another kind of generator.
        whole = len(state) == len(self._first) and zlib.crc32(state).to_bytes(4, "little") == data[:4]
        return state if whole else None

    @staticmethod
    def discard(folder: Path) -> None:
        """Removes the folder of states of a run that has ended."""
        if folder.is_dir():
            remove_temporaries(folder)
            for path in folder.glob("rank*.state"):
                path.unlink(missing_ok=True)
            folder.rmdir()


def _to_bytes(generator: torch.Generator) -> bytes:
    state: bytes = generator.get_state().numpy().tobytes()
    return state


def _from_bytes(generator: torch.Generator, state: bytes) -> None:
    import torch

    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
