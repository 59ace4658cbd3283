"""The rollout of an image's tokens, and where its time goes."""

from __future__ import annotations

import functools
from typing import Any

import torch

from gear_engine import Engine, SamplingParams
from gear_engine.bench import counts
from gear_engine.bench.breakdown import breakdown, rollout_counts
from gear_engine.bench.inputs import RATE, official_generator, share_unequal
from gear_engine.bench.registry import Benchmark, Check, Context, Implementation, Work, register
from gear_engine.bench.suite_models import add_official, capture_of, config_of, engines_of, labels_of, role_of
from gear_engine.errors import InvalidRequestError
from gear_engine.models.condition import class_rows
from gear_engine.models.weights import GeneratorWeights
from gear_engine.ops import GeneratorOps
from gear_engine.ops.sample_tokens import SamplingTable
from gear_engine.runner import decode_step, prefill

CFG_SCALE = 4.0


def _rollout(params: dict[str, Any], context: Context) -> Work:
    config = config_of(params)
    total, images = params["tokens"], params["images"]
    if not 1 <= total <= config.block_size:
        raise InvalidRequestError(f"tokens {total} must lie in [1, {config.block_size}]")
    engines, skipped = engines_of(params, total, context)
    labels = labels_of(params, context)
    settings = SamplingParams(cfg_scale=CFG_SCALE if params["guided"] else 1.0)

    def run(engine: Engine) -> Any:
        return lambda index: engine.generate(labels, settings, rng="philox", max_new_tokens=total)

    calls = {name: run(engine) for name, engine in engines.items()}
    implementations = [Implementation(name, role_of(name), call) for name, call in calls.items()]
    check = None
    if "reference" in calls and params["dtype"] == "fp32":
        check = Check(calls["reference"], share_unequal, 0.0, "share of tokens that differ")
    make = functools.partial(_official, labels, total, settings)
    add_official(implementations, skipped, params, context, make)
    expected = rollout_counts(config, images, total, params["dtype"], guided=params["guided"])
    parts = {
        name: breakdown(engine, expected, functools.partial(_plain, engine, labels, settings, total))
        for name, engine in engines.items()
    }
    return Work(
        implementations,
        counts.rollout(config, images, total, params["dtype"], guided=params["guided"]),
        RATE[params["dtype"]],
        images,
        "image",
        check=check,
        breakdown=parts,
        capture=capture_of(engines),
        skipped=skipped,
    )


def _official(
    labels: list[int], total: int, settings: SamplingParams, context: Context, weights: GeneratorWeights
) -> Implementation:
    model, generate = official_generator(context, weights)
    condition = torch.tensor(labels, device=context.device)

    def call(index: int) -> Any:
        # In a tuple: it draws from torch's generator, so its tokens are not to be held against Philox's.
        return (generate.generate(model, condition, total, cfg_scale=settings.cfg_scale),)

    return Implementation("official", "peer", call)


def _plain(engine: Engine, labels: list[int], settings: SamplingParams, total: int, ops: GeneratorOps) -> Any:
    """A call that makes the rollout's passes with ``ops``, all images in step and without the scheduler."""
    config, device = engine.config, engine.device
    guided = settings.cfg_scale > 1
    table = SamplingTable.build([settings] * len(labels), [guided] * len(labels), config.vocab_size, device)
    seeds = torch.arange(len(labels), device=device)
    conditions = torch.tensor(labels, device=device)
    if guided:
        conditions = torch.cat((conditions, torch.full_like(conditions, config.num_classes)))
    slots = torch.arange(len(conditions), device=device)

    def call(index: int) -> None:
        with torch.inference_mode():
            logits = prefill(engine.weights, ops, engine.cache, slots, class_rows(conditions))
            for token in range(total):
                positions = torch.full_like(seeds, token)
                drawn = ops.sample_tokens(logits, table, noise=None, seeds=seeds, positions=positions)
                if token + 1 < total:
                    fed = drawn.repeat(len(slots) // len(labels))
                    where = torch.full_like(slots, token)
                    logits = decode_step(
                        engine.weights, ops, engine.cache, slots, where, fed, first_slot=0, position=token
                    )

    return call


_B = ("LlamaGen-B",)
_ALL_MODELS = ("LlamaGen-S", "LlamaGen-B", "LlamaGen-L", "LlamaGen-XL", "LlamaGen-XXL", "LlamaGen-XXXL")
_DTYPES = ("fp32", "bf16", "bf16-packed", "int8-packed")


def _rollouts(**values: Any) -> dict[str, Any]:
    """A grid of rollouts: the values that differ from the usual ones."""
    usual = {"model": _B, "images": (1,), "pixels": (256,), "guided": (True,), "dtype": _DTYPES, "tokens": (256,)}
    return {**usual, **values}


register(
    Benchmark(
        "rollout",
        "all image tokens from labels, draws included",
        _rollout,
        {
            "quick": [_rollouts(dtype=("fp32", "int8-packed"), tokens=(8,))],
            "standard": [_rollouts(images=(1, 8), dtype=("fp32", "bf16", "int8-packed"))],
            "full": [
                _rollouts(model=_ALL_MODELS, images=(1, 2, 4, 8, 16, 32, 64), guided=(True, False)),
                _rollouts(model=_ALL_MODELS, images=(1, 8), pixels=(384,), tokens=(576,)),
                _rollouts(model=_ALL_MODELS, images=(1, 8), pixels=(512,), tokens=(1024,)),
            ],
        },
    )
)
