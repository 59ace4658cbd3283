"""Times codebook_quantize against the official form, FAISS and torch eager; checks indices first, measures memory last.

``python -m gear_engine.bench.codebook_quantize [--official PATH] [--json FILE] [--check-vectors N] [--no-memory]``
Peak memory is that of processes of their own, for the most rows (see quantize_memory); the reference takes 17 GB at
65536 rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gear_engine.bench import quantize_memory, timing
from gear_engine.ops.codebook_quantize import Metric, codebook_quantize, reference

CODES = 16384
#: (metric, d): the published VQ, an LFQ-sized plain L2, and IBQ.
KINDS: tuple[tuple[Metric, int], ...] = (("l2_normalized", 8), ("l2", 8), ("l2", 14), ("inner_product", 256))
_MODULES = {"l2_normalized": "vq_model", "l2": "vq_model", "inner_product": "ibq_model"}


def official_form(checkout: Path, metric: Metric, codebook: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The checkout's own quantizer in eval mode: z [N, d] -> indices."""
    path = checkout / "models" / f"{_MODULES[metric]}.py"
    spec = importlib.util.spec_from_file_location(f"official_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        sys.exit(f"{path} is not there: --official wants a checkout of the official GEAR code")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(checkout))
    spec.loader.exec_module(module)
    sys.path.remove(str(checkout))
    codes, width = codebook.shape
    if metric == "inner_product":
        quantizer = module.IBQQuantizer(codes, width)
    else:
        quantizer = module.VectorQuantizer(codes, width, 0.25, 0.0, metric == "l2_normalized")
    quantizer.eval()
    with torch.no_grad():
        quantizer.embedding.weight.copy_(codebook)

    def run(z: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = quantizer(z.t().reshape(1, width, -1, 1))[2][2]
        return found

    return run


def faiss_flat(metric: Metric, codebook: torch.Tensor) -> Callable[[torch.Tensor], Any] | None:
    """FAISS's exhaustive search for the same neighbours, or None if faiss-cpu is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    if metric == "l2_normalized":
        codebook = torch.nn.functional.normalize(codebook, dim=-1)
    index = (faiss.IndexFlatIP if metric == "inner_product" else faiss.IndexFlatL2)(codebook.shape[1])
    index.add(codebook.numpy())
    faiss.omp_set_num_threads(torch.get_num_threads())
    return lambda z: index.search(z.numpy(), 1)


def peers(metric: Metric, codebook: torch.Tensor, official: Path | None) -> dict[str, Callable[[torch.Tensor], Any]]:
    """Name -> function of z, ours first."""
    found: dict[str, Callable[[torch.Tensor], Any]] = {
        "gear_engine": lambda z: codebook_quantize(z, codebook, metric)[0],
        "torch eager": lambda z: reference(z, codebook, metric)[0],
    }
    search = faiss_flat(metric, codebook)
    if search is not None:
        found["faiss"] = search
    if official is not None:
        found["official"] = official_form(official, metric, codebook)
    return found


def measure(metric: Metric, n: int, d: int, official: Path | None, rate: float, budget: float) -> list[dict[str, Any]]:
    """One row per peer; ``of_rate`` is the share of the machine's multiply rate that the products alone take."""
    generator = torch.Generator().manual_seed(0)
    z, codebook = torch.randn(n, d, generator=generator), torch.randn(CODES, d, generator=generator)
    calls = peers(metric, codebook, official)
    samples = timing.alternate(
        {name: (lambda call=call: call(z)) for name, call in calls.items()},  # type: ignore[misc]
        warmup=1,
        budget=budget,
    )
    rows = []
    baseline = "official" if official is not None else "torch eager"
    for name, times in samples.items():
        row = timing.statistics(times)
        ratio = timing.statistics(samples[baseline])["median_ms"] / row["median_ms"]
        share = 100 * 2.0 * n * CODES * d / (row["median_ms"] / 1e3) / rate
        rows.append({"metric": metric, "N": n, "d": d, "what": name, **row, f"x {baseline}": ratio, "of_rate_%": share})
    return rows


def tie_gap(metric: Metric, z: torch.Tensor, codes: torch.Tensor, others: torch.Tensor) -> float:
    """By how much two choices of codes differ in float64, relative to |z|^2 + |e|^2 (|z| |e| for inner products).

    Args:
        z, codes, others: [n, d], a vector and the codes that were chosen for it.
    """
    z, codes, others = z.double(), codes.double(), others.double()
    if metric == "inner_product":
        scores, scale = ((z * e).sum(-1) for e in (codes, others)), z.norm(dim=-1) * codes.norm(dim=-1)
    else:
        if metric == "l2_normalized":
            z, codes, others = (torch.nn.functional.normalize(rows, dim=-1) for rows in (z, codes, others))
        scores = ((z - e).square().sum(-1) for e in (codes, others))
        scale = z.square().sum(-1) + codes.square().sum(-1)
    ours, theirs = scores
    return float(((ours - theirs).abs() / scale).max()) if len(z) else 0.0


def check(metric: Metric, d: int, vectors: int, official: Path | None, block: int = 256) -> dict[str, Any]:
    """Counts the vectors whose index differs from the official form's, over fresh random vectors.

    ``largest_gap`` says how close the two codes of such a vector lie (:func:`tie_gap`): the unit of fp32 is 6e-8.

    The official form makes several block x K arrays; of 256 rows (16 MB) they stay in the cache and in memory that the
    allocator already has, which is most of its time.
    """
    generator = torch.Generator().manual_seed(1)
    codebook = torch.randn(CODES, d, generator=generator)
    run = official_form(official, metric, codebook) if official else lambda z: reference(z, codebook, metric)[0]
    different = done = 0
    gap = 0.0
    while done < vectors:
        z = torch.randn(min(block, vectors - done), d, generator=generator)
        ours, theirs = codebook_quantize(z, codebook, metric)[0], run(z)
        other = (ours != theirs).nonzero().flatten()
        different += len(other)
        gap = max(gap, tie_gap(metric, z[other], codebook[ours[other]], codebook[theirs[other]]))
        done += z.shape[0]
    return {"metric": metric, "d": d, "vectors": vectors, "different": different, "largest_gap": gap}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gear_engine.bench.codebook_quantize", description=__doc__)
    parser.add_argument("--official", type=Path, help="checkout of the official GEAR code, timed as shipped")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument(
        "--check-vectors", type=int, default=20000, help="vectors of each kind whose indices to compare"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 65536], help="values of N")
    parser.add_argument(
        "--kinds",
        type=int,
        nargs="+",
        choices=range(len(KINDS)),
        default=range(len(KINDS)),
        help=", ".join(f"{i}: {metric} d={d}" for i, (metric, d) in enumerate(KINDS)),
    )
    parser.add_argument("--budget", type=float, default=20.0, help="seconds per case after which no round begins")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    options = parser.parse_args(arguments)
    kinds = [KINDS[kind] for kind in options.kinds]
    ceilings = timing.measure_ceilings()
    rate = ceilings.multiply_rate["float32"]
    print(f"{ceilings}; K = {CODES}")
    checks = [check(metric, d, options.check_vectors, options.official) for metric, d in kinds]
    print(timing.render([{**row, "largest_gap": f"{row['largest_gap']:.1e}"} for row in checks]), flush=True)
    rows: list[dict[str, Any]] = []
    for metric, d in kinds:
        for n in options.rows:
            found = measure(metric, n, d, options.official, rate, options.budget)
            print("\n" + timing.render(found), flush=True)
            rows += found
    memory = [] if options.no_memory else quantize_memory.table(max(options.rows), CODES, KINDS[0][1])
    print("\n" + timing.render(memory), flush=True)
    if options.json:
        record = {**timing.provenance(), "ceilings": ceilings.record()}
        timing.write_json(options.json, {**record, "checks": checks, "rows": rows, "memory": memory})


if __name__ == "__main__":
    main()
