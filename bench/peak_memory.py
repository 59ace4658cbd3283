"""Peak memory of a rollout, with or without decoding, in a process of its own.

    python -m gear_engine.bench.peak_memory '{"model": "LlamaGen-B", "format": "bf16", "images": 8, "tokens": 256}'

prints a JSON object. With ``"tokenizer": "VQ-16"`` the tokens are decoded too (in bf16 unless the format is fp32 or
the machine has no bf16 convolutions).

The process first draws and decodes with tiny models, so that libraries and threads are in memory; what is resident then
is ``base``. Random weights are made and converted one by one (``building`` is the peak until then), and the system's
high-water mark is reset: ``peak`` is that mark after the rollout, less ``base``. ``parts`` are the bytes that it is
compared with: the weights in the form they are held, the key/value cache, and the decoder's working set (its weights as
converted, the activations that it keeps, and the images).
"""

from __future__ import annotations

import argparse
import gc
import json
from typing import Any

import torch

from gear_engine import Engine, SamplingParams
from gear_engine.bench.inputs import generator_config, generator_weights
from gear_engine.bench.process_memory import in_new_process, reset_peak, resident
from gear_engine.config import TOKENIZER_PRESETS, GeneratorConfig, TokenizerConfig
from gear_engine.ops.skinny_linear import PackKind
from gear_engine.tokenizers import Decoder, build_tokenizer, decoder_fast

__all__ = ["FORMATS", "decode_dtype", "latents", "measure", "table"]

#: name -> (dtype of activations and cache, kind of packed weights)
FORMATS: dict[str, tuple[torch.dtype, PackKind | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, "bf16"),
    "int8": (torch.bfloat16, "int8"),
}
#: Peak memory may be at most so many times the parts.
LIMIT = 1.2
_TINY = GeneratorConfig(dim=64, n_layer=1, n_head=2, vocab_size=97, block_size=16, num_classes=5)
_TINY_TOKENIZER = TokenizerConfig(family="vq", codebook_size=97, z_channels=32, ch=32, ch_mult=(1, 2), downsample=2)


def decode_dtype(format_: str) -> torch.dtype:
    """Arithmetic of the decoder beside a generator of that format: fp32 too where there are no bf16 convolutions."""
    bf16 = format_ != "fp32" and decoder_fast.unavailable(torch.bfloat16) is None
    return torch.bfloat16 if bf16 else torch.float32


def _warm_up(format_: str, decoding: bool) -> None:
    dtype, kind = FORMATS[format_]
    weights = generator_weights(_TINY, 0, torch.device("cpu"))
    Engine(weights, max_images=2, dtype=dtype, weight_format=kind).generate([0, 1], SamplingParams(cfg_scale=4.0))
    if decoding:
        tokenizer = build_tokenizer(_TINY_TOKENIZER).requires_grad_(False)
        shape = tokenizer.latent_shape(1, 16, 16)
        Decoder(tokenizer, dtype=decode_dtype(format_)).decode_code(torch.zeros(64, dtype=torch.int64), shape)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    images, tokens, name = int(job["images"]), int(job["tokens"]), job.get("tokenizer")
    dtype, kind = FORMATS[job["format"]]
    _warm_up(job["format"], name is not None)
    gc.collect()
    base = resident("VmRSS")
    reset_peak()
    config = generator_config(job["model"])
    engine = Engine(
        generator_weights(config, 0, torch.device("cpu"), dtype, kind),
        max_images=images, dtype=dtype, weight_format=kind, max_new_tokens=tokens,
    )  # fmt: skip
    generator_weights.cache_clear()
    decoder = None
    if name is not None:
        tokenizer = build_tokenizer(TOKENIZER_PRESETS[name]).eval().requires_grad_(False)
        decoder = Decoder(tokenizer, dtype=decode_dtype(job["format"]))
    gc.collect()
    building = resident("VmHWM") - base
    reset_peak()
    drawn = engine.generate(list(range(images)), SamplingParams(cfg_scale=4.0), rng="torch", max_new_tokens=tokens)
    parts = {"weights": engine.weights.nbytes, "cache": engine.cache.kv.nbytes}
    if decoder is not None:
        codes, shape = latents(drawn, decoder, config)
        parts["images"] = decoder.decode_code(codes, shape).nbytes
        parts["tokenizer"] = sum(parameter.nbytes for parameter in decoder.tokenizer.parameters())
        parts["converted"] = decoder.converted_nbytes
        parts["activations"] = decoder.nbytes
    peak = resident("VmHWM") - base
    ratio = max(peak, building) / sum(parts.values())
    return {"base": base, "building": building, "peak": peak, "parts": parts, "ratio": ratio}


def latents(drawn: torch.Tensor, decoder: Decoder, config: GeneratorConfig) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Codes and latent shape of (B, n) tokens; of fewer than a whole grid, zeros follow them."""
    whole = torch.zeros(len(drawn), config.block_size, dtype=torch.int64)
    whole[:, : drawn.shape[1]] = drawn
    pixels = config.grid_size * decoder.tokenizer.config.downsample
    return whole, tuple(decoder.tokenizer.latent_shape(len(drawn), pixels, pixels))


def measure(model: str, format_: str, images: int, tokens: int, tokenizer: str | None = None) -> dict[str, Any]:
    """One rollout in a new process: bytes of ``peak`` and its ``parts``, their ``ratio``, and whether it is ``ok``.

    Raises:
        RuntimeError: the process failed; the message is the end of its output.
    """
    job = {"model": model, "format": format_, "images": images, "tokens": tokens, "tokenizer": tokenizer}
    found = in_new_process("gear_engine.bench.peak_memory", json.dumps(job))
    return {"images": images, "format": format_, **found, "ok": found["ratio"] <= LIMIT}


def table(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in MB for :func:`gear_engine.bench.timing.render`."""
    rows = []
    for record in records:
        row = {"images": record["images"], "memory": record["format"], "peak_MB": record["peak"] / 1e6}
        row |= {f"{part}_MB": size / 1e6 for part, size in record["parts"].items()}
        ok = "yes" if record["ok"] else "NO"
        rows.append(
            {**row, "peak / parts": record["ratio"], f"<= {LIMIT}": ok, "building_MB": record["building"] / 1e6}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gear_engine.bench.peak_memory", description=__doc__)
    parser.add_argument("job", type=json.loads, help="JSON object: model, format, images, tokens, tokenizer")
    print(json.dumps(_run(parser.parse_args().job)))


if __name__ == "__main__":
    main()
