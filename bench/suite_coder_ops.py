"""The tokenizers' smaller ops: sign bits, the soft read-out, and the fused passes of the decoder."""

from __future__ import annotations

from typing import Any

import torch

from gear_engine.bench import counts
from gear_engine.bench.inputs import largest_error, op_work, share_unequal
from gear_engine.bench.registry import Benchmark, Context, Skip, Work, register
from gear_engine.errors import InvalidRequestError
from gear_engine.ops import conv_rows

GROUPS = 32


def _divisible(name: str, value: int, by: int) -> None:
    if value % by:
        raise InvalidRequestError(f"{name} {value} must be a multiple of {by}")


def _sign_bits(params: dict[str, Any], context: Context) -> Work:
    vectors, width, groups = params["vectors"], params["width"], params["groups"]
    _divisible("width", width, groups)
    counted = counts.sign_bits(vectors, width, groups)
    copies = context.copies(counted.bytes)
    z = torch.randn(copies, vectors, width, generator=context.generator(), device=context.device)

    def run(function: Any) -> Any:
        return lambda index: function(z[index], groups)[0]

    check = (share_unequal, 0.0, "share of indices that differ")
    return op_work("sign_bits", torch.float32, run, context, counted, (vectors, "vector"), copies, check)


def _soft_readout(params: dict[str, Any], context: Context) -> Work:
    vectors, codes, width, channels = (params[name] for name in ("vectors", "codes", "width", "channels"))
    counted = counts.soft_readout(vectors, codes, width, channels)
    rng = context.generator()
    z = torch.randn(vectors, width, generator=rng, device=context.device)
    codebook = torch.randn(codes, width, generator=rng, device=context.device)
    table = torch.randn(codes, channels, generator=rng, device=context.device)

    def run(function: Any) -> Any:
        return lambda index: function(z, codebook, table, 0.3, "l2")

    check = (largest_error, 1e-4, "max|a-b|/max|b|")
    return op_work("soft_readout", torch.float32, run, context, counted, (vectors, "vector"), 1, check)


def _dual_readout(params: dict[str, Any], context: Context) -> Work:
    vectors, codes, width, channels = (params[name] for name in ("vectors", "codes", "width", "channels"))
    rng = context.generator()
    sizes = ((vectors, width), (codes, width), (codes, channels))
    z, codebook, table = (torch.randn(size, generator=rng, device=context.device) for size in sizes)

    def run(function: Any) -> Any:
        return lambda index: function(z, codebook, table, 0.3, "l2")[1]

    check = (largest_error, 1e-4, "max|a-b|/max|b| of the mixture")
    counted = counts.dual_readout(vectors, codes, width, channels)
    return op_work("dual_readout", torch.float32, run, context, counted, (vectors, "vector"), 1, check)


def _conv(params: dict[str, Any], context: Context) -> Work:
    rows, width, inputs, outputs, edge = (params[name] for name in ("rows", "width", "inputs", "outputs", "edge"))
    if context.device.type != "cpu":
        raise Skip("conv_rows is a kernel of CPUs")
    if edge not in (2, 3):
        raise InvalidRequestError(f"edge {edge} must be 2 or 3")
    counted = counts.conv_rows(rows, width, inputs, outputs, edge)
    copies = context.copies(counted.bytes)
    source = torch.randn(copies, rows + edge - 1, width, inputs, generator=context.generator())
    kernel = conv_rows.pack(torch.randn(outputs, inputs, edge, edge) / (inputs * edge**2) ** 0.5)

    def run(function: Any) -> Any:
        out = torch.empty(rows, width + 3 - edge, outputs)

        def call(index: int) -> torch.Tensor:
            function(source[index], kernel, None, out)
            return out

        return call

    check = (largest_error, 1e-5, "max|a-b|/max|b|")
    return op_work("conv_rows", torch.float32, run, context, counted, (rows, "row"), copies, check)


def _group_norm(params: dict[str, Any], context: Context) -> Work:
    edge, channels = params["edge"], params["channels"]
    _divisible("channels", channels, GROUPS)
    counted = counts.group_norm_silu(edge, channels, GROUPS)
    copies = context.copies(counted.bytes)
    rng = context.generator()
    x = torch.randn(copies, edge, edge, channels, generator=rng, device=context.device)
    rows = x.double().view(copies, edge, edge, GROUPS, -1)
    moments = torch.stack((rows.sum((2, 4)), rows.square().sum((2, 4))), dim=-1)  # [copies, H, groups, 2]
    weight, bias = (torch.randn(channels, generator=rng, device=context.device) for _ in range(2))

    def run(function: Any) -> Any:
        out = torch.empty_like(x[0])

        def call(index: int) -> torch.Tensor:
            function(x[index], moments[index], weight, bias, out)
            return out

        return call

    check = (largest_error, 1e-5, "max|a-b|/max|b|")
    return op_work("group_norm_silu", torch.float32, run, context, counted, (1, "image"), copies, check)


def _moments(params: dict[str, Any], context: Context) -> Work:
    edge, channels = params["edge"], params["channels"]
    _divisible("channels", channels, GROUPS)
    counted = counts.residual_moments(edge, channels, GROUPS)
    copies = context.copies(counted.bytes)
    source = torch.randn(copies, edge, edge, channels, generator=context.generator(), device=context.device)

    def run(function: Any) -> Any:
        residual = torch.empty_like(source[0])
        moments = torch.empty(edge, GROUPS, 2, dtype=torch.float64, device=context.device)

        def call(index: int) -> torch.Tensor:
            function(source[index], residual, moments)
            return moments

        return call

    check = (largest_error, 1e-5, "max|a-b|/max|b| of the moments")
    return op_work("residual_moments", torch.float32, run, context, counted, (1, "image"), copies, check)


_SIZES = ((16, 512), (64, 256), (256, 128))
_IMAGES = [{"edge": (edge,), "channels": (channels,)} for edge, channels in _SIZES]

#: Strips of a VQ-16 decoder at 256 px.
_STRIPS = [
    {"rows": (rows,), "width": (width,), "inputs": (inputs,), "outputs": (outputs,), "edge": (edge,)}
    for rows, width, inputs, outputs, edge in (
        (16, 16, 512, 512, 3), (32, 64, 256, 256, 3), (32, 256, 128, 128, 3), (32, 128, 128, 512, 2)
    )
]  # fmt: skip

register(
    Benchmark(
        "sign_bits",
        "indices and signs of LFQ and GLFQ latents",
        _sign_bits,
        {
            "quick": [{"vectors": (65536,), "width": (14,), "groups": (1,)}],
            "standard": [{"vectors": (65536,), "width": (14,), "groups": (1,)}],
            "full": [
                {"vectors": (4096, 65536), "width": (14,), "groups": (1,)},
                {"vectors": (4096, 65536), "width": (32,), "groups": (4,)},
            ],
        },
    )
)
register(
    Benchmark(
        "soft_readout",
        "softmax of distances times a table, without the N x K array",
        _soft_readout,
        {
            "standard": [{"vectors": (256,), "codes": (16384,), "width": (8,), "channels": (768,)}],
            "full": [{"vectors": (256, 1024), "codes": (16384,), "width": (8, 256), "channels": (768,)}],
        },
    )
)
register(
    Benchmark(
        "dual_readout",
        "the hard code and the soft mixture of every latent, forward only",
        _dual_readout,
        {
            "standard": [{"vectors": (256,), "codes": (16384,), "width": (8,), "channels": (768,)}],
            "full": [{"vectors": (256, 8192), "codes": (16384,), "width": (8, 256), "channels": (768,)}],
        },
    )
)
register(
    Benchmark(
        "conv_rows",
        "fp32 convolution of a strip of channels-last rows",
        _conv,
        {
            "quick": _STRIPS[2:3],
            "standard": _STRIPS,
            "full": _STRIPS,
        },
    )
)
register(
    Benchmark(
        "group_norm_silu",
        "group norm and SiLU of a channels-last image",
        _group_norm,
        {"quick": _IMAGES[2:], "standard": _IMAGES, "full": _IMAGES},
    )
)
register(
    Benchmark(
        "residual_moments",
        "an image into the residual stream and the sums of its groups",
        _moments,
        {"quick": _IMAGES[2:], "standard": _IMAGES, "full": _IMAGES},
    )
)
