"""The tokenizer that a stage-2 file only names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gear_engine.checkpoint.claims import argument
from gear_engine.checkpoint.formats import contains
from gear_engine.checkpoint.safe_read import CheckpointFile, open_checkpoint
from gear_engine.errors import CheckpointError

__all__ = ["open_named_tokenizer"]

_ASK = "pass the tokenizer's path"
#: Folders above the checkpoint in which a relative path is looked for: <root>/<experiment>/checkpoints/<step>.pt.
_LEVELS = 4


@contextmanager
def open_named_tokenizer(checkpoint: Path, args: Mapping[str, Any]) -> Iterator[tuple[CheckpointFile, str]]:
    """The file of the tokenizer that ``args`` name, open, and how it was found.

    As in the official trainer (``src/train_ar.py``), with ``vq_override_from_ar_init`` the tokenizer bundled in
    ``ar_init_ckpt`` wins over ``vq_ckpt``. Relative paths are looked for in the working folder, then in the
    checkpoint's folder and those above it.

    Raises:
        CheckpointError: nothing is named, or what is named cannot be found.
    """
    initial = argument(args, str, "ar_init_ckpt")[1]
    if initial and args.get("vq_override_from_ar_init"):
        path = _reach(checkpoint, initial, "args.ar_init_ckpt (with args.vq_override_from_ar_init)")
        with open_checkpoint(path) as file:
            if contains(file.root, "tokenizer"):
                yield file, f"tokenizer bundled in args.ar_init_ckpt {initial}"
                return
    named = argument(args, str, "vq_ckpt")[1]
    if not named:
        raise CheckpointError(f"{checkpoint} holds no tokenizer and names none (args.vq_ckpt); {_ASK}")
    with open_checkpoint(_reach(checkpoint, named, "args.vq_ckpt")) as file:
        yield file, f"tokenizer of args.vq_ckpt {named}"


def _reach(checkpoint: Path, named: str, source: str) -> Path:
    folders = [Path(), *checkpoint.absolute().parents[:_LEVELS]]
    if "\0" not in named:
        for folder in folders:
            path = folder / named
            try:
                if path.is_file():
                    return path
            except OSError:
                continue
    raise CheckpointError(f"{checkpoint}: {source} names {named[:500]!r}, which is not reachable here; {_ASK}")
