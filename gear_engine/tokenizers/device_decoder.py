"""Decoding on a GPU: a step that is captured once and replayed.

Per batch: code vectors, the network (:mod:`gear_engine.tokenizers.device_network`), ``uint8(clamp(127.5 x + 128, 0,
255))``, all on the device and on a stream of its own; then a copy into pinned memory. :meth:`DeviceDecoder.submit`
returns at once, so that the next images' tokens can be drawn meanwhile. A shorter batch is padded: an image's pixels
depend on its codes alone.

Not run on hardware yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from gear_engine.cuda_graph import CaptureCost, EagerLauncher, Executor, GraphLauncher, Launcher
from gear_engine.errors import ConfigError, InvalidRequestError
from gear_engine.tokenizers.device_network import DeviceNetwork, resolve_norms
from gear_engine.tokenizers.images import resize, to_uint8
from gear_engine.tokenizers.tokenizer import Tokenizer

__all__ = ["DeviceDecoder", "Pending", "Side"]


class Side(Protocol):
    """Where decoding runs beside the caller's work: the seam between streams and a device without any."""

    def run(self, work: Callable[[], None], tokens: torch.Tensor) -> Callable[[], None]:
        """Runs ``work``, which reads ``tokens``, behind all that the caller has launched; the result waits for it."""
        ...


class _HereAndNow:
    """A device without streams."""

    def run(self, work: Callable[[], None], tokens: torch.Tensor) -> Callable[[], None]:
        work()
        return lambda: None


class _OwnStream:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def run(self, work: Callable[[], None], tokens: torch.Tensor) -> Callable[[], None]:
        # Their memory may not be handed out again before this stream has read it.
        tokens.record_stream(self._stream)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            work()
            done: Any = torch.cuda.Event()
            done.record()
        return lambda: done.synchronize()


class Pending:
    """Images on their way: uint8 (B, H, W, 3) on the host."""

    def __init__(self, wait: Callable[[], None], pixels: torch.Tensor) -> None:
        self._wait: Callable[[], None] | None = wait
        self._pixels = pixels

    def result(self) -> torch.Tensor:
        """Waits for the images; they stay valid."""
        if self._wait is not None:
            self._wait()
            # The host buffer is used again.
            self._pixels, self._wait = self._pixels.clone(), None
        return self._pixels


class _Program(NamedTuple):
    codes: torch.Tensor
    pixels: torch.Tensor
    step: Executor


class DeviceDecoder:
    """Decodes code indices of one tokenizer on its device, in batches of a fixed size.

    Args:
        tokenizer: an fp32 tokenizer with one index per position. Convolution weights are copied if they change their
            dtype or layout: call :meth:`refresh` after they changed.
        dtype: ``torch.float32``, or ``torch.bfloat16`` for the operands of convolutions.
        batch: images that are decoded together.
        backend: of the passes between convolutions (:func:`~gear_engine.tokenizers.device_network.resolve_norms`).
            ``"auto"`` is Triton on a GPU where it is installed, else plain torch; :attr:`backends` says which.
        launcher: how a batch's step runs; None: captured on CUDA, called elsewhere.
        side: where it runs; None: on a stream of its own on CUDA, here and now elsewhere.

    Raises:
        ConfigError: another dtype, a tokenizer that is not fp32, or one with several indices per position.
        BackendUnavailableError: a backend that was asked for by name cannot run here.

    Attributes:
        backends: the backend chosen per op.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        dtype: torch.dtype = torch.float32,
        batch: int = 8,
        backend: str | Mapping[str, str] = "auto",
        launcher: Launcher | None = None,
        side: Side | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"decoders run in torch.float32 or torch.bfloat16, not {dtype}")
        if tokenizer.dtype != torch.float32:
            raise ConfigError(f"the tokenizer must hold fp32 weights, not {tokenizer.dtype}; dtype= rounds operands")
        if tokenizer.config.num_codebooks != 1:
            raise ConfigError(
                f"{tokenizer.config.num_codebooks} indices per position: decode with Tokenizer.decode_code"
            )
        if batch < 1:
            raise ConfigError(f"batch {batch} must be at least 1")
        self.tokenizer, self.dtype, self.batch = tokenizer, dtype, batch
        self.device = tokenizer.device
        on_gpu = self.device.type == "cuda"
        self._launcher = launcher or (GraphLauncher(self.device) if on_gpu else EagerLauncher())
        self._side = side or (_OwnStream(self.device) if on_gpu else _HereAndNow())
        self.backends = resolve_norms(self.device, backend)
        self._network = DeviceNetwork(tokenizer.decoder, dtype, self.backends)
        self._programs: dict[tuple[int, int], _Program] = {}
        self._hosts = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._pending: list[Pending | None] = [None, None]
        self._turn = 0

    def refresh(self) -> None:
        """Reads the convolutions' weights again, into the same places."""
        self._network.refresh()

    @property
    def capture_cost(self) -> CaptureCost:
        """Seconds and device memory that captured graphs have taken so far."""
        return sum((program.step.cost for program in self._programs.values()), CaptureCost())

    @torch.inference_mode(False)  # What is kept is written in any mode.
    @torch.no_grad()
    def submit(self, tokens: torch.Tensor, size: int | None = None) -> Pending:
        """Begins to decode square images.

        Args:
            tokens: integers (B, n), n a square; in range, as an engine draws them. ``batch`` images are decoded at a
                time, all of them behind what the caller has launched and beside what it launches next.
            size: edge in pixels to which images are resized before they are clamped (bicubic); None: as they are.

        Returns:
            What gives uint8 (B, H, W, 3). Two calls may be pending; a third waits for the first.

        Raises:
            InvalidRequestError: another shape or size.
        """
        if tokens.dim() != 2 or math.isqrt(tokens.shape[1]) ** 2 != tokens.shape[1] or not len(tokens):
            raise InvalidRequestError(f"tokens of square images are (B, n), n a square, not {tuple(tokens.shape)}")
        if size is not None and size < 1:
            raise InvalidRequestError(f"the size to resize to must be positive, got {size}")
        program = self._program(math.isqrt(tokens.shape[1]), size)
        host = self._host(program.pixels, len(tokens))

        def work() -> None:
            for part, pixels in zip(torch.split(tokens, self.batch), torch.split(host, self.batch), strict=True):
                program.codes.zero_()
                program.codes[: len(part)].copy_(part)
                program.step.run()
                pixels.copy_(program.pixels[: len(part)], non_blocking=True)

        pending = Pending(self._side.run(work, tokens), host)
        self._pending[self._turn] = pending
        self._turn = 1 - self._turn
        return pending

    def decode(self, tokens: torch.Tensor, size: int | None = None) -> torch.Tensor:
        """uint8 (B, H, W, 3) on the host, as :meth:`submit`, waited for."""
        return self.submit(tokens, size).result()

    @torch.no_grad()
    def decode_code(
        self, codes: torch.Tensor, shape: Sequence[int] | None = None, channel_first: bool = True
    ) -> torch.Tensor:
        """As :meth:`Tokenizer.decode_code`, of any shape, called at once: fp32 images (B, 3, H, W) on the device."""
        with torch.autocast(self.device.type, enabled=False):
            quant = self.tokenizer.lookup(codes, shape, channel_first)
            with torch.cuda.device_of(quant):  # where Triton launches
                return self._network(self.tokenizer.post_quant_conv(quant.float()))

    def _host(self, pixels: torch.Tensor, count: int) -> torch.Tensor:
        """Room for ``count`` images in the host buffer whose turn it is, once that is free again."""
        earlier, buffer = self._pending[self._turn], self._hosts[self._turn]
        if earlier is not None:
            earlier.result()
        if buffer.shape[1:] != pixels.shape[1:] or len(buffer) < count:
            shape, pinned = (count, *pixels.shape[1:]), self.device.type == "cuda"
            self._hosts[self._turn] = buffer = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        return buffer[:count]

    def _program(self, grid: int, size: int | None) -> _Program:
        edge = grid * self.tokenizer.config.downsample
        key = (grid, edge if size is None else size)
        if key not in self._programs:
            self.tokenizer.config.latent_size(edge, edge)
            device = self.device
            codes = torch.zeros(self.batch, grid * grid, dtype=torch.int64, device=device)
            pixels = torch.zeros(self.batch, key[1], key[1], 3, dtype=torch.uint8, device=device)

            def step() -> None:
                with torch.autocast(device.type, enabled=False):
                    rows = self.tokenizer.quantize.codes_to_rows(codes.view(-1))
                    # [B, h, w, d] seen as [B, d, h, w] is channels last already.
                    quant = rows.view(self.batch, grid, grid, -1).permute(0, 3, 1, 2)
                    latent = self.tokenizer.post_quant_conv(quant.float())
                    pixels.copy_(to_uint8(resize(self._network(latent), key[1])))

            self._programs[key] = _Program(codes, pixels, self._launcher.prepare(step))
        return self._programs[key]
