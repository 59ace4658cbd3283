"""All tokens of an image against the official sampler: fp32, bf16 and int8 weights, in one process, in turn.

    python -m gear_engine.bench.rollout --official PATH [--model LlamaGen-B] [--images 1 8] [--tokens 256] [--json OUT]

Weights are random (matrices of variance 1 / in), the same on both sides; labels and draws follow one seed. Every round
runs each contestant once: the official ``generate`` as shipped (fp32) and moved to bf16 (with ``--compiled`` also
compiled), and gear_engine in fp32, bf16, and int8 weights with bf16 activations, all with ``rng="torch"``. Compiling
and :meth:`Engine.warm_up` come before the first round and are reported as ``prepare_s``. ``x official`` divides the
medians of the two; ``of_read_%`` is (weights + average cache) of a step over its best time and the read bandwidth
measured in the same run, ``of_rate_%`` likewise the operations of its products alone over the multiply rate of the
format (of a wider one, where the machine multiplies that faster). ``outside_torch_%`` is the share of our rollouts
spent outside compiled calls with the draws of the timed rounds, ``outside_philox_%`` with Philox draws; both are
measured in rollouts of their own.

In fp32 the tokens must equal the official ones: images that differ are counted (near ties may; see compare_official).
For bf16 and int8, ``kl`` is the mean divergence KL(fp32 || format) of the guided distributions and ``equal_tokens_%``
the share of equal draws under equal noise, both along the fp32 tokens. ``best`` columns take each contestant's fastest
round, ``processor`` ones its least processor time: the fairer ones on a machine with neighbours. Peak memory of ours
is taken in processes of its own (see peak_memory) and compared with 1.2 times weights and cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gear_engine import Engine, SamplingParams
from gear_engine.bench import peak_memory, timing
from gear_engine.bench.inputs import generator_config, generator_weights, official_generator
from gear_engine.bench.registry import Context, Skip
from gear_engine.bench.step_costs import CFG_SCALE, RATE_DTYPES, share_outside, step_bytes, step_ops
from gear_engine.models.condition import class_rows
from gear_engine.models.weights import GeneratorWeights
from gear_engine.runner import decode_step, prefill


@dataclass
class Case:
    """One number of images: the engines, the official callables and what they drew."""

    engines: dict[str, Engine]
    calls: dict[str, Callable[[], torch.Tensor]]
    labels: list[int]
    tokens: int
    #: contestant -> seconds of its first call, in which it was compiled
    prepare_seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        weights: GeneratorWeights,
        images: int,
        tokens: int,
        seed: int,
        official: Path | None,
        *,
        compiled: bool = False,
    ) -> Case:
        rng = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, weights.config.num_classes, (images,), generator=rng).tolist()
        engines = {
            name: Engine(weights, max_images=images, dtype=dtype, weight_format=kind, max_new_tokens=tokens)
            for name, (dtype, kind) in peak_memory.FORMATS.items()
        }
        prepare_seconds = {name: timing.seconds(partial(engine.warm_up, "torch")) for name, engine in engines.items()}
        params = SamplingParams(cfg_scale=CFG_SCALE)

        def ours(engine: Engine) -> Callable[[], torch.Tensor]:
            return lambda: engine.generate(labels, params, rng="torch", max_new_tokens=tokens)

        calls = {f"gear_engine {name}": ours(engine) for name, engine in engines.items()}
        if official is not None:
            bf16 = weights.to(dtype=torch.bfloat16)
            calls["official"] = official_rollout(weights, labels, tokens, official)
            calls["official bf16"] = official_rollout(bf16, labels, tokens, official)
            if compiled:
                name = "official bf16 compiled"
                calls[name] = official_rollout(bf16, labels, tokens, official, compiled=True)
                prepare_seconds[name] = timing.seconds(calls[name])
        return cls(engines, calls, labels, tokens, prepare_seconds)


def official_rollout(
    weights: GeneratorWeights, labels: list[int], tokens: int, checkout: Path, *, compiled: bool = False
) -> Callable[[], torch.Tensor]:
    """The official ``generate``; ``compiled`` compiles the model as the LlamaGen sampling program does.

    There each phase is one full graph, under CUDA graphs on a GPU. The first call compiles; shapes are static, since
    what was compiled for another number of images is dropped.
    """
    try:
        model, module = official_generator(Context(weights.device, official=checkout), weights)
    except Skip as reason:
        sys.exit(str(reason))
    cond = torch.tensor(labels, device=weights.device)
    if compiled:
        torch._dynamo.reset()
        mode = "reduce-overhead" if cond.device.type == "cuda" else "default"
        model = torch.compile(model, mode=mode, fullgraph=True)

    def call(count: int = tokens) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = module.generate(model, cond, count, cfg_scale=CFG_SCALE)
        return out

    if not compiled:
        call(2)  # starts threads, touches memory
    return call


@torch.inference_mode()
def guided_logits(engine: Engine, labels: list[int], drawn: torch.Tensor, cfg_scale: float = CFG_SCALE) -> torch.Tensor:
    """fp32 (T, B, V): guided logits along the given tokens (B, T)."""
    images = len(labels)
    slots = torch.arange(2 * images)
    starts = class_rows(torch.tensor([*labels, *[engine.config.num_classes] * images]))
    logits = prefill(engine.weights, engine.ops, engine.cache, slots, starts)
    steps = []
    for position in range(drawn.shape[1]):
        cond, uncond = logits.chunk(2)
        steps.append(uncond + (cond - uncond) * cfg_scale)
        fed = drawn[:, position].long().repeat(2)
        where = torch.full((2 * images,), position)
        logits = decode_step(engine.weights, engine.ops, engine.cache, slots, where, fed, first_slot=0)
    return torch.stack(steps)


def divergence_of(logits: torch.Tensor, exact: torch.Tensor, noise: torch.Tensor) -> dict[str, float]:
    """Mean KL(exact || logits) and the share of equal draws under the same noise."""
    divergence = (exact.softmax(-1) * (exact.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    equal = (logits.softmax(-1) / noise).argmax(-1) == (exact.softmax(-1) / noise).argmax(-1)
    return {"kl": float(divergence.mean()), "equal_tokens_%": 100 * float(equal.float().mean())}


def quality(
    engines: dict[str, Engine], labels: list[int], drawn: torch.Tensor, seed: int, cfg_scale: float = CFG_SCALE
) -> dict[str, dict[str, float]]:
    """Error of every format against fp32, along the tokens (B, T) that fp32 drew."""
    exact = guided_logits(engines["fp32"], labels, drawn, cfg_scale)
    noise = torch.empty_like(exact).exponential_(1, generator=torch.Generator().manual_seed(seed))
    found = {}
    for name, engine in engines.items():
        logits = exact if name == "fp32" else guided_logits(engine, labels, drawn, cfg_scale)
        found[name] = divergence_of(logits, exact, noise)
    return found


@dataclass
class Samples:
    """Per round, one rollout's wall seconds and processor seconds of all threads (waiting ones spin on both sides)."""

    wall: list[float]
    processor: list[float]


def measure(case: Case, rounds: int, seed: int) -> tuple[dict[str, Samples], dict[str, torch.Tensor]]:
    """Samples of every contestant, in turn, and the tokens of the last round."""
    samples = {name: Samples([], []) for name in case.calls}
    drawn: dict[str, torch.Tensor] = {}
    for _ in range(rounds):
        for name, call in case.calls.items():
            torch.manual_seed(seed)
            start, processor = time.perf_counter(), time.process_time()
            drawn[name] = call()
            samples[name].processor.append(time.process_time() - processor)
            samples[name].wall.append(time.perf_counter() - start)
    return samples, drawn


def rows_of(
    case: Case, rounds: int, seed: int, ceilings: timing.Ceilings
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The table of one case, and what was checked."""
    case.engines["int8"].generate(case.labels, max_new_tokens=min(4, case.tokens))  # starts threads, touches memory
    samples, drawn = measure(case, rounds, seed)
    errors = quality(case.engines, case.labels, drawn["gear_engine fp32"], seed)
    images = len(case.labels)
    none = Samples([float("nan")], [float("nan")])
    official = samples.get("official", none)
    rows = []
    for name, seconds in samples.items():
        summary = timing.statistics([value / case.tokens for value in seconds.wall])
        best = 1e3 * min(seconds.wall) / case.tokens
        spread = {key: summary[key] for key in ("runs", "median_ms", "p10_ms", "p90_ms")}
        row = {"images": images, "what": name, **spread, "best_ms": best}
        row["processor_ms"] = 1e3 * min(seconds.processor) / case.tokens
        row["x official"] = statistics.median(official.wall) / statistics.median(seconds.wall)
        row["x best"] = min(official.wall) / min(seconds.wall)
        row["x processor"] = min(official.processor) / min(seconds.processor)
        format_ = name.removeprefix("gear_engine ")
        if name != format_:
            engine = case.engines[format_]
            reached = step_bytes(engine, images, case.tokens) / (best / 1e3)
            multiplied = step_ops(engine.config, images, case.tokens) / (best / 1e3)
            row |= {
                "of_read_%": 100 * reached / ceilings.read_bandwidth,
                "of_rate_%": 100 * multiplied / ceilings.rate(RATE_DTYPES[format_]),
                "outside_torch_%": share_outside(engine, case.labels, case.tokens, "torch"),
                "outside_philox_%": share_outside(engine, case.labels, case.tokens, "philox"),
                **errors[format_],
            }
        else:
            row |= dict.fromkeys(("of_read_%", "of_rate_%", "outside_torch_%", "outside_philox_%", "kl"))
            row["equal_tokens_%"] = None
        rows.append(row)
    checks: dict[str, Any] = {"images": images, "prepare_s": case.prepare_seconds}
    if "official" in drawn:
        equal = drawn["official"].cpu() == drawn["gear_engine fp32"]
        checks |= {"equal_images": int(equal.all(1).sum()), "equal_tokens_%": 100 * float(equal.float().mean())}
    return rows, checks


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gear_engine.bench.rollout", description=__doc__)
    parser.add_argument("--official", type=Path, help="checkout of the official GEAR code")
    parser.add_argument("--model", default="LlamaGen-B", help="a class-conditional preset")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compiled", action="store_true", help="also the official code in bf16 with torch.compile")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    options = parser.parse_args(arguments)
    config = generator_config(options.model)
    weights = generator_weights(config, options.seed, torch.device("cpu"))
    before = timing.measure_ceilings(dtypes=timing.RATE_ORDER)
    rows, checks, memory = [], [], []
    for images in options.images:
        case = Case.build(weights, images, options.tokens, options.seed, options.official, compiled=options.compiled)
        found, checked = rows_of(case, options.rounds, options.seed, before)
        after = timing.measure_ceilings(dtypes=timing.RATE_ORDER)
        print(f"{options.model}, {images} images, {options.tokens} tokens, guidance {CFG_SCALE}, random weights\n"
              f"before: {before}\nafter:  {after}\nms per step:")  # fmt: skip
        print(timing.render(found), f"\n{checked}\n", flush=True)
        rows += found
        checks.append({**checked, "before": before.record(), "after": after.record()})
        before = after
        if not options.no_memory:
            found = [peak_memory.measure(options.model, name, images, options.tokens) for name in peak_memory.FORMATS]
            print(timing.render(peak_memory.table(found)), "\n", flush=True)
            memory += found
    if options.json:
        settings = {"model": options.model, "tokens": options.tokens, "cfg_scale": CFG_SCALE, "seed": options.seed}
        record = {"settings": settings, "rows": rows, "checks": checks, "memory": memory}
        timing.write_json(options.json, {**timing.provenance(), **record})


if __name__ == "__main__":
    main()
