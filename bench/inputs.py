"""Random operands, weights and models for benchmarks; the official peer with the same weights."""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from gear_engine.bench.counts import Counts
from gear_engine.bench.registry import Check, Context, Implementation, Skip, Work
from gear_engine.config import GENERATOR_PRESETS, TOKENIZER_PRESETS, GeneratorConfig
from gear_engine.errors import InvalidRequestError
from gear_engine.models.weights import GeneratorWeights, expected_shapes
from gear_engine.ops import backends
from gear_engine.tokenizers import Tokenizer, build_tokenizer

__all__ = [
    "TORCH_DTYPES", "generator_config", "generator_weights", "largest_error", "official_generator", "official_sampler",
    "official_tokenizer", "own_backends", "share_unequal", "tokenizer",
]  # fmt: skip

#: dtype field -> (dtype of activations, kind of packed weights or None).
TORCH_DTYPES: dict[str, tuple[torch.dtype, Any]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "bf16-packed": (torch.float32, "bf16"),
    "int8-packed": (torch.float32, "int8"),
}
#: Which multiply rate bounds work of a dtype field.
RATE = {"fp32": "fp32", "bf16": "bf16", "fp16": "bf16", "bf16-packed": "bf16", "int8-packed": "int8"}
#: Largest accepted error of an output against the fp32 reference, max|a - b| / max|b|.
BOUND = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3, "bf16-packed": 2e-2, "int8-packed": 5e-2}


def check_dtype(name: str) -> str:
    if name not in TORCH_DTYPES:
        raise InvalidRequestError(f"dtype {name!r} is not one of {', '.join(TORCH_DTYPES)}")
    return name


def generator_config(model: str) -> GeneratorConfig:
    """The class-conditional generator of that name."""
    if model not in GENERATOR_PRESETS:
        raise InvalidRequestError(f"there is no model {model!r}; there are {', '.join(GENERATOR_PRESETS)}")
    config = GENERATOR_PRESETS[model]
    if config.conditioning != "class":
        raise InvalidRequestError(f"{model} is conditioned on text; benchmarks run class-conditional models")
    return config


@functools.lru_cache(maxsize=1)
def generator_weights(
    config: GeneratorConfig, seed: int, device: torch.device, dtype: torch.dtype | None = None, pack: Any = None
) -> GeneratorWeights:
    """Random weights; matrices of variance 1 / in, so that activations keep their size.

    They are fp32, or made so and converted one by one to ``dtype`` and ``pack`` (``"bf16"`` or ``"int8"``).
    """
    rng = torch.Generator(device).manual_seed(seed)
    shapes = expected_shapes(config)
    reused = torch.empty(0, device=device)

    def draw(name: str) -> torch.Tensor:
        nonlocal reused
        shape = shapes[name]
        if dtype in (None, torch.float32):
            tensor = torch.empty(shape, device=device)
        else:
            size = math.prod(shape)
            # A name that is asked for later is no larger.
            if not size <= reused.numel() <= 2 * size + 4096:
                reused = torch.empty(0, device=device)
                reused = torch.empty(size, device=device)
            tensor = reused[:size].view(shape)
        if len(shape) == 1:
            return tensor.fill_(1.0)
        return tensor.normal_(std=1.0 if "embedding" in name else shape[-1] ** -0.5, generator=rng)

    if dtype is not None:
        return GeneratorWeights.stream(config, draw, dtype=dtype, pack_kind=pack)
    return GeneratorWeights.from_state_dict(config, {name: draw(name) for name in shapes})


@functools.lru_cache(maxsize=1)
def tokenizer(name: str, seed: int, device: torch.device) -> Tokenizer:
    """A tokenizer with torch's default initialisation."""
    if name not in TOKENIZER_PRESETS:
        raise InvalidRequestError(f"there is no tokenizer {name!r}; there are {', '.join(TOKENIZER_PRESETS)}")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return build_tokenizer(TOKENIZER_PRESETS[name]).to(device).eval().requires_grad_(False)


def own_backends(op: str, dtype: torch.dtype, context: Context) -> tuple[list[str], dict[str, str]]:
    """Backends of ``op`` to measure, resolved, without the reference; and those that cannot run, with the reason."""
    names: list[str] = []
    skipped: dict[str, str] = {}
    for asked in context.backends:
        if asked == "auto":
            name = backends.resolve(op, context.device, dtype).backend
            if name == "reference":
                # The engine would run plain torch: that is measured as the reference; why is not to be lost.
                for preferred in backends.PREFERENCE.get(context.device.type, ()):
                    found = backends.implementations(op).get(preferred)
                    reason = None if found is None else found.why_not(context.device, dtype)
                    if reason is not None:
                        skipped[preferred] = reason
        elif asked not in backends.implementations(op):
            skipped[asked] = f"op {op} has no backend {asked!r}"
            continue
        else:
            name = asked
            reason = backends.implementations(op)[asked].why_not(context.device, dtype)
            if reason is not None:
                skipped[asked] = reason
                continue
        if name != "reference" and name not in names:
            names.append(name)
    return names, skipped


def compiled(reference: Implementation, context: Context) -> list[Implementation]:
    """torch.compile of the reference, if that peer was asked for."""
    if "compiled" not in context.peers:
        return []
    return [Implementation("compiled", "peer", torch.compile(reference.call, dynamic=False))]


def op_work(
    op: str,
    dtype: torch.dtype,
    run: Callable[[Callable[..., Any]], Callable[[int], Any]],
    context: Context,
    counted: Counts,
    items: tuple[float, str],
    copies: int,
    check: tuple[Callable[[Any, Any], float], float, str],
) -> Work:
    """The usual work of an op: its backends, the reference and its compiled form on the same operands.

    Args:
        run: takes an implementation of the op and returns ``call(i)``, which has buffers of its own to write to.
        check: (error, bound, measure) as in :class:`~gear_engine.bench.registry.Check`.
    """
    found = backends.implementations(op)
    names, skipped = own_backends(op, dtype, context)
    implementations = [Implementation(name, "engine", run(found[name].load())) for name in names]
    reference = Implementation("reference", "reference", run(found["reference"].load()))
    if "reference" in context.peers:
        implementations += [reference, *compiled(reference, context)]
    return Work(
        implementations, counted, "fp32", *items, copies=copies, check=Check(reference.call, *check), skipped=skipped
    )


def largest_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """max|a - b| / max|b|."""
    output, reference = output.double(), reference.double()
    return float((output - reference).abs().max() / reference.abs().max())


def share_unequal(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Share of the elements that differ."""
    return float((output != reference).double().mean())


@contextmanager
def _importable(checkout: Path) -> Iterator[None]:
    sys.path.insert(0, str(checkout))
    try:
        yield
    finally:
        sys.path.remove(str(checkout))


def _official(checkout: Path | None, module: str) -> ModuleType:
    """A module of the official checkout, imported in this process.

    Raises:
        InvalidRequestError: the folder is no checkout of the official code.
        Skip: it cannot be imported here; the message names what is missing.
    """
    if checkout is None:
        raise Skip("needs --official with a checkout of the official code")
    if not (checkout / "models" / "llamagen.py").is_file():
        raise InvalidRequestError("--official needs a checkout of Tencent-Hunyuan/GEAR (it has models/llamagen.py)")
    with _importable(checkout):
        try:
            return importlib.import_module(module)
        except ImportError as error:
            raise Skip(f"the official code cannot be imported: {error}") from error


def official_generator(context: Context, weights: GeneratorWeights) -> tuple[Any, Any]:
    """(the official generator module with ``weights``, its ``models.generate`` module)."""
    llamagen = _official(context.official, "models.llamagen")
    config = weights.config
    model = llamagen.Transformer(
        llamagen.ModelArgs(
            dim=config.dim, n_layer=config.n_layer, n_head=config.n_head, vocab_size=config.vocab_size,
            block_size=config.block_size, num_classes=config.num_classes, cls_token_num=1,
        )
    )  # fmt: skip
    names = list(expected_shapes(config))
    # Copies, as in a process of its own: an engine may move the weights that it reads in place into large pages.
    state = {name: weight.clone() for name, weight in zip(names, _in_order(weights, names), strict=True)}
    model.load_state_dict(state, strict=False, assign=True)
    missing = set(dict(model.named_parameters())) - set(state)
    if missing:
        raise Skip(f"the official model has weights that ours has not: {', '.join(sorted(missing))}")
    return model.to(context.device).eval().requires_grad_(False), _official(context.official, "models.generate")


def official_sampler(context: Context) -> Any:
    """The official ``sample(logits [B, T, V], temperature, top_k, top_p)``."""
    return _official(context.official, "models.generate").sample


def _in_order(weights: GeneratorWeights, names: list[str]) -> Iterator[Any]:
    """The tensors of ``weights`` by official name."""
    top = {
        "tok_embeddings.weight": weights.tok_embeddings,
        "norm.weight": weights.norm,
        "output.weight": weights.output,
        "cls_embedding.embedding_table.weight": weights.label_table,
    }
    for name in names:
        if name in top:
            yield top[name]
            continue
        _, layer, *rest = name.split(".")
        yield getattr(weights.blocks[int(layer)], rest[-2])


def official_tokenizer(context: Context, name: str, ours: Tokenizer) -> Any:
    """The official tokenizer of that name with the weights of ``ours``."""
    models = _official(context.official, "models")
    if name not in models.Tokenizers:
        raise Skip(f"the official code has no tokenizer {name}")
    module = models.Tokenizers[name]()
    module.load_state_dict(ours.state_dict(), strict=False)
    return module.to(context.device).eval().requires_grad_(False)
