"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gear_engine.errors import CheckpointError

__all__ = ["atomic_file", "content_hash", "remove_temporaries", "write_atomic"]

_TEMPORARY = ".*.tmp"


@contextlib.contextmanager
def atomic_file(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """A binary file that appears at ``path`` when the block ends without an error, and never in part.

    It is written beside ``path`` under a hidden temporary name (readers that look for ``*.png`` do not see it) and
    renamed. With ``sync`` its bytes and the folder's entry reach the disk before the block ends.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        _sync_folder(path.parent)


def write_atomic(path: Path, data: bytes | memoryview, *, sync: bool = True) -> None:
    """:func:`atomic_file` for bytes at hand."""
    with atomic_file(path, sync=sync) as file:
        file.write(data)


def remove_temporaries(folder: Path) -> None:
    """Removes what a killed process left half-written in ``folder``."""
    for path in folder.glob(_TEMPORARY):
        path.unlink(missing_ok=True)


def content_hash(path: Path) -> str:
    """SHA-256, as ``sha256sum`` prints it, of a file; of a folder, over its JSON and safetensors files by name.

    Raises:
        CheckpointError: there is nothing to read at ``path``.
    """
    if path.is_dir():
        parts = sorted(p for p in path.rglob("*") if p.suffix in (".json", ".safetensors") and p.is_file())
        if not parts:
            raise CheckpointError(f"{path} is a folder without JSON or safetensors files; give a checkpoint file")
        digest = hashlib.sha256()
        for part in parts:
            digest.update(f"{part.relative_to(path).as_posix()} {content_hash(part)}\n".encode())
        return digest.hexdigest()
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
