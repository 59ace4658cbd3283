"""Any published checkpoint to a folder of config.json and safetensors, read in a process without a network.

The reading itself runs no code from the file (see ``pickle_data``); the separate process is the second wall: it has no
network to send anything to, and a crash of it loses nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gear_engine import errors
from gear_engine.checkpoint.contents import checkpoint_args, checkpoint_parts
from gear_engine.checkpoint.folder import CONFIG_FILE, KEPT_ARGS, Model, check_target, write_folder
from gear_engine.checkpoint.load import PathLike, ReadGenerator, ReadTokenizer, read_generator, read_tokenizer
from gear_engine.checkpoint.pair import check_pair
from gear_engine.checkpoint.safe_read import open_checkpoint
from gear_engine.errors import CheckpointError
from gear_engine.hub import local_path

__all__ = ["Conversion", "convert"]

_CHILD = Path(__file__).with_name("offline_child.py")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was done.

    Attributes:
        folder: where the model is now.
        generator, tokenizer: the lines that say which weights were taken, or None.
        tensors: how many were written, read back and found bit-equal.
        network: ``"none"`` (a network namespace of its own, without any interface up) or ``"guarded"`` (the system
            permits no namespace; sockets are refused inside the process).
    """

    folder: str
    generator: str | None
    tokenizer: str | None
    tensors: int
    network: str


def convert(
    source: PathLike,
    target: PathLike,
    *,
    tokenizer: PathLike | None = None,
    ema: bool = True,
    generator_only: bool = False,
    force: bool = False,
    generator_overrides: Mapping[str, Any] | None = None,
    tokenizer_overrides: Mapping[str, Any] | None = None,
) -> Conversion:
    """Converts ``source`` to a folder that the load functions and ``Pipeline.from_pretrained`` open.

    Args:
        source: a checkpoint of any published format, or ``org/name@revision:file`` (downloaded before the reading).
        target: the folder; it must not exist or be empty unless ``force``. Nothing in it changes if anything fails.
        tokenizer: the tokenizer's file, where ``source`` does not lead to it.
        ema: EMA weights where there are any.
        generator_only: leave the tokenizer out.
        generator_overrides, tokenizer_overrides: see :class:`GeneratorOverrides`, :class:`TokenizerOverrides`.

    Raises:
        CheckpointError: as the read functions; or the target is not empty; or what was written differs.
    """
    folder = Path(target)
    check_target(folder, force=force)
    parent = folder.absolute().parent
    made = [place for place in (parent, *parent.parents) if not place.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=parent))
    job = {
        "source": os.fspath(local_path(source)),
        "folder": os.fspath(scratch),
        "tokenizer": None if tokenizer is None else os.fspath(local_path(tokenizer)),
        "ema": ema,
        "generator_only": generator_only,
        "generator_overrides": dict(generator_overrides or {}),
        "tokenizer_overrides": dict(tokenizer_overrides or {}),
    }
    try:
        result = _run_offline(job)
        _move_in(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for place in made:
            with contextlib.suppress(OSError):  # Not empty: the conversion went well.
                place.rmdir()
    return Conversion(folder=str(folder), **result)


def _run_offline(job: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`run_job` in a new interpreter whose first act is to leave the network."""
    message = json.dumps({"path": sys.path, "job": dict(job)})
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    # -P: the script's own folder must not be searched for modules.
    done = subprocess.run(
        [sys.executable, "-P", str(_CHILD)], input=message, capture_output=True, text=True, env=environment, check=False
    )
    try:
        answer = json.loads(done.stdout.rpartition("\n")[2])
    except ValueError as error:
        what = signal.Signals(-done.returncode).name if done.returncode < 0 else f"status {done.returncode}"
        raise CheckpointError(
            f"the process that reads {job['source']} ended with {what}: {done.stderr.strip()[-500:]}"
        ) from error
    if "errno" in answer:
        raise OSError(answer["errno"], answer["message"])
    if "error" in answer:
        kind = getattr(errors, answer["error"], CheckpointError)
        raise kind(answer["message"])
    result: dict[str, Any] = answer["result"]
    return result


def run_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """Reads, writes, reads again and compares; runs in the offline process."""
    source, folder = Path(job["source"]), Path(job["folder"])
    parts = checkpoint_parts(source)
    if "tokenizer" in parts and "generator" not in parts and (job["generator_only"] or job["tokenizer"]):
        flag = "generator_only" if job["generator_only"] else "another tokenizer"
        raise CheckpointError(f"{source} holds a tokenizer but no generator: {flag} makes no sense with it")
    models: dict[str, Model] = {}
    generator: ReadGenerator | None = None
    tokenizer: ReadTokenizer | None = None
    if "generator" in parts:
        generator = read_generator(source, ema=job["ema"], **job["generator_overrides"])
        args = checkpoint_args(source)
        kept = {name: args[name] for name in KEPT_ARGS if isinstance(args.get(name), (str, int))}
        models["generator"] = (generator.config, generator.state, {**generator.source.to_dict(), "args": kept})
    if not (generator and job["generator_only"]):
        tokenizer = read_tokenizer(job["tokenizer"] or source, ema=job["ema"], **job["tokenizer_overrides"])
        models["tokenizer"] = (tokenizer.config, tokenizer.state, tokenizer.source.to_dict())
    if generator and tokenizer:
        check_pair(generator.config, tokenizer.config)
    write_folder(folder, models)
    return {
        "generator": str(generator.source) if generator else None,
        "tokenizer": str(tokenizer.source) if tokenizer else None,
        "tensors": sum(_compare(folder / f"{kind}.safetensors", state) for kind, (_, state, _) in models.items()),
    }


def _compare(path: Path, state: Mapping[str, torch.Tensor]) -> int:
    """Reads a written file again, tensor by tensor; every bit must be what was written. Returns how many there are."""

    def same(name: str, written: torch.Tensor) -> torch.Tensor:
        read = state[name]
        bits = (read.contiguous().view(-1).view(torch.uint8), written.view(-1).view(torch.uint8))
        if read.dtype != written.dtype or read.shape != written.shape or not torch.equal(*bits):
            raise CheckpointError(f"tensor {name!r} was read back from {path} with other bits; check the disk")
        return written.new_empty(0)

    with open_checkpoint(path) as file:
        if set(file.root) != set(state):
            raise CheckpointError(f"{path} was read back with other tensors; check the disk")
        return len(file.read_tensors(file.root, same))


def _move_in(scratch: Path, folder: Path) -> None:
    """Moves the finished files into the folder, config.json last: until then the folder is no model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    for kind in ("generator", "tokenizer"):
        if not (scratch / f"{kind}.safetensors").exists():
            (folder / f"{kind}.safetensors").unlink(missing_ok=True)
    for path in sorted(scratch.iterdir(), key=lambda path: path.name == CONFIG_FILE):
        os.replace(path, folder / path.name)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
