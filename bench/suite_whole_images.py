"""Whole images: labels to pixels on the host, decoded as :class:`gear_engine.Pipeline` decodes."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch

from gear_engine import Engine, SamplingParams
from gear_engine.bench import counts
from gear_engine.bench.inputs import (
    RATE,
    TORCH_DTYPES,
    check_dtype,
    generator_config,
    generator_weights,
    official_generator,
    official_tokenizer,
    own_backends,
    tokenizer,
)
from gear_engine.bench.registry import Benchmark, Context, Implementation, Skip, Work, register
from gear_engine.bench.suite_models import capture_of
from gear_engine.errors import InvalidRequestError
from gear_engine.pipeline_output import Decoding
from gear_engine.tokenizers import choose_decoder, to_uint8

#: Images that are decoded at a time, as a pipeline's default is; of fewer images all.
DECODE_BATCH = 8


def _end_to_end(params: dict[str, Any], context: Context) -> Work:
    coder = tokenizer(params["tokenizer"], context.seed, context.device)
    images, pixels = params["images"], params["pixels"]
    rows, columns = coder.config.latent_size(pixels, pixels)
    config = generator_config(params["model"]).replace(block_size=rows * columns)
    total = config.block_size
    if coder.config.num_codebooks != 1 or coder.config.codebook_size != config.vocab_size:
        raise InvalidRequestError(f"{params['tokenizer']} does not have the generator's {config.vocab_size} codes")
    dtype, kind = TORCH_DTYPES[check_dtype(params["dtype"])]
    names, skipped = own_backends("skinny_linear", dtype, context)
    weights = generator_weights(config, context.seed, context.device)
    latent = coder.latent_shape(images, pixels, pixels)
    settings = SamplingParams(cfg_scale=4.0 if params["guided"] else 1.0)
    labels = [index * 37 % config.num_classes for index in range(images)]
    of_tokenizer = (params["tokenizer"], coder)
    asked = "auto" if "auto" in context.backends else None

    batch = min(images, DECODE_BATCH)
    decoder = choose_decoder(coder, None, batch)  # once: what it keeps is no part of a call

    def decode(tokens: torch.Tensor) -> Any:
        with torch.no_grad():
            decoding = Decoding(coder, decoder, batch, "pil")
            decoding.add(tokens)
            return decoding.images(tokens)

    implementations, timeline, engines = [], {}, {}
    for name in names:
        engine = Engine(weights, max_images=images, dtype=dtype, backend=asked or name, weight_format=kind)
        engines[name] = engine

        def call(index: int, engine: Engine = engine) -> Any:
            return decode(engine.generate(labels, settings, rng="philox"))

        def phases(engine: Engine = engine) -> list[dict[str, Any]]:
            return _timeline(engine, labels, settings, decode, total)

        implementations.append(Implementation(name, "engine", call))
        timeline[name] = phases
    if "official" in context.peers and kind is None:
        try:
            pair = (official_generator(context, weights.to(dtype=dtype)), official_tokenizer(context, *of_tokenizer))
            implementations.append(
                Implementation("official", "peer", _official(*pair, labels, total, settings, latent))
            )
        except Skip as reason:
            skipped["official"] = str(reason)
    rollout = counts.rollout(config, images, total, params["dtype"], guided=params["guided"])
    return Work(
        implementations,
        rollout + counts.decoder(coder.config, images, pixels, pixels),
        RATE[params["dtype"]],
        images,
        "image",
        timeline=timeline,
        capture=capture_of(engines),
        skipped=skipped,
    )


def _official(generator: Any, coder: Any, labels: list[int], total: int, settings: SamplingParams, latent: Any) -> Any:
    """The official sampler and decoder, as its inference script calls them; its draws are not ours."""
    model, generate = generator
    condition = torch.tensor(labels, device=next(model.parameters()).device)

    def call(index: int) -> Any:
        with torch.inference_mode():
            tokens = generate.generate(model, condition, total, cfg_scale=settings.cfg_scale)
            return (to_uint8(coder.decode_code(tokens, list(latent)).float()).cpu(),)

    return call


def _timeline(
    engine: Engine, labels: list[int], settings: SamplingParams, decode: Any, total: int
) -> list[dict[str, Any]]:
    """Prefill, the quarters of the decode steps, image decoding; seconds since the start."""
    marks: list[float] = []

    def mark(*_: Any) -> None:
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        marks.append(time.perf_counter())

    start = time.perf_counter()
    tokens = engine.generate(labels, settings, rng="philox", callback=mark)
    decode(tokens)
    mark()
    at = [each - start for each in marks]
    phases = [{"name": "prefill, token 1", "start": 0.0, "end": at[0]}]
    edges = [0, *(round(total * part / 4) - 1 for part in (1, 2, 3, 4))]
    for first, last in itertools.pairwise(edges):
        if last > first:
            phases.append({"name": f"tokens {first + 2}-{last + 1}", "start": at[first], "end": at[last]})
    return [*phases, {"name": "image decoder", "start": at[total - 1], "end": at[total]}]


_VQ = ("VQ-16",)

register(
    Benchmark(
        "end_to_end",
        "labels to uint8 images",
        _end_to_end,
        {
            "quick": [
                {
                    "model": ("LlamaGen-B",),
                    "tokenizer": _VQ,
                    "images": (1,),
                    "pixels": (256,),
                    "guided": (True,),
                    "dtype": ("int8-packed",),
                }
            ],
            "standard": [
                {
                    "model": ("LlamaGen-B",),
                    "tokenizer": _VQ,
                    "images": (1, 4),
                    "pixels": (256,),
                    "guided": (True,),
                    "dtype": ("fp32", "int8-packed"),
                }
            ],
            "full": [
                {
                    "model": ("LlamaGen-S", "LlamaGen-B", "LlamaGen-L", "LlamaGen-XL", "LlamaGen-XXL", "LlamaGen-XXXL"),
                    "tokenizer": _VQ,
                    "images": (1, 2, 4, 8, 16, 32, 64),
                    "pixels": (256, 384, 512),
                    "guided": (True, False),
                    "dtype": ("fp32", "bf16", "int8-packed"),
                }
            ],
        },
    )
)
