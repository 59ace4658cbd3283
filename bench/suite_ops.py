"""The generator's ops: linear layers, attention and sampling, one call each."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from gear_engine.bench import counts
from gear_engine.bench.inputs import (
    BOUND,
    RATE,
    TORCH_DTYPES,
    check_dtype,
    compiled,
    generator_config,
    largest_error,
    official_sampler,
    op_work,
    own_backends,
    share_unequal,
)
from gear_engine.bench.registry import Benchmark, Check, Context, Implementation, Skip, Work, register
from gear_engine.errors import InvalidRequestError
from gear_engine.models.rope import rope_table
from gear_engine.ops import backends
from gear_engine.ops.sample_tokens import SamplingTable
from gear_engine.ops.skinny_linear import pack
from gear_engine.request import SamplingParams

LAYERS = ("qkv", "attention-out", "swiglu", "ffn-out", "head")


def _linear(params: dict[str, Any], context: Context) -> Work:
    config = generator_config(params["model"])
    rows, layer = params["rows"], params["layer"]
    dtype, kind = TORCH_DTYPES[check_dtype(params["dtype"])]
    shapes = {
        "qkv": (config.dim, config.qkv_dim),
        "attention-out": (config.dim, config.dim),
        "swiglu": (config.dim, config.ffn_dim),
        "ffn-out": (config.ffn_dim, config.dim),
        "head": (config.dim, config.vocab_size),
    }
    if layer not in shapes:
        raise InvalidRequestError(f"layer {layer!r} is not one of {', '.join(LAYERS)}")
    in_features, out_features = shapes[layer]
    norm, gate, residual = layer in ("qkv", "swiglu", "head"), layer == "swiglu", layer in ("attention-out", "ffn-out")
    counted = counts.skinny_linear(
        rows, in_features, out_features, params["dtype"], norm=norm, gate=gate, residual=residual
    )
    copies = context.copies(counted.bytes)
    rng = context.generator()

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, device=context.device)

    weight = [draw(out_features, in_features) / in_features**0.5 for _ in range(2 if gate else 1)]
    first: list[Any] = [pack(w, kind) if kind else w.to(dtype) for w in weight]
    operands, plain = [], []
    for _ in range(copies):
        x = draw(rows, in_features).to(dtype)
        around: dict[str, Any] = {"norm_weight": 1 + 0.1 * draw(in_features).to(dtype)} if norm else {}
        if residual:
            around["residual"] = draw(rows, out_features).to(dtype)
        operands.append((x, copy.deepcopy(first), around))  # the same numbers at another place
        if kind:
            as_bf16 = {name: tensor.bfloat16() for name, tensor in around.items()}
            plain.append((x.bfloat16(), [w.bfloat16() for w in weight], as_bf16))

    def run(function: Any, of: list[Any]) -> Any:
        def call(index: int) -> torch.Tensor:
            x, weight, around = of[index]
            result: torch.Tensor = function(x, weight[0], gate=weight[1] if gate else None, **around)
            return result

        return call

    found = backends.implementations("skinny_linear")
    names, skipped = own_backends("skinny_linear", dtype, context)
    implementations = [Implementation(name, "engine", run(found[name].load(), operands)) for name in names]
    reference = found["reference"].load()
    if kind is None and "reference" in context.peers:
        implementations.append(Implementation("reference", "reference", run(reference, operands)))
        implementations += compiled(implementations[-1], context)
    elif kind is not None and "reference" in context.peers:
        # Torch has no product with packed weights; its smallest is bf16, and unpacking at each call would be no peer.
        implementations.append(Implementation("torch-bf16", "peer", run(reference, plain)))
    check = Check(run(reference, operands), largest_error, BOUND[params["dtype"]], "max|a-b|/max|b|")
    return Work(
        implementations, counted, RATE[params["dtype"]], rows, "row", copies=copies, check=check, skipped=skipped
    )


def _attention(params: dict[str, Any], context: Context) -> Work:
    config = generator_config(params["model"])
    rows, position = params["rows"], params["position"]
    dtype, kind = TORCH_DTYPES[check_dtype(params["dtype"])]
    if kind is not None:
        raise InvalidRequestError("decode_attention has no weights: dtype is fp32, bf16 or fp16")
    if not 0 <= position < config.block_size:
        raise InvalidRequestError(f"position {position} must lie in [0, {config.block_size})")
    counted = counts.decode_attention(rows, config.n_head, config.n_kv_head, config.head_dim, position, dtype.itemsize)
    copies = context.copies(counted.bytes)
    rng = context.generator()
    entries = -(-(config.block_size + 1) // 8) * 8
    shape = (copies, 2, rows, config.n_kv_head, entries, config.head_dim)
    cache = torch.randn(shape, generator=rng, device=context.device).to(dtype)
    cache[:, 0, :, :, 0] = 0  # the collapsed prefix has no key
    qkv = torch.randn(copies, rows, config.qkv_dim, generator=rng, device=context.device).to(dtype)
    bias = torch.zeros(rows, device=context.device)
    slots = torch.arange(rows, device=context.device)
    positions = torch.full((rows,), position, device=context.device)
    rope = rope_table(config, context.device)

    def run(function: Any) -> Any:
        def call(index: int) -> torch.Tensor:
            result: torch.Tensor = function(
                qkv[index], cache[index, 0], cache[index, 1], bias, slots, positions, rope, config.n_head,
                first_slot=0, position=position,
            )  # fmt: skip
            return result

        return call

    kind_of_check = (largest_error, BOUND[params["dtype"]], "max|a-b|/max|b|")
    return op_work("decode_attention", dtype, run, context, counted, (rows, "row"), copies, kind_of_check)


def _sampling(params: dict[str, Any], context: Context) -> Work:
    images, guided, vocab = params["images"], params["guided"], params["vocab"]
    settings = SamplingParams(cfg_scale=4.0 if guided else 1.0, top_k=params["top_k"], top_p=params["top_p"])
    table = SamplingTable.build([settings] * images, [guided] * images, vocab, context.device)
    counted = counts.sample_tokens(images, vocab, guided=guided)
    copies = context.copies(counted.bytes)
    rng = context.generator()
    logits = 2 * torch.randn(copies, table.rows, vocab, generator=rng, device=context.device)
    seeds = torch.arange(images, device=context.device)
    positions = torch.full((images,), 7, device=context.device)

    def run(function: Any) -> Any:
        def call(index: int) -> torch.Tensor:
            result: torch.Tensor = function(logits[index], table, noise=None, seeds=seeds, positions=positions)
            return result

        return call

    kind_of_check = (share_unequal, 0.0, "share of tokens that differ")
    work = op_work("sample_tokens", torch.float32, run, context, counted, (images, "image"), copies, kind_of_check)
    if "official" not in context.peers:
        return work
    try:
        sample = official_sampler(context)
    except Skip as reason:
        return replace(work, skipped={**work.skipped, "official": str(reason)})

    def official(index: int) -> Any:
        # In a tuple: it draws from torch's generator, so its tokens are not to be held against Philox's.
        rows = logits[index]
        combined = rows[images:] + (rows[:images] - rows[images:]) * settings.cfg_scale if guided else rows
        return (sample(combined[:, None], top_k=params["top_k"], top_p=params["top_p"])[0],)

    return replace(work, implementations=[*work.implementations, Implementation("official", "peer", official)])


def _exponential(params: dict[str, Any], context: Context) -> Work:
    images, vocab = params["images"], params["vocab"]
    counted = counts.torch_exponential(images, vocab)
    copies = context.copies(counted.bytes)

    def run(function: Any) -> Any:
        out = torch.empty(copies, images, vocab, device=context.device)
        generator = torch.Generator(context.device)

        def call(index: int) -> torch.Tensor:
            function(out[index], generator.manual_seed(index))
            return out[index]

        return call

    kind_of_check = (share_unequal, 0.0, "share of numbers that differ")
    return op_work("torch_exponential", torch.float32, run, context, counted, (images, "image"), copies, kind_of_check)


_B, _MODELS = ("LlamaGen-B",), ("LlamaGen-B", "LlamaGen-XL")
_ALL_MODELS = ("LlamaGen-S", "LlamaGen-B", "LlamaGen-L", "LlamaGen-XL", "LlamaGen-XXL", "LlamaGen-XXXL")
_DTYPES = ("fp32", "bf16", "bf16-packed", "int8-packed")

register(
    Benchmark(
        "skinny_linear",
        "a linear layer with its norm, SwiGLU or residual, for few rows",
        _linear,
        {
            "quick": [
                {"model": _B, "layer": ("qkv", "swiglu", "head"), "rows": (2,), "dtype": ("fp32", "int8-packed")},
                {"model": _B, "layer": ("swiglu",), "rows": (2, 16), "dtype": ("fp32", "bf16-packed")},
            ],
            "standard": [{"model": _B, "layer": LAYERS, "rows": (2, 16), "dtype": _DTYPES}],
            "full": [{"model": _ALL_MODELS, "layer": LAYERS, "rows": (1, 2, 4, 8, 16, 32, 64, 128), "dtype": _DTYPES}],
        },
    )
)
register(
    Benchmark(
        "decode_attention",
        "rotation, cache write and attention of one new token per row",
        _attention,
        {
            "quick": [{"model": _B, "rows": (2, 16), "position": (255,), "dtype": ("fp32",)}],
            "standard": [{"model": _MODELS, "rows": (2, 16), "position": (127, 255), "dtype": ("fp32", "bf16")}],
            "full": [
                {
                    "model": _ALL_MODELS,
                    "rows": (2, 8, 16, 64, 128),
                    "position": (15, 127, 255),
                    "dtype": ("fp32", "bf16"),
                }
            ],
        },
    )
)
register(
    Benchmark(
        "sample_tokens",
        "guidance, temperature, top-k, top-p and the draw, one token per image",
        _sampling,
        {
            "quick": [{"images": (1, 8), "guided": (True,), "top_k": (0,), "top_p": (1.0,), "vocab": (16384,)}],
            "standard": [
                {"images": (1, 8), "guided": (True, False), "top_k": (0, 2000), "top_p": (1.0, 0.9), "vocab": (16384,)}
            ],
            "full": [
                {
                    "images": (1, 2, 4, 8, 16, 32, 64),
                    "guided": (True, False),
                    "top_k": (0, 100, 2000),
                    "top_p": (1.0, 0.9),
                    "vocab": (16384,),
                }
            ],
        },
    )
)
register(
    Benchmark(
        "torch_exponential",
        "the noise of torch.multinomial for one step, from a torch generator",
        _exponential,
        {
            "quick": [{"images": (1, 8), "vocab": (16384,)}],
            "standard": [{"images": (1, 8), "vocab": (16384,)}],
            "full": [{"images": (1, 2, 4, 8, 16, 32, 64), "vocab": (1024, 4096, 16384, 262144)}],
        },
    )
)
