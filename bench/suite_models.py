"""The generator as a whole: prefill and one decode step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from gear_engine import Engine
from gear_engine.bench import counts
from gear_engine.bench.breakdown import breakdown, step_counts
from gear_engine.bench.inputs import (
    BOUND,
    RATE,
    TORCH_DTYPES,
    check_dtype,
    compiled,
    generator_config,
    generator_weights,
    largest_error,
    official_generator,
    own_backends,
)
from gear_engine.bench.registry import Benchmark, Check, Context, Implementation, Skip, Work, register
from gear_engine.config import GeneratorConfig
from gear_engine.cuda_graph import CaptureCost
from gear_engine.errors import InvalidRequestError
from gear_engine.models.condition import class_rows
from gear_engine.models.weights import GeneratorWeights
from gear_engine.runner import decode_step, prefill

__all__ = ["add_official", "capture_of", "config_of", "engines_of", "labels_of", "role_of", "rows_of"]


@functools.lru_cache(maxsize=3)
def _engine(config: GeneratorConfig, images: int, dtype: str, backend: str, tokens: int, context: Context) -> Engine:
    torch_dtype, kind = TORCH_DTYPES[dtype]
    weights = generator_weights(config, context.seed, context.device)
    return Engine(
        weights, max_images=images, dtype=torch_dtype, backend=backend, max_new_tokens=tokens, weight_format=kind
    )


def config_of(params: dict[str, Any]) -> GeneratorConfig:
    """The generator of a case: its model at its resolution, 16 pixels per token along an edge."""
    config = generator_config(params["model"])
    pixels = params.get("pixels", 256)
    if pixels % 16:
        raise InvalidRequestError(f"pixels {pixels} must be a multiple of 16")
    return config.replace(block_size=(pixels // 16) ** 2)


def engines_of(params: dict[str, Any], tokens: int, context: Context) -> tuple[dict[str, Engine], dict[str, str]]:
    """Name -> engine for every backend asked for and, unless the weights are packed, the reference."""
    dtype, kind = TORCH_DTYPES[check_dtype(params["dtype"])]
    if params["images"] < 1:
        raise InvalidRequestError(f"images must be at least 1, got {params['images']}")
    names, skipped = own_backends("skinny_linear", dtype, context)
    if kind is None and "reference" in context.peers:
        names.append("reference")
    make = functools.partial(_engine, config_of(params), params["images"], params["dtype"])
    # An engine that follows "auto" mixes backends where one lacks an op; its name is that of its linear layers.
    followed = "auto" in context.backends
    return {
        name: make("auto" if followed and name != "reference" else name, tokens, context) for name in names
    }, skipped


def capture_of(engines: Mapping[str, Engine]) -> dict[str, Callable[[], CaptureCost]]:
    """Asks every engine what its captured graphs have taken."""
    return {name: lambda engine=engine: engine.capture_cost for name, engine in engines.items()}  # type: ignore[misc]


def role_of(name: str) -> str:
    return "reference" if name == "reference" else "engine"


def rows_of(engine: Engine, params: dict[str, Any]) -> torch.Tensor:
    return torch.arange(params["images"] * (2 if params["guided"] else 1), device=engine.device)


def labels_of(params: dict[str, Any], context: Context) -> list[int]:
    config = generator_config(params["model"])
    rng = torch.Generator().manual_seed(context.seed)
    return torch.randint(0, config.num_classes, (params["images"],), generator=rng).tolist()


def _prefill(params: dict[str, Any], context: Context) -> Work:
    config = generator_config(params["model"])
    engines, skipped = engines_of(params, 8, context)
    labels = torch.tensor(labels_of(params, context), device=context.device)
    if params["guided"]:
        labels = torch.cat((labels, torch.full_like(labels, config.num_classes)))

    def run(engine: Engine) -> Any:
        slots = rows_of(engine, params)

        def call(index: int) -> torch.Tensor:
            with torch.inference_mode():
                return prefill(engine.weights, engine.ops, engine.cache, slots, class_rows(labels))

        return call

    calls = {name: run(engine) for name, engine in engines.items()}
    implementations = [Implementation(name, role_of(name), call) for name, call in calls.items()]
    check = None
    if "reference" in calls:
        check = Check(calls["reference"], largest_error, 5 * BOUND[params["dtype"]], "max|a-b|/max|b| of the logits")
        implementations += compiled(implementations[-1], context)
    add_official(implementations, skipped, params, context, functools.partial(_official_prefill, params, labels))
    return Work(
        implementations,
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
    config = config_of(params)
    position = params["position"]
    if not 0 <= position < config.block_size:
        raise InvalidRequestError(f"position {position} must lie in [0, {config.block_size})")
    engines, skipped = engines_of(params, config.block_size, context)
    rows = params["images"] * (2 if params["guided"] else 1)
    tokens = torch.randint(0, config.vocab_size, (rows,), generator=context.generator(2), device=context.device)

    def run(engine: Engine, ops: Any) -> Any:
        slots = rows_of(engine, params)
        positions = torch.full_like(slots, position)

        def call(index: int) -> torch.Tensor:
            with torch.inference_mode():
                return decode_step(
                    engine.weights, ops, engine.cache, slots, positions, tokens, first_slot=0, position=position
                )

        return call

    implementations: list[Implementation] = []
    parts, check = {}, None
    for name, engine in engines.items():
        _random_cache(engine, context)
        call = run(engine, engine.ops)
        implementations.append(Implementation(name, role_of(name), call))
        parts[name] = breakdown(
            engine, step_counts(config, rows, position, params["dtype"]), functools.partial(run, engine)
        )
        if name == "reference":
            check = Check(call, largest_error, 5 * BOUND[params["dtype"]], "max|a-b|/max|b| of the logits")
            implementations += compiled(implementations[-1], context)
    add_official(implementations, skipped, params, context, functools.partial(_official_step, params, rows, tokens))
    return Work(
        implementations,
        counts.decode_step(config, rows, position, params["dtype"]),
        RATE[params["dtype"]],
        params["images"],
        "token",
        check=check,
        breakdown=parts,
        skipped=skipped,
    )


def add_official(
    implementations: list[Implementation],
    skipped: dict[str, str],
    params: dict[str, Any],
    context: Context,
    make: Callable[[Context, GeneratorWeights], Implementation],
) -> None:
    """The official peer with the case's weights, where it was asked for and has the dtype; or why it cannot run."""
    if "official" not in context.peers or params["dtype"] not in ("fp32", "bf16"):
        return
    weights = generator_weights(config_of(params), context.seed, context.device)
    try:
        implementations.append(make(context, weights.to(dtype=TORCH_DTYPES[params["dtype"]][0])))
    except Skip as reason:
        skipped["official"] = str(reason)


def _official_forward(params: dict[str, Any], rows: int, context: Context, weights: GeneratorWeights) -> Any:
    """The official module, its caches set up as its sampler does."""
    model, _ = official_generator(context, weights)
    dtype, _ = TORCH_DTYPES[params["dtype"]]
    with context.device:
        model.setup_caches(max_batch_size=rows, max_seq_length=1 + weights.config.block_size, dtype=dtype)
    return model


def _official_prefill(
    params: dict[str, Any], labels: torch.Tensor, context: Context, weights: GeneratorWeights
) -> Implementation:
    model = _official_forward(params, len(labels), context, weights)
    where = torch.zeros(1, dtype=torch.int64, device=context.device)

    def call(index: int) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(None, labels, where)
            return logits[:, -1].float()

    return Implementation("official", "peer", call)


def _official_step(
    params: dict[str, Any], rows: int, tokens: torch.Tensor, context: Context, weights: GeneratorWeights
) -> Implementation:
    model = _official_forward(params, rows, context, weights)
    where = torch.tensor([1 + params["position"]], device=context.device)

    def call(index: int) -> torch.Tensor:
        with torch.inference_mode():
            # [R, 1, V]: its cache holds other keys, so that its logits are not to be held against ours.
            logits: torch.Tensor = model(tokens[:, None], cond_idx=None, input_pos=where)
            return logits

    return Implementation("official", "peer", call)


_B = ("LlamaGen-B",)
_ALL_MODELS = ("LlamaGen-S", "LlamaGen-B", "LlamaGen-L", "LlamaGen-XL", "LlamaGen-XXL", "LlamaGen-XXXL")
_DTYPES = ("fp32", "bf16", "bf16-packed", "int8-packed")
_IMAGES = (1, 2, 4, 8, 16, 32, 64)
_FULL: dict[str, Any] = {"model": _ALL_MODELS, "images": _IMAGES, "guided": (True, False), "dtype": _DTYPES}


def _steps(**values: Any) -> dict[str, Any]:
    """A grid of decode steps: the values that differ from the usual ones."""
    usual = {"model": _B, "images": (1,), "pixels": (256,), "guided": (True,), "dtype": _DTYPES, "position": (127,)}
    return {**usual, **values}


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
                _steps(images=(1, 4, 8), dtype=("fp32",)),
                _steps(images=(1, 8), dtype=("int8-packed",)),
            ],
            "standard": [_steps(images=(1, 2, 4, 8)), _steps(images=(1,), pixels=(512,), position=(1023,))],
            "full": [
                _steps(**_FULL),
                _steps(model=_ALL_MODELS, images=(1, 8), pixels=(384, 512), position=(127, 575)),
            ],
        },
    )
)
