"""The CPU decoder: the same network as the modules', run image by image over reused memory.

Per residual block: one pass normalises and activates into the convolution's operand, the convolution runs in strips
of rows, one pass adds the strip to the fp32 residual stream and takes the sums for the next norm. A nearest upsampling
and the 3 x 3 convolution after it become four 2 x 2 convolutions of the small image (each output phase sees two rows
and two columns of it): 4 / 9 of the products, and the large operand is never built.

``dtype=torch.float32`` computes the modules' network to 3.8e-6 to 6.4e-6 of its range, measured against float64 for all
six tokenizers at 256 px (convolutions go by Winograd where that pays); torch's own convolutions are off by 5e-6 with
AVX-512 and by 6e-6 to 1.7e-5 with AVX2. ``torch.bfloat16`` rounds the operands and outputs of the convolutions and
keeps residuals, norms and sums in fp32. An image's pixels never depend on the rest of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F

from gear_engine.errors import BackendUnavailableError, ConfigError, InvalidRequestError
from gear_engine.ops import native
from gear_engine.tokenizers import magvit2, vqgan
from gear_engine.tokenizers.canvas import Arena, Canvas
from gear_engine.tokenizers.convolution import PHASE_TILE, Convolution, Memory
from gear_engine.tokenizers.tokenizer import Tokenizer

__all__ = ["Decoder", "unavailable"]


class _Step(Protocol):
    def __call__(self, canvas: Canvas, latent: torch.Tensor) -> None: ...


class _ResidualStep:
    """Residual block. x + conv2(silu(norm2(conv1(silu(norm1(x))))))."""

    def __init__(self, block: vqgan.ResidualBlock | magvit2.ResidualBlock, memory: Memory, dtype: torch.dtype) -> None:
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.conv1, self.conv2 = Convolution(block.conv1, memory, dtype), Convolution(block.conv2, memory, dtype)
        shortcut = block._modules.get("nin_shortcut")
        # The residual stream stays fp32, also where a block changes its width.
        self.shortcut = Convolution(shortcut, memory, torch.float32) if isinstance(shortcut, nn.Conv2d) else None

    def __call__(self, canvas: Canvas, latent: torch.Tensor) -> None:
        height, width = canvas.x.shape[:2]
        operand = canvas.padded()
        canvas.normalised(self.norm1, operand[1:-1])
        bounds = list(canvas.strips(self.conv1.out_channels))
        moments = torch.empty_like(canvas.moments)
        hidden = []
        for first, last, strip in self.conv1(operand, bounds):
            canvas.moments_of(strip, moments[first:last])
            hidden.append(strip)
        if self.shortcut is not None:
            x = canvas.x
            canvas.replace(height, width, self.conv1.out_channels)
            for first, _, strip in self.shortcut(x, bounds):
                canvas.put(strip, first, accumulate=False)
            operand = canvas.padded()
        canvas.normalise_strips(self.norm2, hidden, moments, operand[1:-1])
        del hidden
        for first, _, strip in self.conv2(operand, bounds):
            canvas.put(strip, first, accumulate=True)


class _AttentionStep:
    """x + proj_out(attention(norm(x))), one head over all positions."""

    def __init__(self, block: vqgan.AttentionBlock, memory: Memory, dtype: torch.dtype) -> None:
        self.norm = block.norm
        self.projections = [Convolution(conv, memory, dtype) for conv in (block.q, block.k, block.v)]
        self.proj_out = Convolution(block.proj_out, memory, dtype)

    def __call__(self, canvas: Canvas, latent: torch.Tensor) -> None:
        height, width, channels = canvas.x.shape
        normed = canvas.normalised(self.norm, canvas.padded()[1:-1], silu=False)
        q, k, v = (proj.whole(normed).view(1, 1, height * width, channels) for proj in self.projections)
        mixed = F.scaled_dot_product_attention(q, k, v).view(height, width, channels)
        canvas.put(self.proj_out.whole(mixed), 0, accumulate=True)


class _UpsampleStep:
    """Nearest upsampling and 3 x 3 convolution, as four 2 x 2 convolutions."""

    def __init__(self, module: vqgan.Upsample, memory: Memory, dtype: torch.dtype) -> None:
        self.conv = Convolution(module.conv, memory, dtype, phases=True)

    def __call__(self, canvas: Canvas, latent: torch.Tensor) -> None:
        height, width, _ = canvas.x.shape
        operand = canvas.stream()
        bounds = list(canvas.strips(self.conv.out_channels, tile=PHASE_TILE, overlap=1))
        canvas.replace(2 * height, 2 * width, self.conv.out_channels // 4)
        for first, _, phases in self.conv(operand, bounds):  # [last - first + 1, W + 1, 4 C]
            canvas.put(phases.unflatten(2, (4, -1)), 2 * first, accumulate=False, phase_offset=1)


class _DepthToSpaceStep:
    """3 x 3 convolution to four times the channels, then depth-to-space."""

    def __init__(self, module: magvit2.Upsampler, memory: Memory, dtype: torch.dtype) -> None:
        self.conv = Convolution(module.conv1, memory, dtype)

    def __call__(self, canvas: Canvas, latent: torch.Tensor) -> None:
        height, width, channels = canvas.x.shape
        operand = canvas.stream()
        bounds = list(canvas.strips(self.conv.out_channels))
        canvas.replace(2 * height, 2 * width, channels)
        for first, _, phases in self.conv(operand, bounds):
            canvas.put(phases.unflatten(2, (4, -1)), 2 * first, accumulate=False, phase_offset=0)


@dataclass(frozen=True)
class _AdaptiveNormStep:
    """Group norm whose scale and shift come from the latent."""

    module: magvit2.AdaptiveGroupNorm

    def __call__(self, canvas: Canvas, latent: torch.Tensor) -> None:
        scale, shift = self.module.affine(latent)
        canvas.rescale(scale.flatten(), shift.flatten(), self.module.gn.eps)


def _step(module: nn.Module, memory: Memory, dtype: torch.dtype) -> _Step:
    if isinstance(module, (vqgan.ResidualBlock, magvit2.ResidualBlock)):
        return _ResidualStep(module, memory, dtype)
    if isinstance(module, vqgan.AttentionBlock):
        return _AttentionStep(module, memory, dtype)
    if isinstance(module, vqgan.Upsample):
        return _UpsampleStep(module, memory, dtype)
    if isinstance(module, magvit2.Upsampler):
        return _DepthToSpaceStep(module, memory, dtype)
    if isinstance(module, magvit2.AdaptiveGroupNorm):
        return _AdaptiveNormStep(module)
    raise TypeError(f"a decoder has no step of type {type(module).__name__}")


def unavailable(dtype: torch.dtype = torch.float32) -> str | None:
    """Why this machine cannot run a :class:`Decoder` of ``dtype``, or None if it can."""
    if dtype == torch.bfloat16:
        if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
            return "this build of torch has no oneDNN convolutions; use dtype=torch.float32"
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "bf16 convolutions need a CPU with AVX-512; use dtype=torch.float32"
    symbols = ("conv_rows_cpu", "residual_moments_cpu", "group_norm_silu_cpu")
    return next((reason for reason in map(native.unavailable, symbols) if reason is not None), None)


class Decoder:
    """Decodes code indices of one tokenizer on the CPU, in a dtype that is chosen once.

    Converted weights may be kept from the first call on; call :meth:`refresh` after the tokenizer's changed. The memory
    of the activations is kept for the next call (:attr:`nbytes`, :meth:`release`).

    Args:
        tokenizer: an fp32 tokenizer on the CPU.
        dtype: ``torch.float32`` (within 1e-5 of the modules) or ``torch.bfloat16`` (convolutions in bf16; 45 dB and
            better against fp32).
        keep_weights: False reads the weights in place at every call and keeps no copy of them.

    Raises:
        ConfigError: another dtype, or a tokenizer that is not fp32.
        BackendUnavailableError: a tokenizer that is not on the CPU, or bf16 on a CPU without AVX-512.
    """

    def __init__(self, tokenizer: Tokenizer, *, dtype: torch.dtype = torch.float32, keep_weights: bool = True) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"decoders run in torch.float32 or torch.bfloat16, not {dtype}")
        if tokenizer.device.type != "cpu":
            raise BackendUnavailableError(f"this decoder runs on the CPU, the tokenizer is on {tokenizer.device}")
        if tokenizer.dtype != torch.float32:
            raise ConfigError(f"the tokenizer must hold fp32 weights, not {tokenizer.dtype}; dtype= converts them")
        reason = unavailable(dtype)
        if reason is not None:
            raise BackendUnavailableError(reason)
        self.tokenizer = tokenizer
        self.dtype = dtype
        self._keep_weights = keep_weights
        self._arena = Arena()
        self.refresh()

    def refresh(self) -> None:
        """Reads the tokenizer's weights again."""
        decoder = self.tokenizer.decoder
        memory = self._memory = Memory(self._arena, self._keep_weights)
        # torch's 1 x 1 convolution of few pixels rounds differently with other threads.
        post_quant = self.tokenizer.post_quant_conv
        self._post_quant = Convolution(post_quant, memory, torch.float32) if isinstance(post_quant, nn.Conv2d) else None
        self._conv_in = Convolution(decoder.conv_in, memory, self.dtype)
        self._conv_out = Convolution(decoder.conv_out, memory, self.dtype)
        self._steps = [_step(module, memory, self.dtype) for module in decoder.steps()]

    @property
    def nbytes(self) -> int:
        """Bytes kept for activations (and one convolution's converted weight) between calls."""
        return self._arena.nbytes

    @property
    def converted_nbytes(self) -> int:
        """Bytes of the converted weights that are kept."""
        return sum(self._memory.kept)

    def release(self) -> None:
        """Gives the memory of the activations back; the next call takes it again."""
        self._arena.release()

    @torch.no_grad()
    def decode_code(
        self, codes: torch.Tensor, shape: Sequence[int] | None = None, channel_first: bool = True
    ) -> torch.Tensor:
        """As :meth:`Tokenizer.decode_code`; fp32 images [B, 3, H, W]."""
        return self.decode(self.tokenizer.lookup(codes, shape, channel_first))

    @torch.no_grad()
    def decode(self, quant: torch.Tensor) -> torch.Tensor:
        """As :meth:`Tokenizer.decode`: fp32 code vectors [B, d, h, w] -> fp32 images [B, 3, H, W]."""
        config = self.tokenizer.config
        dim, factor = config.codebook_embed_dim, config.downsample
        if quant.ndim != 4 or quant.shape[1] != dim or quant.shape[0] == 0:
            raise InvalidRequestError(f"code vectors must be [B, {dim}, h, w], got {tuple(quant.shape)}")
        height, width = quant.shape[2] * factor, quant.shape[3] * factor
        config.latent_size(height, width)
        images = torch.empty(quant.shape[0], 3, height, width, dtype=torch.float32)
        with torch.autocast("cpu", enabled=False):
            for index, image in enumerate(images):
                self._decode_image(quant[index].float().permute(1, 2, 0).contiguous(), image)
        return images

    def _decode_image(self, codes: torch.Tensor, image: torch.Tensor) -> None:
        norm_out = self.tokenizer.decoder.norm_out
        canvas = Canvas(self._arena, self.dtype, norm_out.num_groups)
        grid = codes if self._post_quant is None else self._post_quant.whole(codes)  # [h, w, z]
        latent = grid.permute(2, 0, 1)[None].contiguous()  # [1, z, h, w]
        rows = F.pad(grid, (0, 0, 0, 0, 1, 1)).to(self.dtype)  # [h + 2, w, z]
        canvas.replace(grid.shape[0], grid.shape[1], self._conv_in.out_channels)
        canvas.put(self._conv_in.whole(rows), 0, accumulate=False)
        for step in self._steps:
            step(canvas, latent)
        operand = canvas.padded()
        canvas.normalised(norm_out, operand[1:-1])
        image.copy_(self._conv_out.whole(operand).permute(2, 0, 1))
