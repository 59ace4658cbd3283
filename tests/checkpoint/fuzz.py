"""Reads many mutated checkpoints in one memory-limited process and counts what happened.

    python -m tests.checkpoint.fuzz --count 10000 --seed 0

Every one must load what the file holds (compared with ``torch.load(weights_only=True)`` on the same bytes) or raise one
of our errors. Nothing may run, hang, crash, or raise the peak memory by more than twice the file plus 64 MB.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from gear_engine.checkpoint import read_generator, read_tokenizer
from gear_engine.config import GeneratorConfig
from gear_engine.errors import CheckpointError
from tests.checkpoint.files import generator_shapes
from tests.checkpoint.mutated_content import LIGHTNING, MUTATIONS, SAFE_BASE, TOKENIZER_STATE, lightning
from tests.checkpoint.mutations import BASE, SENTINEL, TINY, generator_state, tiny_root

ROOT = tiny_root()
PEAK_ALLOWANCE = 64 << 20
ADDRESS_SPACE_ALLOWANCE = 512 << 20
SECONDS_PER_FILE = 10
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.",
    "socket.",
    "pickle.find_class",
    "shutil.",
)


class Watch:
    """What must not happen while a file is read: forbidden events, time, memory."""

    def __init__(self) -> None:
        self.active = False
        self.events: list[str] = []
        sys.addaudithook(self._event)
        signal.signal(signal.SIGALRM, self._alarm)

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.active and event.startswith(_FORBIDDEN):
            self.events.append(event)

    def _alarm(self, *_: Any) -> None:
        raise TimeoutError

    def __enter__(self) -> Watch:
        self.events.clear()
        Path("/proc/self/clear_refs").write_text("5")  # The peak starts again from here.
        self.before = memory("VmRSS")
        self.active = True
        signal.alarm(SECONDS_PER_FILE)
        return self

    def __exit__(self, *_: Any) -> None:
        signal.alarm(0)
        self.active = False
        self.growth = memory("VmHWM") - self.before


def memory(field: str) -> int:
    """Bytes of ``/proc/self/status``: VmRSS (resident), VmHWM (its peak), VmSize (address space)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


@dataclass(frozen=True)
class Case:
    """How a kind of file is read (path -> configuration, state, source), and what it held before it was mutated."""

    read: Callable[[Path], Any]
    held: Mapping[str, Any]


def is_right(data: bytes, held_before: Mapping[str, Any], state: dict[str, torch.Tensor], section: str) -> str:
    """Whether ``state`` is what the file holds: "" or what is wrong.

    Most files that still load hold the tensors that were saved. The others are read again by torch or safetensors.
    """
    if _same(held_before.get(section, {}), state):
        return ""
    if not data.startswith(b"PK"):
        held = safetensors.torch.load(data)
    else:
        with torch.serialization.safe_globals([argparse.Namespace]):
            root = torch.load(io.BytesIO(data), weights_only=True)
        if section.endswith("shadows)"):
            inner = root["state_dict"]
            live = [name for name in inner if not name.startswith(("model_ema.", "loss."))]
            held = {name: inner["model_ema." + name.replace(".", "")] for name in live}
        else:
            held = root if section == "the file itself" else root[section]
    return "" if _same(held, state) else f"other tensors than in {section}"


def _same(held: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> bool:
    named = {name.replace("_orig_mod.", ""): tensor for name, tensor in held.items()}
    return set(named) == set(state) and all(
        torch.equal(named[name].to(tensor.dtype), tensor) for name, tensor in state.items()
    )


def shapes_of(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def read_one(case: Case, path: Path, data: bytes, watch: Watch) -> tuple[str, str]:
    """(outcome, detail) of one file; outcomes "loaded" and "refused …" are right, "WRONG" is not."""
    path.write_bytes(data)
    try:
        with watch:
            config, state, source = case.read(path)
        outcome, detail = "loaded", ""
    except CheckpointError as error:
        outcome, detail = f"refused: {type(error).__name__}", ""
        if len(str(error)) > 4000:
            return "WRONG", "a message of more than 4000 characters"
    except BaseException:
        return "WRONG", traceback.format_exc()[-1500:]
    if watch.events:
        return "WRONG", f"it caused {watch.events}"
    if watch.growth > 2 * len(data) + PEAK_ALLOWANCE:
        return "WRONG", f"the peak grew by {watch.growth >> 20} MB for {len(data)} bytes"
    if outcome == "loaded":
        if isinstance(config, GeneratorConfig) and shapes_of(state) != generator_shapes(config):
            return "WRONG", "tensors of other shapes than the configuration's"
        try:
            detail = is_right(data, case.held, state, source.section)
        except Exception as error:
            detail = f"the independent reader refuses it: {type(error).__name__}: {error}"[:300]
        outcome = "WRONG" if detail else outcome
    return outcome, detail


GENERATOR_CASE = Case(lambda path: read_generator(path, n_head=2), ROOT)
CASES = {lightning: Case(read_tokenizer, {"state_dict (model_ema shadows)": TOKENIZER_STATE})}


def run(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Counts by mutation and outcome; the first failures in words."""
    path = folder / "mutated"
    for data in (BASE, SAFE_BASE):  # Also imports what is imported on first use.
        path.write_bytes(data)
        state = read_generator(path, n_head=2).state
        assert all(torch.equal(tensor, state[name]) for name, tensor in generator_state(TINY).items())
    path.write_bytes(LIGHTNING)
    assert _same(TOKENIZER_STATE, read_tokenizer(path).state)
    limit = memory("VmSize") + ADDRESS_SPACE_ALLOWANCE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    os.chdir(folder)
    watch, peak, start = Watch(), 0, time.monotonic()
    counts: dict[str, collections.Counter[str]] = {}
    failures: list[dict[str, Any]] = []
    total = sum(MUTATIONS.values())
    for mutate, share in MUTATIONS.items():
        tally = counts[mutate.__name__] = collections.Counter()
        for index in range(-(-share * count // total)):
            data = mutate(random.Random(f"{seed} {mutate.__name__} {index}"))
            outcome, detail = read_one(CASES.get(mutate, GENERATOR_CASE), path, data, watch)
            if (folder / SENTINEL).exists():
                outcome, detail = "WRONG", "a payload ran"
                (folder / SENTINEL).unlink()
            tally[outcome] += 1
            peak = max(peak, watch.growth)
            if outcome == "WRONG" and len(failures) < 20:
                failures.append({"mutation": mutate.__name__, "index": index, "detail": detail})
    return {
        "files": sum(sum(tally.values()) for tally in counts.values()),
        "wrong": sum(tally["WRONG"] for tally in counts.values()),
        "counts": counts,
        "peak_growth_mb": round(peak / 2**20, 1),
        "seconds": round(time.monotonic() - start, 1),
        "failures": failures,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        report = run(args.count, args.seed, Path(folder))
        os.chdir("/")
    print(json.dumps(report, indent=1))
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
