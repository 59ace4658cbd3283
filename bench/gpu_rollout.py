"""Whole rollouts by captured steps on a GPU: step times against the floor, what capture costs, and the compiled peers.

    python -m gear_engine.bench.gpu_rollout [--model LlamaGen-B LlamaGen-XL] [--images 1 8 64] [--json OUT]
    python -m gear_engine.bench.gpu_rollout --peers --official PATH
    python -m gear_engine.bench.gpu_rollout --smoke | --profile

Weights are random, in bf16, with guidance. ``floor_ms`` is the linear weights and the average cache of a step over the
read bandwidth measured in the same run; ``equal`` says whether captured and called programs drew the same tokens.
Philox draws, called as :class:`gear_engine.Pipeline` does. ``--peers`` runs the official sampler as shipped (fp32), in
bf16, and in bf16 compiled with CUDA graphs. A compiled peer counts only if no graph was skipped and graphs were
launched; otherwise, or if a peer fails, the exit status is 1. ``--profile`` runs one layer of LlamaGen-XL and marks
what a profiler should look at.

Not run on hardware yet.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gear_engine import Engine, SamplingParams
from gear_engine.bench import timing
from gear_engine.bench.inputs import generator_config, generator_weights
from gear_engine.bench.rollout import official_rollout
from gear_engine.bench.step_costs import CFG_SCALE, step_bytes
from gear_engine.config import GeneratorConfig
from gear_engine.errors import OutOfMemoryError
from gear_engine.ops import backends
from gear_engine.request import ImageRequest

GUIDED = SamplingParams(cfg_scale=CFG_SCALE)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device, rounds: int) -> list[float]:
    """Seconds of ``rounds`` calls, the device idle before and after each."""
    found = []
    for _ in range(rounds):
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        found.append(time.perf_counter() - start)
    return found


def _labels(images: int, config: GeneratorConfig) -> list[int]:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, config.num_classes, (images,), generator=rng).tolist()


def measure(
    model: str, images: int, tokens: int, device: torch.device, execution: str, read: float, rounds: int
) -> dict[str, Any]:
    """One row: rollouts of ``images`` images with guidance, after everything is captured."""
    config = generator_config(model)
    weights = generator_weights(config, 0, device)
    row: dict[str, Any] = {"model": model, "images": images, "tokens": tokens, "execution": execution}
    try:
        options: dict[str, Any] = {"max_images": images, "dtype": torch.bfloat16, "max_new_tokens": tokens}
        engine = Engine(weights, execution=execution, **options)  # type: ignore[arg-type]
        called = Engine(weights, execution="eager", **options)
    except OutOfMemoryError as error:
        return {**row, "skipped": str(error)}
    engine.warm_up()
    labels = _labels(images, config)
    expected = called.generate(labels, GUIDED)
    found = engine.generate(labels, GUIDED)
    del called

    def rollout() -> torch.Tensor:
        return engine.generate(labels, GUIDED, progress=lambda made, total: None)

    samples = seconds_of(rollout, device, rounds)
    step = 1e3 * statistics.median(samples) / tokens
    floor = 1e3 * step_bytes(engine, images, tokens) / read
    cost = engine.capture_cost
    return {
        **row,
        "ms_per_step": step,
        "floor_ms": floor,
        "of_floor_%": 100 * floor / step,
        "ms_per_image": 1e3 * statistics.median(samples) / images,
        "runs": len(samples),
        "capture_s": cost.seconds,
        "capture_MiB": cost.nbytes / 2**20,
        "equal": bool(torch.equal(found, expected)),
        "backends": dict(engine.ops.backends),
    }


def inductor_counters() -> Counter[str]:
    """What torch.compile's back end counts; ``cudagraph_skips`` among it."""
    import torch._dynamo.utils

    found: Counter[str] = torch._dynamo.utils.counters["inductor"]
    return found


def graph_launches(call: Callable[[], Any]) -> int:
    """CUDA graphs launched by one call, as the profiler sees it."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        call()
    return sum(event.count for event in profile.key_averages() if event.key == "cudaGraphLaunch")


def peers(
    model: str, images: int, tokens: int, device: torch.device, official: Path, rounds: int
) -> list[dict[str, Any]]:
    """The official sampler: as shipped, in bf16, and compiled; ``graphs`` says whether CUDA graphs really ran."""
    config = generator_config(model)
    weights = generator_weights(config, 0, device)
    labels, rows = _labels(images, config), []
    for name, dtype, compiled in (
        ("official", torch.float32, False),
        ("official bf16", torch.bfloat16, False),
        ("official bf16 compiled", torch.bfloat16, True),
    ):
        counters = inductor_counters()
        counters.clear()
        row: dict[str, Any] = {"model": model, "images": images, "tokens": tokens, "what": name}
        rows.append(row)
        try:
            call = official_rollout(weights.to(dtype=dtype), labels, tokens, official, compiled=compiled)
            call()
            call()
            if compiled:
                row["graphs_skipped"] = int(counters["cudagraph_skips"])
                row["graphs_launched"] = graph_launches(call)
                row["graphs"] = row["graphs_skipped"] == 0 and row["graphs_launched"] >= tokens - 1
            row["ms_per_step"] = 1e3 * statistics.median(seconds_of(call, device, rounds)) / tokens
        except Exception as error:  # a compiler's: the other contestants have their numbers all the same
            row |= {"failed": f"{type(error).__name__}: {error}"[:500], "graphs": False}
    return rows


def smoke(device: torch.device) -> dict[str, Any]:
    """The smallest thing that touches everything: all executions that can run, on one small model."""
    table = {
        str(dtype).removeprefix("torch."): [list(line) for line in backends.table(device, dtype)]
        for dtype in (torch.float32, torch.bfloat16)
    }
    config = GeneratorConfig(dim=128, n_layer=2, n_head=2, vocab_size=256, block_size=16, num_classes=9)
    labels, params = [1, 5, 7], SamplingParams(cfg_scale=3.0, top_k=50, top_p=0.9, cfg_interval=6)
    weights = generator_weights(config, 0, device)
    drawn, graphs = {}, device.type == "cuda"
    for execution in ("direct", "eager", *(["graph"] if graphs else [])):
        engine = Engine(weights, max_images=4, execution=execution)  # type: ignore[arg-type]
        drawn[execution] = engine.generate(labels, params).cpu()
    on_cpu = Engine(weights.to(torch.device("cpu")), max_images=4).generate(labels, params)
    equal = {name: bool(torch.equal(tokens, drawn["direct"])) for name, tokens in drawn.items()}
    share = float((on_cpu == drawn["direct"]).float().mean())
    return {**timing.provenance(device), "backends": table, "equal_to_direct": equal, "equal_to_cpu_%": 100 * share}


@contextlib.contextmanager
def _profiled(device: torch.device) -> Iterator[None]:
    """What a profiler that was told to wait looks at."""
    _synchronize(device)
    if device.type == "cuda":
        torch.cuda.profiler.start()
    yield
    _synchronize(device)
    if device.type == "cuda":
        torch.cuda.profiler.stop()


def profile(device: torch.device, config: GeneratorConfig | None = None, vectors: int = 65536) -> None:
    """One layer of LlamaGen-XL at its last token for 1, 8 and 64 images, called once each; then a codebook search."""
    config = config or dataclasses.replace(generator_config("LlamaGen-XL"), n_layer=1)
    weights = generator_weights(config, 0, device).to(dtype=torch.bfloat16)
    for images in (1, 8, 64):
        engine = Engine(weights, max_images=images, execution="eager")
        for label in _labels(images, config):
            engine.add_request(ImageRequest(label=label, params=GUIDED))
        for _ in range(config.block_size - 1):
            engine.step()
        with _profiled(device):
            engine.step()
    codebook, z = torch.randn(16384, 8, device=device), torch.randn(vectors, 8, device=device)
    run = backends.resolve("codebook_quantize", device, torch.float32).load()
    run(z, codebook, "l2_normalized")
    with _profiled(device):
        run(z, codebook, "l2_normalized")


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gear_engine.bench.gpu_rollout", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one small model by every execution")
    parser.add_argument("--profile", action="store_true", help="a few steps, for a profiler")
    parser.add_argument("--peers", action="store_true", help="the official sampler instead of ours")
    parser.add_argument("--official", type=Path, help="checkout of the official GEAR code")
    parser.add_argument("--model", nargs="+", default=["LlamaGen-XL", "LlamaGen-B"], help="class-conditional presets")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further row begins")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--execution", default="graph", choices=["direct", "eager", "graph"])
    parser.add_argument("--json", type=Path, help="write the record to this file")
    found = parser.parse_args(arguments)
    if found.peers and found.official is None:
        parser.error("--peers needs --official with a checkout of the official code")
    return found


def main(arguments: list[str] | None = None) -> int:
    given = options(arguments)
    device, begin = torch.device(given.device), time.monotonic()
    if given.profile:
        profile(device)
        return 0
    if given.smoke:
        record = smoke(device)
        print(json.dumps(record, indent=1))
        return int(not all(record["equal_to_direct"].values()))
    read, where = timing.measure_ceilings(device).read_bandwidth, timing.provenance(device)
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for model in given.model:
        for images in given.images:
            if time.monotonic() - begin > given.budget:
                skipped.append(f"{model}, {images} images: the budget of {given.budget:.0f} s is spent")
            elif given.peers:
                rows += peers(model, images, given.tokens, device, given.official, given.rounds)
            else:
                rows.append(measure(model, images, given.tokens, device, given.execution, read, given.rounds))
            if given.json:
                # After every row: a limit may end this program.
                record = {"read_bandwidth": read, "cfg_scale": CFG_SCALE, "rows": rows, "skipped": skipped}
                timing.write_json(given.json, {**where, **record})
    print(timing.render(rows), *skipped, sep="\n", flush=True)
    return int(not all(row.get("equal", True) and row.get("graphs", True) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
