"""Processes, agreement and tables of a comparison with the official code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gear_engine.tokenizers import soft_readout

__all__ = [
    "FLOAT_TOLERANCE",
    "READOUT_TOLERANCE",
    "TIE_TOLERANCE",
    "Arrays",
    "Child",
    "compare_tokens",
    "decoder_agrees",
    "relative_error",
    "report",
    "run_child",
    "run_driver",
    "side",
    "tokenizer_errors",
    "whole",
]

_DRIVER = Path(__file__).with_name("official_driver.py")
FLOAT_TOLERANCE = 1e-5
READOUT_TOLERANCE = 1e-4
TIE_TOLERANCE = 1e-4
_AGREEMENT = ("tokens", "largest_pixel_difference", "indices", "errors", "decoded_from_float64")
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Child:
    """A finished process: wall seconds, processor seconds of all threads, peak resident bytes."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def _peak_bytes(pid: int) -> int:
    """High-water mark of the resident size of a running process; 0 once it has gone.

    Not ``ru_maxrss``: that starts at the resident size of the process that started this one.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def run_child(command: list[str], log: Path) -> Child:
    """Runs ``command`` to its end; raises with the end of its output if it fails."""
    start = time.perf_counter()
    peak, pid = 0, 0
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        while pid == 0:
            peak = max(peak, _peak_bytes(process.pid))
            time.sleep(0.02)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-4000:]}")
    return Child(seconds, usage.ru_utime + usage.ru_stime, peak)


def run_driver(side: str, job: dict[str, Any], folder: Path, name: str) -> tuple[Arrays, Child]:
    """Runs a job with the ``"official"`` or the ``"engine"`` driver and returns its arrays."""
    out = folder / f"{name}.{side}.npz"
    path = folder / f"{name}.{side}.json"
    path.write_text(json.dumps({**job, "out": str(out)}))
    driver = ["-P", str(_DRIVER)] if side == "official" else ["-m", "gear_engine.bench.engine_driver"]
    child = run_child([sys.executable, *driver, str(path)], folder / f"{name}.{side}.log")
    with np.load(out) as stored:
        return {key: stored[key] for key in stored.files}, child


def compare_tokens(job: dict[str, Any], folder: Path, official: Arrays, ours: Arrays) -> dict[str, Any]:
    """Equal images, ties and true differences; a difference is scored in a second official run."""
    differs = official["tokens"] != ours["tokens"]
    images = differs.any(axis=1)
    result = {"images": len(images), "equal": int((~images).sum()), "ties": 0, "different": 0}
    if images.any():
        rerun = {**job, "other_tokens": str(folder / f"{job['task']}.engine.npz")}
        scored, _ = run_driver("official", rerun, folder, f"{job['task']}_scores")
        if not np.array_equal(scored["tokens"], official["tokens"]):
            raise SystemExit("the official code did not repeat its own tokens; its differences cannot be scored")
        tolerance = TIE_TOLERANCE * max(1.0, job["sampling"]["cfg_scale"] / 4)
        first = differs.argmax(axis=1)
        gaps = np.abs(scored["gaps"][np.arange(len(first)), first])[images]
        result["ties"] = int((gaps <= tolerance).sum())
        result["different"] = int((gaps > tolerance).sum())
        result["largest_gap"] = float(gaps.max())
    return result


def relative_error(actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max())


def tokenizer_errors(official: Arrays, ours: Arrays) -> dict[str, float]:
    """Relative errors of ``quant``, ``distance_rows``, ``decoded`` and ``soft_readout`` (at tau 0.3).

    ``quant`` [B, C, h, w] is compared where the two chose the same codes: another choice is judged by its distance.
    """
    chosen = (official["indices"].reshape(-1) == ours["indices"].reshape(-1)).reshape(_positions(official), -1)
    same = chosen.all(axis=1)  # [B * h * w]
    vectors = [np.moveaxis(arrays["quant"], 1, -1).reshape(len(same), -1)[same] for arrays in (ours, official)]
    errors = {"quant": relative_error(*vectors) if same.any() else float("inf")}
    errors |= {key: relative_error(ours[key], official[key]) for key in ("distance_rows", "decoded")}
    rows = torch.from_numpy(official["distance_rows"])
    table = torch.randn(rows.shape[1], 40, generator=torch.Generator().manual_seed(6))
    expected = torch.softmax(-rows / 0.3, dim=-1) @ table  # the trainer's soft labels on a table of embeddings
    readout = soft_readout(torch.from_numpy(ours["distance_rows"]), table, 0.3)
    return errors | {"soft_readout": relative_error(readout.numpy(), expected.numpy())}


def decoder_agrees(error: float, from_float64: dict[str, float]) -> bool:
    """Whether decoded images agree: within the tolerance of the official fp32 ones, or of the official float64 ones
    and no farther from these than the official fp32 ones are.

    The second holds where the official code's own rounding exceeds the tolerance, as torch's fp32 convolutions do on
    some processors; nothing exact could come nearer to it.
    """
    ours, official = from_float64["ours"], from_float64["official"]
    return error <= FLOAT_TOLERANCE or (ours <= FLOAT_TOLERANCE and ours <= official)


def _positions(arrays: Arrays) -> int:
    batch, _, height, width = arrays["quant"].shape
    return int(batch * height * width)


def side(arrays: Arrays, child: Child) -> dict[str, Any]:
    """One side's figures: both phases and the whole process as [wall, processor] seconds, peak bytes."""
    first, second = arrays["seconds"].tolist()
    return {"first_s": first, "second_s": second, **whole(child)}


def whole(child: Child) -> dict[str, Any]:
    return {"process_s": [child.seconds, child.cpu_seconds], "peak_bytes": child.peak_bytes}


def _row(name: str, official: list[float], ours: list[float], peaks: tuple[int, int]) -> str:
    times = "".join(f"{a:10.2f}{b:10.2f}{a / b:7.2f}" for a, b in zip(official, ours, strict=True))
    return f"{name:56s}{times}{peaks[0] / 1e9:9.2f}{peaks[1] / 1e9:7.2f}"


def report(results: list[dict[str, Any]]) -> str:
    """Per phase: wall seconds, then processor seconds (which a busy machine disturbs less), official and ours."""
    head = "".join(f"{kind:>10s}{'ours':>10s}{'ratio':>7s}" for kind in ("wall", "cpu"))
    lines = [f"{'seconds, official and ours; peak memory in GB':56s}{head}{'GB':>9s}{'ours':>7s}"]
    for result in results:
        official, ours = result["official"], result["ours"]
        peaks = (official["peak_bytes"], ours["peak_bytes"])
        lines.append(f"{result['task']}: {'agrees' if result['ok'] else 'DIFFERS'}")
        lines.append("  " + json.dumps({key: result[key] for key in _AGREEMENT if key in result}))
        names = ("  encoding", "  decoding") if result["task"].startswith("tokenizer") else ("  sampling", "  decoding")
        for name, phase in zip(names, ("first_s", "second_s"), strict=True):
            if ours[phase][0] > 0:
                lines.append(_row(name, official[phase], ours[phase], peaks))
        if "program" in result:
            program = result["program"]
            peaks = (official["peak_bytes"], program["peak_bytes"])
            name = "  whole process; ours: gear-engine sample"
            lines.append(_row(name, official["process_s"], program["process_s"], peaks))
    return "\n".join(lines)
