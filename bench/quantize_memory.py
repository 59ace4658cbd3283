"""Peak memory of codebook quantization, in a process of its own.

    python -m gear_engine.bench.quantize_memory '{"what": "cpu", "metrics": ["l2"], "N": 65536, "K": 16384, "d": 8}'

prints a JSON object: ``peak``, the system's high-water mark of the calls less what was resident before them, as vectors
and codebook were (outputs count); ``matrix``, what an N x K array of fp32 takes; ``operands``, the bytes of vectors,
codebook and outputs. The process quantizes a few vectors first, so that libraries and threads are in memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch

from gear_engine.bench.process_memory import in_new_process, reset_peak, resident
from gear_engine.ops.codebook_quantize import Metric, codebook_quantize

__all__ = ["measure", "table"]


def _run(job: dict[str, Any]) -> dict[str, int]:
    n, codes, width = int(job["N"]), int(job["K"]), int(job["d"])
    z, codebook = torch.randn(n, width), torch.randn(codes, width)
    for metric in job["metrics"]:
        codebook_quantize(z[:64], codebook[:64], metric, backend=job["what"])
    base = resident("VmRSS")
    reset_peak()
    outputs = 0
    for metric in job["metrics"]:
        outputs = sum(part.nbytes for part in codebook_quantize(z, codebook, metric, backend=job["what"]))
    operands = z.nbytes + codebook.nbytes + outputs
    return {"peak": resident("VmHWM") - base, "operands": operands, "matrix": 4 * n * codes}


def measure(what: str, metrics: Sequence[Metric], n: int, codes: int, width: int) -> dict[str, int]:
    """The largest peak of one call of backend ``what`` per metric, in a new process; bytes, as the module says.

    Raises:
        RuntimeError: the process failed; the message is the end of its output.
    """
    job = {"what": what, "metrics": list(metrics), "N": n, "K": codes, "d": width}
    found: dict[str, int] = in_new_process("gear_engine.bench.quantize_memory", json.dumps(job))
    return found


def table(n: int, codes: int, width: int) -> list[dict[str, Any]]:
    """Rows in MB: the compiled op, and the reference, which makes four N x K arrays as the official form does."""
    rows = []
    for what in ("cpu", "reference"):
        found = measure(what, ("l2_normalized",), n, codes, width)
        row = {"N": n, "K": codes, "d": width, "memory": what}
        rows.append({**row, **{f"{name}_MB": size / 1e6 for name, size in found.items()}})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gear_engine.bench.quantize_memory", description=__doc__)
    parser.add_argument("job", type=json.loads, help="JSON object: what (a backend), metrics, N, K, d")
    print(json.dumps(_run(parser.parse_args().job)))


if __name__ == "__main__":
    main()
