"""The image tokenizer: encoder, quantizer, decoder, with the official state-dict keys and call signatures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn

from gear_engine.config import TokenizerConfig
from gear_engine.errors import InvalidRequestError
from gear_engine.tokenizers import magvit2, vqgan
from gear_engine.tokenizers.lookup_free import LookupFreeQuantizer
from gear_engine.tokenizers.quantizers import IndexBackpropQuantizer, Quantizer, VectorQuantizer

__all__ = ["Tokenizer", "build_tokenizer"]


def _build_quantizer(config: TokenizerConfig) -> Quantizer:
    """The quantizer of ``config.family``."""
    if config.family == "vq":
        return VectorQuantizer(config.codebook_size, config.codebook_embed_dim, config.codebook_l2_norm)
    if config.family == "ibq":
        return IndexBackpropQuantizer(config.codebook_size, config.codebook_embed_dim)
    return LookupFreeQuantizer(config.codebook_embed_dim, config.num_codebooks)


class Tokenizer(nn.Module):
    """An image tokenizer of any published family.

    Submodules ``encoder``, ``quantize``, ``decoder`` and, where there is one, ``quant_conv`` and ``post_quant_conv``
    keep the official names, so official state dicts load strictly.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder: vqgan.Encoder | magvit2.Encoder
        self.decoder: vqgan.Decoder | magvit2.Decoder
        self.quant_conv: nn.Module
        self.post_quant_conv: nn.Module
        self.quantize: Quantizer = _build_quantizer(config)
        if config.family == "lfq":
            self.encoder, self.decoder = magvit2.Encoder(config), magvit2.Decoder(config)
            self.quant_conv, self.post_quant_conv = nn.Identity(), nn.Identity()
        else:
            self.encoder, self.decoder = vqgan.Encoder(config), vqgan.Decoder(config)
            self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
            self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)

    @property
    def device(self) -> torch.device:
        return self.decoder.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    def latent_shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        """``shape`` for :meth:`decode_code` of images of height x width pixels: (B, d, H, W)."""
        rows, columns = self.config.latent_size(height, width)
        return batch, self.config.codebook_embed_dim, rows, columns

    def encode(self, x: torch.Tensor, return_distance: bool = False) -> tuple[Any, ...]:
        """Encodes and quantizes images.

        Args:
            x: images [B, 3, H, W] in [-1, 1]; H and W multiples of ``config.downsample``.
            return_distance: also return the distances to all codes, which are then materialised.

        Returns:
            ``(quant, diff, info)`` or ``(quant, diff, info, d)``; see :mod:`gear_engine.tokenizers.quantizers`.

        Raises:
            InvalidRequestError: not [B, 3, H, W] floats.
            ConfigError: an edge that is not divisible by the downsample, or a 1 x 1 latent in the lfq family.
        """
        if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point() or x.shape[0] == 0:
            raise InvalidRequestError(f"images must be floats [B, 3, H, W], got {x.dtype} {tuple(x.shape)}")
        self.config.latent_size(x.shape[2], x.shape[3])
        out: tuple[Any, ...] = self.quantize(self.quant_conv(self.encoder(x)), return_distance=return_distance)
        return out

    def decode(self, quant: torch.Tensor) -> torch.Tensor:
        """Code vectors [B, d, h, w] -> images [B, 3, h f, w f], f = ``config.downsample``, about [-1, 1]."""
        dim = self.config.codebook_embed_dim
        if quant.ndim != 4 or quant.shape[1] != dim or quant.shape[0] == 0:
            raise InvalidRequestError(f"code vectors must be [B, {dim}, h, w], got {tuple(quant.shape)}")
        factor = self.config.downsample
        self.config.latent_size(quant.shape[2] * factor, quant.shape[3] * factor)
        return self.decoder(self.post_quant_conv(quant))  # type: ignore[no-any-return]

    def lookup(
        self, codes: torch.Tensor, shape: Sequence[int] | None = None, channel_first: bool = True
    ) -> torch.Tensor:
        """Code vectors [B, d, h, w] of ``codes``, checked before anything is computed; see :meth:`decode_code`."""
        if shape is None:
            shape, channel_first = self._infer_shape(codes), True
        quant = self.quantize.get_codebook_entry(codes, shape, channel_first)
        return (quant if channel_first else quant.permute(0, 3, 1, 2).contiguous()).to(self.dtype)

    def decode_code(
        self, codes: torch.Tensor, shape: Sequence[int] | None = None, channel_first: bool = True
    ) -> torch.Tensor:
        """Decodes code indices to images.

        Args:
            codes: integers; B * h * w of them in any shape (times ``num_codebooks``, group fastest).
            shape: (B, d, h, w), or (B, h, w, d) if not ``channel_first``. None: codes are [B, h, w] or, for a square
                grid, [B, h * w]; with several groups one more axis [.., num_codebooks].

        Returns:
            Images [B, 3, h f, w f], about [-1, 1], in the module's dtype.

        Raises:
            InvalidRequestError: a code out of range, or codes that do not fit ``shape``.
        """
        quant = self.lookup(codes, shape, channel_first)
        if self.runs_cpu_decoder():
            # Imported here: the decoder's module is built on this one.
            from gear_engine.tokenizers.decoder_fast import Decoder

            # Several images share one conversion of the weights; it is dropped with the decoder.
            return Decoder(self, keep_weights=quant.shape[0] > 1).decode(quant)
        return self.decode(quant)

    def runs_cpu_decoder(self) -> bool:
        """Whether :meth:`decode_code` takes the compiled CPU decoder: fp32 on a CPU, no gradients, kernels built.

        It reads the weights in place, keeps nothing, and returns what the modules return (to 1e-5 of the range).
        """
        from gear_engine.tokenizers import decoder_fast

        plain = self.device.type == "cpu" and self.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return plain and not torch.is_grad_enabled() and decoder_fast.unavailable() is None

    def forward(self, x: torch.Tensor, return_distance: bool = False) -> tuple[Any, ...]:
        """``(images, diff)``; with ``return_distance`` ``(images, quant, diff, info, d)``."""
        quant, diff, *rest = self.encode(x, return_distance)
        images = self.decode(quant)
        return (images, quant, diff, *rest) if return_distance else (images, diff)

    def _infer_shape(self, codes: torch.Tensor) -> tuple[int, int, int, int]:
        groups = self.config.num_codebooks
        sizes = list(codes.shape)
        if groups > 1 and (not sizes or sizes.pop() != groups):
            raise InvalidRequestError(f"codes must end in an axis of {groups} groups, got {tuple(codes.shape)}")
        if len(sizes) == 2 and math.isqrt(sizes[1]) ** 2 == sizes[1]:
            sizes = [sizes[0], math.isqrt(sizes[1]), math.isqrt(sizes[1])]
        if len(sizes) != 3:
            raise InvalidRequestError(
                f"the grid of codes {tuple(codes.shape)} is unknown: give shape=(B, {self.config.codebook_embed_dim}, "
                "h, w), or codes as [B, h, w]"
            )
        return sizes[0], self.config.codebook_embed_dim, sizes[1], sizes[2]


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """A tokenizer with torch's default initialisation, in eval mode."""
    tokenizer = Tokenizer(config)
    return tokenizer.eval()
