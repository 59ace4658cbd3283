"""What ``sample`` and ``sample-t2i`` share: one checkpoint, one source of images, one run folder per guidance scale."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from gear_engine.cli.environment import parse_backend, pick_device, versions
from gear_engine.cli.progress import Progress
from gear_engine.cli.run_settings import device_name, run_settings
from gear_engine.errors import InvalidRequestError, OutOfMemoryError
from gear_engine.request import SamplingParams
from gear_engine.runs.batches import strided
from gear_engine.runs.folder import RunFolder, check_output, experiment_name, sampling_tag, step_tag
from gear_engine.runs.loop import DrawImages, Drawn, sample_in_order, sample_independent
from gear_engine.runs.record import Settings
from gear_engine.runs.seeds import image_seed
from gear_engine.runs.states import GeneratorStates
from gear_engine.runs.world import World

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from gear_engine.cli.loading import Models
    from gear_engine.engine import Engine

__all__ = ["Plan", "Source", "build_engine", "log", "make_plan", "sample_all"]


#: Images of a process from which on an engine on a CPU is warmed up: that takes about as long as it saves in ten.
_WARM_UP_FROM: Final = 16


class Source(Protocol):
    """What a command samples from."""

    @property
    def count(self) -> int:
        """Number of images."""

    def settings(self) -> Settings:
        """What decides the conditions, for ``run.json``; asked on the main process."""

    def ordered_batches(self, world: World, batch: int) -> list[list[int]]:
        """The official batches of this process; numbers from ``count`` on are drawn and dropped."""

    def torch_seed(self, seed: int, world: World) -> int:
        """Seed of the official token generator of this process."""

    def condition(self, indices: Sequence[int]) -> Any:
        """Labels or captions of the images ``indices``, as :meth:`Engine.generate` takes them."""


@dataclass(frozen=True)
class Plan:
    """The flags of a sampling command, checked; ``device`` is this process's."""

    args: argparse.Namespace
    world: World
    device: torch.device
    scales: list[SamplingParams]
    decode_batch: int

    @property
    def batch(self) -> int:
        return int(self.args.per_proc_batch_size)

    def folder(self, params: SamplingParams) -> Path:
        """``OUTPUT_DIR/EXPERIMENT/STEP/SAMPLING``."""
        checkpoint = self.args.ckpt_path
        experiment = self.args.exp_name or experiment_name(checkpoint)
        return Path(self.args.output_dir) / experiment / step_tag(checkpoint) / sampling_tag(params, self.args.tag)


def log(world: World, message: str) -> None:
    """Prints ``message`` once per run."""
    if world.is_main:
        print(message, flush=True)


def make_plan(args: argparse.Namespace, world: World) -> Plan:
    """Checks the flags before anything is read.

    Raises:
        InvalidRequestError: a setting is out of its range.
        ConfigError: the device is not there.
    """
    scales = [
        SamplingParams(
            cfg_scale=scale,
            cfg_interval=args.cfg_interval,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
        )
        for scale in args.cfg_scale
    ]
    tags = [sampling_tag(params, args.tag) for params in scales]
    if len(set(tags)) < len(tags):
        raise InvalidRequestError(f"--cfg-scale gives the same folder twice: {', '.join(tags)}")
    for flag in ("per_proc_batch_size", "decode_batch", "image_size", "image_size_eval"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise InvalidRequestError(f"--{flag.replace('_', '-')} must be at least 1, got {value}")
    if not 0 <= args.seed < 2**48:
        raise InvalidRequestError(f"--seed must lie in [0, 2**48), got {args.seed}")
    if not (args.keep_pngs or args.pack_npz):
        raise InvalidRequestError("--no-keep-pngs together with --no-pack-npz would keep nothing")
    check_output(args.output_dir)
    device = pick_device(args.device, world)
    as_officially = device.type == "cuda" and args.rng == "torch"
    return Plan(args, world, device, scales, args.decode_batch or (args.per_proc_batch_size if as_officially else 1))


def build_engine(plan: Plan, models: Models) -> Engine:
    """The engine for all scales.

    Raises:
        BackendUnavailableError: ``--backend`` cannot run here.
        OutOfMemoryError: the batch does not fit; nothing was allocated.
    """
    from gear_engine.engine import Engine
    from gear_engine.memory import available_bytes, check_fits, decoder_bytes

    _set_arithmetic(plan)
    size, images = models.image_size, min(plan.decode_batch, plan.batch)
    tokenizer = models.tokenizer
    decoder = decoder_bytes(tokenizer.config, size, size, images, tokenizer.dtype)
    available = available_bytes(plan.device)
    check_fits({f"decoder, {images} images at once": decoder}, available, "lower --decode-batch")
    try:
        return Engine(
            models.generator,
            max_images=plan.batch,
            backend=parse_backend(plan.args.backend),
            weight_format=plan.args.weight_format,
            cache_dtype=plan.args.cache_dtype,
            # The decoder works while the engine's caches are held.
            memory_budget=None if available is None else available - decoder,
        )
    except OutOfMemoryError as error:
        raise OutOfMemoryError(f"{error} (max_images is --per-proc-batch-size)") from None


def sample_all(plan: Plan, models: Models, engine: Engine, source: Source) -> int:
    """Samples one folder per guidance scale; the exit status.

    Everything that can be refused is refused before the first image: the settings are compared with every folder's
    ``run.json``.
    """
    world, args = plan.world, plan.args
    image_size = models.image_size
    written_size = args.image_size_eval or image_size
    environment = {**versions(), "device": device_name(plan.device)}
    folders = [RunFolder(plan.folder(params), source.count, written_size) for params in plan.scales]

    def check_folders() -> tuple[list[Settings], list[str]]:
        every = run_settings(plan, models, source, engine)
        notes = [note for folder, one in zip(folders, every, strict=True) for note in folder.check(one, environment)]
        return every, notes

    every, notes = world.share(check_folders)
    for line in notes:
        log(world, f"note: the folder was begun in another environment ({line})")
    if written_size != image_size:
        log(
            world,
            f"note: images are resized from {image_size} to {written_size} pixels (bicubic); "
            f"--image-size-eval {image_size} keeps them as generated",
        )
    for params, folder, settings in zip(plan.scales, folders, every, strict=True):
        draw = _Draw(plan, models, source, params, engine)
        _sample_one(plan, source, folder, draw, partial(folder.open, settings, environment))
    return 0


def _sample_one(plan: Plan, source: Source, folder: RunFolder, draw: _Draw, open_folder: Callable[[], None]) -> None:
    """One folder: the images of this process, then on the main one the npz."""
    world, args = plan.world, plan.args
    log(world, f"run folder: {folder.path}")
    if world.share(folder.npz.exists):
        log(world, "samples.npz is there already: nothing to do (remove it, or choose another --tag, to sample again)")
    else:
        world.share(open_folder)
        share = strided(source.count, world.size, world.rank)
        label = f"sample (process 0 of {world.size})" if world.size > 1 else "sample"
        draw.prepare(len(share))
        with Progress(len(share), label, visible=world.is_main) as progress:
            if world.is_main and plan.device.type == "cpu":  # On CUDA a step is too short to be worth a look.
                draw.on_token = progress.token
            if args.rng == "philox":
                sample_independent(folder, share, plan.batch, draw, progress.images)
            else:
                states = GeneratorStates(folder.states, world.rank, draw.generator)
                sample_in_order(folder, source.ordered_batches(world, plan.batch), draw, states, progress.images)
        world.wait()
        if world.is_main and draw.captured():
            folder.measured("capture", draw.captured())
    if world.is_main:
        if args.pack_npz and not folder.npz.exists():
            folder.pack()
            log(world, f"packed {source.count} images: {folder.npz}")
        folder.tidy(keep_pngs=args.keep_pngs)


class _Draw(DrawImages):
    """Tokens by the engine, pixels by the tokenizer: on a GPU while the next tokens are drawn."""

    def __init__(self, plan: Plan, models: Models, source: Source, params: SamplingParams, engine: Engine) -> None:
        import torch

        self._plan = plan
        self._models = models
        self._source = source
        self._params = params
        self._engine = engine
        self.on_token: Callable[..., None] | None = None
        seed = source.torch_seed(plan.args.seed, plan.world)
        #: The stream of torch's global generator after ``torch.manual_seed(seed)``, without touching that one.
        self.generator = torch.Generator(device=plan.device).manual_seed(seed)

    def __call__(self, indices: Sequence[int]) -> Drawn:
        import torch

        from gear_engine.tokenizers import DeviceDecoder

        decoder, size = self._models.decoder, int(self._plan.args.image_size_eval or self._models.image_size)
        with torch.no_grad():
            tokens = self._tokens(indices)
            if isinstance(decoder, DeviceDecoder):
                pending = decoder.submit(tokens, size)
                return lambda: pending.result().numpy()
            pixels = torch.cat([self._pixels(part, size) for part in torch.split(tokens, self._plan.decode_batch)])
            images: NDArray[np.uint8] = pixels.numpy()
            return images

    def prepare(self, images: int) -> None:
        """Before so many images are drawn: warms the engine up if they gain from it. Graphs are captured as needed."""
        if images >= _WARM_UP_FROM and self._plan.device.type == "cpu":
            self._engine.warm_up(self._plan.args.rng)

    def captured(self) -> dict[str, dict[str, float]]:
        """What capturing graphs has taken in this process, by model; nothing where nothing is captured."""
        from gear_engine.tokenizers import DeviceDecoder

        costs, decoder = {"generator": self._engine.capture_cost}, self._models.decoder
        if isinstance(decoder, DeviceDecoder):
            costs["decoder"] = decoder.capture_cost
        return {
            name: {"seconds": cost.seconds, "bytes": cost.nbytes} for name, cost in costs.items() if cost.seconds > 0
        }

    def _tokens(self, indices: Sequence[int]) -> torch.Tensor:
        args = self._plan.args
        condition = self._source.condition(indices)
        if args.rng == "torch":
            return self._engine.generate(
                condition, self._params, rng="torch", generator=self.generator, progress=self.on_token
            )
        seeds = [image_seed(args.seed, index) for index in indices]
        return self._engine.generate(condition, self._params, rng="philox", seeds=seeds, progress=self.on_token)

    def _pixels(self, tokens: torch.Tensor, size: int) -> torch.Tensor:
        from gear_engine.tokenizers import resize, to_uint8

        models, edge = self._models, self._models.image_size
        shape = models.tokenizer.latent_shape(len(tokens), edge, edge)
        images = (models.decoder or models.tokenizer).decode_code(tokens, shape)
        return to_uint8(resize(images.float(), size)).cpu()


def _set_arithmetic(plan: Plan) -> None:
    import torch

    if plan.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = plan.args.tf32
        torch.backends.cudnn.allow_tf32 = plan.args.tf32
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
