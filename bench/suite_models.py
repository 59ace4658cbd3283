"""The generator as a whole: prefill, one decode step, the rollout of an image's tokens."""

from __future__ import annotations

import functools
from typing import Any

import torch

from gear_engine import Engine, SamplingParams
from gear_engine.bench import counts
from gear_engine.bench.breakdown import step_breakdown
from gear_engine.bench.inputs import (
    BOUND,
    RATE,
    TORCH_DTYPES,
    check_dtype,
    generator_config,
    generator_weights,
    largest_error,
    official_generator,
    own_backends,
    share_unequal,
)
from gear_engine.bench.registry import Benchmark, Check, Context, Implementation, Skip, Work, register
from gear_engine.errors import InvalidRequestError
from gear_engine.models.condition import class_rows
from gear_engine.runner import decode_step, prefill

CFG_SCALE = 4.0


@functools.lru_cache(maxsize=3)
def _engine(model: str, images: int, dtype: str, backend: str, tokens: int, context: Context) -> Engine:
    config = generator_config(model)
    torch_dtype, kind = TORCH_DTYPES[dtype]
    weights = generator_weights(config, context.seed, context.device)
    return Engine(
        weights, max_images=images, dtype=torch_dtype, backend=backend, max_new_tokens=tokens, weight_format=kind
    )


def _engines(params: dict[str, Any], tokens: int, context: Context) -> tuple[dict[str, Engine], dict[str, str]]:
    """Name -> engine for every backend asked for and, unless the weights are packed, the reference."""
    dtype, kind = TORCH_DTYPES[check_dtype(params["dtype"])]
    if params["images"] < 1:
        raise InvalidRequestError(f"images must be at least 1, got {params['images']}")
    names, skipped = own_backends("skinny_linear", dtype, context)
    if kind is None and "reference" in context.peers:
        names.append("reference")
    make = functools.partial(_engine, params["model"], params["images"], params["dtype"])
    # An engine that follows "auto" mixes backends where one lacks an op; its name is that of its linear layers.
    followed = "auto" in context.backends
    return {
        name: make("auto" if followed and name != "reference" else name, tokens, context) for name in names
    }, skipped


def _role(name: str) -> str:
    return "reference" if name == "reference" else "engine"


def _rows(engine: Engine, params: dict[str, Any]) -> torch.Tensor:
    return torch.arange(params["images"] * (2 if params["guided"] else 1), device=engine.device)


def _labels(params: dict[str, Any], context: Context) -> list[int]:
    config = generator_config(params["model"])
    rng = torch.Generator().manual_seed(context.seed)
    return torch.randint(0, config.num_classes, (params["images"],), generator=rng).tolist()


def _prefill(params: dict[str, Any], context: Context) -> Work:
    config = generator_config(params["model"])
    engines, skipped = _engines(params, 8, context)
    labels = torch.tensor(_labels(params, context), device=context.device)
    if params["guided"]:
        labels = torch.cat((labels, torch.full_like(labels, config.num_classes)))

    def run(engine: Engine) -> Any:
        slots = _rows(engine, params)

        def call(index: int) -> torch.Tensor:
            with torch.inference_mode():
                return prefill(engine.weights, engine.ops, engine.cache, slots, class_rows(labels))

        return call

    calls = {name: run(engine) for name, engine in engines.items()}
    check = None
    if "reference" in calls:
        check = Check(calls["reference"], largest_error, 5 * BOUND[params["dtype"]], "max|a-b|/max|b| of the logits")
    return Work(
        [Implementation(name, _role(name), call) for name, call in calls.items()],
        counts.prefill(config, len(labels), params["dtype"]),
        RATE[params["dtype"]],
        params["images"],
        "image",
        check=check,
        skipped=skipped,
    )


def _random_cache(engine: Engine, context: Context) -> None:
    """Random keys and values, the same in every engine of a case."""
    shape = engine.cache.kv.shape
    noise = torch.randn(shape, generator=context.generator(1), device=context.device)
    engine.cache.kv.copy_(noise)
    engine.cache.kv[:, 0, :, :, 0] = 0
    engine.cache.prefix_bias.zero_()


def _step(params: dict[str, Any], context: Context) -> Work:
    config = generator_config(params["model"])
    position = params["position"]
    if not 0 <= position < config.block_size:
        raise InvalidRequestError(f"position {position} must lie in [0, {config.block_size})")
    engines, skipped = _engines(params, config.block_size, context)
    rows = params["images"] * (2 if params["guided"] else 1)
    tokens = torch.randint(0, config.vocab_size, (rows,), generator=context.generator(2), device=context.device)

    def run(engine: Engine, ops: Any) -> Any:
        slots = _rows(engine, params)
        positions = torch.full_like(slots, position)

        def call(index: int) -> torch.Tensor:
            with torch.inference_mode():
                return decode_step(
                    engine.weights, ops, engine.cache, slots, positions, tokens, first_slot=0, position=position
                )

        return call

    implementations, breakdown, check = [], {}, None
    for name, engine in engines.items():
        _random_cache(engine, context)
        call = run(engine, engine.ops)
        implementations.append(Implementation(name, _role(name), call))
        breakdown[name] = step_breakdown(engine, rows, position, params["dtype"], functools.partial(run, engine))
        if name == "reference":
            check = Check(call, largest_error, 5 * BOUND[params["dtype"]], "max|a-b|/max|b| of the logits")
            if "compiled" in context.peers:
                implementations.append(Implementation("compiled", "peer", torch.compile(call, dynamic=False)))
    if "official" in context.peers and params["dtype"] in ("fp32", "bf16"):
        try:
            implementations.append(_official_step(params, rows, tokens, context))
        except Skip as reason:
            skipped["official"] = str(reason)
    return Work(
        implementations,
        counts.decode_step(config, rows, position, params["dtype"]),
        RATE[params["dtype"]],
        params["images"],
        "token",
        check=check,
        breakdown=breakdown,
        skipped=skipped,
    )


def _official_step(params: dict[str, Any], rows: int, tokens: torch.Tensor, context: Context) -> Implementation:
    """The official module's own forward of one token, its caches set up as its sampler does."""
    config = generator_config(params["model"])
    dtype, _ = TORCH_DTYPES[params["dtype"]]
    model, _ = official_generator(context, generator_weights(config, context.seed, context.device).to(dtype=dtype))
    with context.device:
        model.setup_caches(max_batch_size=rows, max_seq_length=1 + config.block_size, dtype=dtype)
    where = torch.tensor([1 + params["position"]], device=context.device)

    def call(index: int) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(tokens[:, None], cond_idx=None, input_pos=where)
            return logits

    return Implementation("official", "peer", call)


def _rollout(params: dict[str, Any], context: Context) -> Work:
    config = generator_config(params["model"])
    total, images = params["tokens"], params["images"]
    if not 1 <= total <= config.block_size:
        raise InvalidRequestError(f"tokens {total} must lie in [1, {config.block_size}]")
    engines, skipped = _engines(params, total, context)
    labels = _labels(params, context)
    settings = SamplingParams(cfg_scale=CFG_SCALE if params["guided"] else 1.0)

    def run(engine: Engine) -> Any:
        return lambda index: engine.generate(labels, settings, rng="philox", max_new_tokens=total)

    calls = {name: run(engine) for name, engine in engines.items()}
    implementations = [Implementation(name, _role(name), call) for name, call in calls.items()]
    check = None
    if "reference" in calls and params["dtype"] == "fp32":
        check = Check(calls["reference"], share_unequal, 0.0, "share of tokens that differ")
    if "official" in context.peers and params["dtype"] in ("fp32", "bf16"):
        dtype, _ = TORCH_DTYPES[params["dtype"]]
        try:
            weights = generator_weights(config, context.seed, context.device).to(dtype=dtype)
            model, generate = official_generator(context, weights)
            condition = torch.tensor(labels, device=context.device)

            def official(index: int) -> Any:
                # In a tuple: it draws from torch's generator, so its tokens are not to be held against Philox's.
                return (generate.generate(model, condition, total, cfg_scale=settings.cfg_scale),)

            implementations.append(Implementation("official", "peer", official))
        except Skip as reason:
            skipped["official"] = str(reason)
    return Work(
        implementations,
        counts.rollout(config, images, total, params["dtype"], guided=params["guided"]),
        RATE[params["dtype"]],
        images,
        "image",
        check=check,
        skipped=skipped,
    )


_B = ("LlamaGen-B",)
_ALL_MODELS = ("LlamaGen-S", "LlamaGen-B", "LlamaGen-L", "LlamaGen-XL", "LlamaGen-XXL", "LlamaGen-XXXL")
_DTYPES = ("fp32", "bf16", "bf16-packed", "int8-packed")
_IMAGES = (1, 2, 4, 8, 16, 32, 64)
_FULL: dict[str, Any] = {"model": _ALL_MODELS, "images": _IMAGES, "guided": (True, False), "dtype": _DTYPES}

register(
    Benchmark(
        "prefill",
        "the class label through the model: first logits and the cache's prefix entry",
        _prefill,
        {
            "quick": [{"model": _B, "images": (1,), "guided": (True,), "dtype": ("fp32",)}],
            "standard": [{"model": _B, "images": (1, 8), "guided": (True,), "dtype": ("fp32", "bf16", "int8-packed")}],
            "full": [_FULL],
        },
    )
)
register(
    Benchmark(
        "decode_step",
        "one image token per row through the model",
        _step,
        {
            "quick": [
                {"model": _B, "images": (1, 4, 8), "guided": (True,), "dtype": ("fp32",), "position": (127,)},
                {"model": _B, "images": (1, 8), "guided": (True,), "dtype": ("int8-packed",), "position": (127,)},
            ],
            "standard": [
                {"model": _B, "images": (1, 2, 4, 8), "guided": (True,), "dtype": _DTYPES, "position": (127,)}
            ],
            "full": [{**_FULL, "position": (127,)}],
        },
    )
)
register(
    Benchmark(
        "rollout",
        "all image tokens from labels, draws included",
        _rollout,
        {
            "quick": [
                {"model": _B, "images": (1,), "guided": (True,), "dtype": ("fp32", "int8-packed"), "tokens": (8,)}
            ],
            "standard": [
                {
                    "model": _B,
                    "images": (1, 8),
                    "guided": (True,),
                    "dtype": ("fp32", "bf16", "int8-packed"),
                    "tokens": (256,),
                }
            ],
            "full": [{**_FULL, "tokens": (256,)}],
        },
    )
)
