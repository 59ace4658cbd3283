"""Times dual_readout against the materialised form, and measures what each holds at its peak.

``python -m gear_engine.bench.dual_readout [--n 8192] [--codes 16384] [--width 8] [--channels 768] [--distance
l2_normalized] [--table-grad] [--rounds 3] [--json FILE]``

Forward reads out; forward and backward ("both") adds the gradients of z and the codebook (and of the table with
--table-grad). ``reference`` is the official form: distances, softmax and gradients as N x K arrays. Errors are against
fp64 on the first 64 rows. ``_ms`` is the median of the wall time, ``cpu_s`` the least processor time of all threads
together, which a busy neighbour disturbs less. Memory is the growth of the resident high-water mark over one forward
and backward in a process of its own, after a small warm-up, with the operands already there; the results and gradients
are part of it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gear_engine.bench import timing
from gear_engine.bench.process_memory import in_new_process, reset_peak, resident
from gear_engine.ops import backends
from gear_engine.ops.dual_readout import dual_readout, reference

TAU = 0.3
_ERROR_ROWS = 64


def operands(job: dict[str, Any]) -> list[torch.Tensor]:
    """z, codebook, table of a job; the first two (and the table if asked) require a gradient."""
    generator = torch.Generator().manual_seed(0)
    n, k, d, c = (job[name] for name in ("n", "codes", "width", "channels"))
    found = [torch.randn(shape, generator=generator) for shape in ((n, d), (k, d), (k, c))]
    if job["distance"] == "lfq":
        found[1] = ((torch.arange(k)[:, None] >> torch.arange(d)) & 1) * 2.0 - 1.0
    return [x.requires_grad_(i < 2 or job["table_grad"]) for i, x in enumerate(found)]


def readout(inputs: list[torch.Tensor], job: dict[str, Any], backend: str) -> torch.Tensor:
    return dual_readout(*inputs, TAU, job["distance"], backend=backend)[1]


def both_ways(inputs: list[torch.Tensor], job: dict[str, Any], backend: str) -> tuple[torch.Tensor, ...]:
    soft = readout(inputs, job, backend)
    return torch.autograd.grad(soft, [x for x in inputs if x.requires_grad], torch.ones_like(soft))


def peak(job: dict[str, Any], backend: str) -> float:
    """MB that one forward and backward adds in a new process."""
    return float(in_new_process("gear_engine.bench.dual_readout", "--child", json.dumps({**job, "what": backend})))


def _child(job: dict[str, Any]) -> None:
    both_ways(operands({**job, "n": 8, "channels": 16}), job, job["what"])
    inputs = operands(job)
    reset_peak()
    before = resident("VmRSS")
    both_ways(inputs, job, job["what"])
    print((resident("VmHWM") - before) / 1e6)


def measure(job: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """One row per backend, the materialised form first."""
    inputs = operands(job)
    cpu = torch.device("cpu")
    names = ["reference"] + [
        name
        for name, found in backends.implementations("dual_readout").items()
        if name not in ("reference", "triton") and found.why_not(cpu, torch.float32) is None
    ]
    times = timed(inputs, job, names, rounds) if rounds else {name: {} for name in names}
    few = [inputs[0].detach()[:_ERROR_ROWS], *(x.detach() for x in inputs[1:])]
    exact = reference(*(x.double() for x in few), TAU, job["distance"])[1]
    del inputs
    rows = []
    for name in names:
        error = float((readout(few, job, name) - exact).abs().max() / exact.abs().max())
        sizes = {key: job[key] for key in ("n", "codes", "width", "channels", "distance")}
        rows.append({**sizes, "what": name, **times[name], "peak_MB": peak(job, name), "error": f"{error:.1e}"})
    return rows


def timed(
    inputs: list[torch.Tensor], job: dict[str, Any], names: list[str], rounds: int
) -> dict[str, dict[str, float]]:
    """Wall and processor time of every backend, both ways, backends in turn."""
    processor: dict[str, list[float]] = {}

    def counted(key: str, call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            begin = time.process_time()
            call()
            processor.setdefault(key, []).append(time.process_time() - begin)

        return run

    calls: dict[str, Callable[[], None]] = {}
    for name in names:
        calls[f"{name} forward"] = counted(
            f"{name} forward", lambda name=name: readout([x.detach() for x in inputs], job, name)
        )
        calls[f"{name} both"] = counted(f"{name} both", lambda name=name: both_ways(inputs, job, name))
    samples = timing.alternate(calls, warmup=1, repeats=rounds, budget=600)
    wall = {key: timing.statistics(found)["median_ms"] for key, found in samples.items()}
    return {
        name: {
            "forward_ms": wall[f"{name} forward"],
            "both_ms": wall[f"{name} both"],
            "forward_cpu_s": min(processor[f"{name} forward"]),
            "both_cpu_s": min(processor[f"{name} both"]),
        }
        for name in names
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gear_engine.bench.dual_readout", description=__doc__)
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--codes", type=int, default=16384)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--distance", default="l2_normalized")
    parser.add_argument("--table-grad", action="store_true", help="the gradient of the table too")
    parser.add_argument("--rounds", type=int, default=3, help="of timing; 0: memory and errors only")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        _child(options.child)
        return
    job = {name: getattr(options, name) for name in ("n", "codes", "width", "channels", "distance", "table_grad")}
    rows = measure(job, options.rounds)
    print(timing.render(rows))
    if options.json:
        timing.write_json(
            options.json, {**timing.provenance(), "rows": rows, "settings": {**job, "rounds": options.rounds}}
        )


if __name__ == "__main__":
    main()
