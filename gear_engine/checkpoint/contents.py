"""What a checkpoint holds, without reading its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gear_engine.checkpoint.folder import folder_args, folder_parts
from gear_engine.checkpoint.formats import Kind, contains, saved_args
from gear_engine.checkpoint.safe_read import open_checkpoint

__all__ = ["checkpoint_args", "checkpoint_parts"]

_KINDS: tuple[Kind, ...] = ("generator", "tokenizer")


def checkpoint_parts(path: Path) -> list[str]:
    """``["generator", "tokenizer"]``, one of them, or neither."""
    if path.is_dir():
        return folder_parts(path)
    with open_checkpoint(path) as file:
        return [kind for kind in _KINDS if contains(file.root, kind)]


def checkpoint_args(path: Path) -> dict[str, Any]:
    """The training program's arguments that the file has (for example ``text_encoder``), or {}.

    A converted folder keeps those in ``KEPT_ARGS``.
    """
    if path.is_dir():
        return folder_args(path)
    with open_checkpoint(path) as file:
        return saved_args(file.root)
