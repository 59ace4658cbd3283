"""Tokenizers: codebook quantization and decoding."""

from __future__ import annotations

import copy
from typing import Any

import torch

from gear_engine.bench import counts
from gear_engine.bench.codebook_quantize import faiss_flat, official_form, tie_gap
from gear_engine.bench.inputs import (
    BOUND,
    RATE,
    TORCH_DTYPES,
    largest_error,
    official_tokenizer,
    own_backends,
    share_unequal,
    tokenizer,
)
from gear_engine.bench.registry import Benchmark, Check, Context, Implementation, Skip, Work, register
from gear_engine.errors import BackendUnavailableError, ConfigError, InvalidRequestError
from gear_engine.ops import backends
from gear_engine.tokenizers import Decoder, DeviceDecoder, Tokenizer, choose_decoder, decoder_name, to_uint8

METRICS = ("l2", "l2_normalized", "inner_product")
#: Widest vectors whose indices must be the reference's. The product below torch adds the terms of wider ones in an
#: order of its own, by shape and machine: of two codes whose scores differ by a rounding either is then right.
EXACT_WIDTH = 128
#: Largest gap of two such codes (see ``tie_gap``): a sum of 256 fp32 terms is off by a few 1e-7 of the norms, and the
#: best two of 16384 random codes lie 1e-2 apart at the median; one pair in ten thousand is closer than this.
TIE = 1e-6


def _quantize(params: dict[str, Any], context: Context) -> Work:
    vectors, codes, width, metric = params["vectors"], params["codes"], params["width"], params["metric"]
    if metric not in METRICS:
        raise InvalidRequestError(f"metric {metric!r} is not one of {', '.join(METRICS)}")
    counted = counts.codebook_quantize(vectors, codes, width)
    copies = context.copies(counted.bytes)
    rng = context.generator()
    codebook = torch.randn(codes, width, generator=rng, device=context.device)
    z = [torch.randn(vectors, width, generator=rng, device=context.device) for _ in range(copies)]
    found = backends.implementations("codebook_quantize")
    names, skipped = own_backends("codebook_quantize", torch.float32, context)

    def run(function: Any) -> Any:
        return lambda index: function(z[index], codebook, metric)[0]

    implementations = [Implementation(name, "engine", run(found[name].load())) for name in names]
    reference = run(found["reference"].load())
    if "reference" in context.peers:
        implementations.append(Implementation("reference", "reference", reference))
    if "compiled" in context.peers:
        implementations.append(Implementation("compiled", "peer", torch.compile(reference, dynamic=False)))
    if "faiss" in context.peers:
        search = faiss_flat(metric, codebook.cpu()) if context.device.type == "cpu" else None
        if search is None:
            skipped["faiss"] = "faiss is not installed (pip install faiss-cpu), or the device is no CPU"
        else:
            implementations.append(Implementation("faiss", "peer", lambda index: search(z[index])))
    if "official" in context.peers and context.official is not None:
        official = official_form(context.official, metric, codebook)
        implementations.append(Implementation("official", "peer", lambda index: official(z[index])))
    check = Check(reference, share_unequal, 0.0, "share of indices that differ")
    if width > EXACT_WIDTH:

        def gap(output: torch.Tensor, expected: torch.Tensor) -> float:
            other = (output != expected).nonzero().flatten()
            return tie_gap(metric, z[0][other], codebook[output[other]], codebook[expected[other]])

        check = Check(reference, gap, TIE, "largest gap of codes that differ, in float64, relative to the norms")
    return Work(implementations, counted, "fp32", vectors, "vector", copies=copies, check=check, skipped=skipped)


def _decode(params: dict[str, Any], context: Context) -> Work:
    images, pixels = params["images"], params["pixels"]
    if params["dtype"] not in ("fp32", "bf16"):
        raise InvalidRequestError(f"a decoder's dtype is fp32 or bf16, not {params['dtype']!r}")
    ours = tokenizer(params["tokenizer"], context.seed, context.device)
    rows, columns = ours.config.latent_size(pixels, pixels)
    shape = (images, rows * columns * ours.config.num_codebooks)
    limit = min(ours.config.codebook_size, 2**14)
    codes = torch.randint(0, limit, shape, generator=context.generator(), device=context.device)
    latent = ours.latent_shape(images, pixels, pixels)

    implementations, skipped, decoder = [], {}, None
    try:
        decoder = choose_decoder(ours, TORCH_DTYPES[params["dtype"]][0], images)
    except (BackendUnavailableError, ConfigError) as reason:
        skipped["cpu" if context.device.type == "cpu" else "device"] = str(reason)
    as_pixels = isinstance(decoder, DeviceDecoder)
    if context.device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, as it is in torch's products

    def inferring(decode: Any) -> Any:
        """Floats; or pixels on the host, where that is what the engine's decoder gives."""

        def call(index: int) -> torch.Tensor:
            with torch.inference_mode():
                decoded: torch.Tensor = decode()
                return to_uint8(decoded).cpu() if as_pixels else decoded

        return call

    # The reference: the modules' own forward, which is what torch eager does.
    reference = inferring(lambda: ours.decode(ours.lookup(codes, latent)))
    if decoder is not None:
        implementations.append(Implementation(decoder_name(decoder, ours), "engine", _decoding(decoder, codes, latent)))
    if "reference" in context.peers:
        implementations.append(Implementation("reference", "reference", reference))
    if "official" in context.peers:
        try:
            official = official_tokenizer(context, params["tokenizer"], ours)
            call = inferring(lambda: official.decode_code(codes, list(latent)))
            implementations.append(Implementation("official", "peer", call))
        except Skip as reason:
            skipped["official"] = str(reason)
    if "compiled" in context.peers:
        implementations.append(Implementation("compiled", "peer", torch.compile(reference, dynamic=False)))
    # torch's own fp32 convolutions lose up to 1.2e-5 of the largest value: float64 tells who is right.
    exact = inferring(lambda: _decode_exactly(ours, codes, latent))
    check = Check(exact, largest_error, 2 * BOUND["fp32"], "max|a-b|/max|b| of the images, b in float64")
    if as_pixels:
        check = Check(exact, _pixel_steps, 1.0, "largest difference of pixels, of 255, to float64")
    if params["dtype"] == "bf16":
        check = Check(reference, _noise_to_peak, 10 ** (-45 / 20), "rms(a-b)/range(b) of the images; 45 dB")
    return Work(
        implementations,
        counts.decoder(ours.config, images, pixels, pixels),
        RATE[params["dtype"]],
        images,
        "image",
        check=check,
        capture={"device": lambda: decoder.capture_cost} if isinstance(decoder, DeviceDecoder) else {},
        skipped=skipped,
    )


def _decoding(decoder: Decoder | DeviceDecoder, codes: torch.Tensor, latent: Any) -> Any:
    """``decoder``'s images, as :func:`_decode` compares them."""

    def call(index: int) -> torch.Tensor:
        return decoder.decode(codes) if isinstance(decoder, DeviceDecoder) else decoder.decode_code(codes, latent)

    return call


def _pixel_steps(output: torch.Tensor, reference: torch.Tensor) -> float:
    return float((output.int() - reference.int()).abs().max())


def _decode_exactly(ours: Tokenizer, codes: torch.Tensor, latent: Any) -> torch.Tensor:
    """The images in float64, one at a time."""
    double = copy.deepcopy(ours).double()
    return torch.cat([double.decode(quant) for quant in ours.lookup(codes, latent).double().split(1)])


def _noise_to_peak(output: torch.Tensor, reference: torch.Tensor) -> float:
    """rms(a - b) / (max b - min b): 10^(-PSNR / 20)."""
    output, reference = output.double(), reference.double()
    return float((output - reference).square().mean().sqrt() / (reference.max() - reference.min()))


_VQ = ("VQ-16",)
_KINDS: list[dict[str, Any]] = [
    {"metric": ("l2_normalized",), "width": (8,)},
    {"metric": ("l2",), "width": (14,)},
    {"metric": ("inner_product",), "width": (256,)},
]


def _grids(vectors: tuple[int, ...], kinds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"vectors": vectors, "codes": (16384,), **kind} for kind in kinds]


register(
    Benchmark(
        "codebook_quantize",
        "nearest code of every latent vector",
        _quantize,
        {
            "quick": _grids((4096,), [_KINDS[0]]),
            "standard": _grids((4096,), _KINDS),
            "full": _grids((1024, 4096, 65536), _KINDS),
        },
    )
)
register(
    Benchmark(
        "decoder",
        "codes to images",
        _decode,
        {
            "quick": [{"tokenizer": _VQ, "images": (1,), "pixels": (128,), "dtype": ("fp32", "bf16")}],
            "standard": [
                {
                    "tokenizer": ("VQ-16", "IBQ-16", "LFQ-16"),
                    "images": (1, 4),
                    "pixels": (256,),
                    "dtype": ("fp32", "bf16"),
                }
            ],
            "full": [
                {
                    "tokenizer": ("VQ-16", "VQ-8", "IBQ-16", "LFQ-16", "GLFQ-16"),
                    "images": (1, 2, 4, 8, 16, 32, 64),
                    "pixels": (256, 384, 512),
                    "dtype": ("fp32", "bf16"),
                }
            ],
        },
    )
)
