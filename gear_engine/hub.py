"""Checkpoints by hub name: ``org/name@revision`` or ``org/name@revision:file``, at a pinned revision."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gear_engine.errors import CheckpointError

__all__ = ["local_path"]

_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+))?")
_PATTERNS = ["config.json", "*.safetensors"]


def local_path(name: str | os.PathLike[str]) -> Path:
    """A local file or folder as it is; a hub name after its download (or from the cache, with ``HF_HUB_OFFLINE=1``).

    A revision (commit, tag or branch) is required, so that a name means the same weights tomorrow; a commit is best.
    ``org/name@revision`` is a folder made by ``save_pretrained`` or ``gear-engine convert``; any other published file
    is ``org/name@revision:path/in/the/repository``.

    Raises:
        CheckpointError: neither a local path nor a hub name with a revision, or the download failed.
    """
    path = Path(name)
    match = _NAME.fullmatch(os.fspath(name))
    try:
        if os.fspath(name).count("\0"):
            raise CheckpointError("a path cannot hold a null character")
        if path.exists() or match is None:
            return path
    except OSError as error:  # No access, or a name that is too long.
        raise CheckpointError(f"cannot read {os.fspath(name)[:500]}: {error.strerror or error}") from error
    if match["revision"] is None:
        raise CheckpointError(
            f"{name}: no such file or folder. If it is a hub name, pin its revision: {match['repo']}@COMMIT"
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(f"{name}: no such file; hub names need `pip install gear-engine[hub]`") from error
    repo, revision, file = match["repo"], match["revision"], match["file"]
    try:
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=_PATTERNS))
    except Exception as error:  # The library raises its own, requests' and httpx' errors, which vary by version.
        raise CheckpointError(f"{name}: the hub does not give it: {type(error).__name__}: {error}") from error
