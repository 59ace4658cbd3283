"""Training images: a folder by class or arrays in memory, in an order that depends on the seed alone.

The images of step n follow from (seed, n, batch size): neither the number of processes nor where a run was interrupted
changes them, so a run resumes in the middle of an epoch without replaying one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from gear_engine.errors import ConfigError, InvalidRequestError
from gear_engine.runs.world import World
from gear_engine.training.config import TrainConfig
from gear_engine.training.sections import DataConfig

__all__ = ["ArraySource", "Batch", "FolderSource", "ImageSource", "Share", "batches", "open_source", "share_of_step"]

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"})
#: Streams of the run's seed.
_ORDER, _LABELS = 1, 2


class Share(NamedTuple):
    """What one process reads at one step.

    Attributes:
        indices: image numbers.
        places: crop offsets in [0, 1), [n, 2] (vertical, horizontal).
        flips: which images are mirrored.
        drops: uniform numbers in [0, 1) that decide which labels are dropped.
    """

    indices: NDArray[np.int64]
    places: NDArray[np.float64]
    flips: NDArray[np.bool_]
    drops: NDArray[np.float64]


class Batch(NamedTuple):
    """images: uint8 [B, 3, H, W]; labels: int64 [B]; drops: float64 [B], see :class:`Share`."""

    images: torch.Tensor
    labels: torch.Tensor
    drops: torch.Tensor


class ImageSource(Protocol):
    """Numbered images of one size with class labels.

    Attributes:
        class_names: name of each label.
        labels: label of each image.
    """

    class_names: list[str]
    labels: NDArray[np.int64]

    def read(self, share: Share) -> torch.Tensor:
        """Images of ``share``, uint8 [n, 3, H, W], cropped and mirrored as it says."""
        ...

    def fingerprint(self) -> str:
        """Changes when the images or their order do."""
        ...


@dataclass
class ArraySource:
    """Images in memory.

    Attributes:
        images: uint8 [N, 3, H, W], contiguous.
        labels: [N].
    """

    images: torch.Tensor
    labels: NDArray[np.int64]
    class_names: list[str]
    flip: bool

    @classmethod
    def make(cls, images: Any, labels: Any, config: DataConfig, class_names: list[str] | None = None) -> ArraySource:
        """From uint8 [N, H, W, 3] or [N, 3, H, W] (tensor or array) and integer labels [N].

        Raises:
            ConfigError: another dtype, shape or size than ``config.image_size``, or labels that do not fit.
        """
        pixels = torch.as_tensor(images)
        if pixels.ndim == 4 and pixels.shape[3] == 3:
            pixels = pixels.permute(0, 3, 1, 2)
        size = config.image_size
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            found = f"{pixels.dtype} {tuple(torch.as_tensor(images).shape)}"
            raise ConfigError(f"images must be uint8 [N, {size}, {size}, 3], got {found}")
        numbers = np.asarray(labels)
        if numbers.dtype.kind not in "iu" or numbers.shape != (len(pixels),) or len(pixels) == 0 or numbers.min() < 0:
            raise ConfigError(f"labels must be integers [{len(pixels)}] from 0, got {numbers.dtype} {numbers.shape}")
        names = class_names or [str(label) for label in range(int(numbers.max()) + 1)]
        if len(names) <= numbers.max():
            raise ConfigError(f"{len(names)} class names for labels up to {numbers.max()}")
        return cls(pixels.contiguous(), numbers.astype(np.int64), names, config.flip)

    def read(self, share: Share) -> torch.Tensor:
        pixels = self.images[torch.from_numpy(share.indices)]
        if self.flip:
            mirrored = torch.from_numpy(share.flips)
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
        return pixels

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.images.numpy().data)
        digest.update(self.labels.tobytes())
        return digest.hexdigest()


@dataclass
class FolderSource:
    """Images in ``root/<class>/…``, sorted by name.

    Each is resized (bicubic) so that its shorter edge is ``image_size`` and cropped to a square, as the official
    loader does.
    """

    root: Path
    paths: list[Path]
    labels: NDArray[np.int64]
    class_names: list[str]
    config: DataConfig

    @classmethod
    def make(cls, root: Path, config: DataConfig) -> FolderSource:
        """Lists the images below ``root``.

        Raises:
            ConfigError: no such folder, no class folders, or a class without images.
        """
        if not root.is_dir():
            raise ConfigError(f"data.path {root} is no folder of classes and no .npz file")
        classes = sorted(path.name for path in root.iterdir() if path.is_dir())
        if not classes:
            raise ConfigError(f"{root} has no class folders: images lie in {root}/<class>/")
        paths: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            found = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in _SUFFIXES)
            if not found:
                raise ConfigError(f"class folder {root / name} holds no images ({', '.join(sorted(_SUFFIXES))})")
            paths += found
            labels += [label] * len(found)
        return cls(root, paths, np.asarray(labels, np.int64), classes, config)

    def read(self, share: Share) -> torch.Tensor:
        size = self.config.image_size
        out = np.empty((len(share.indices), size, size, 3), np.uint8)
        for row, index in enumerate(share.indices):
            image = _load(self.paths[index])
            width, height = image.size
            short = min(width, height)
            # The longer edge is truncated, as torchvision's Resize does.
            image = image.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)
            spare = np.asarray([image.height - size, image.width - size])
            if self.config.crop == "random":
                top, left = (share.places[row] * (spare + 1)).astype(int)
            else:
                top, left = np.round(spare / 2).astype(int)
            pixels = np.asarray(image)[top : top + size, left : left + size]
            out[row] = pixels[:, ::-1] if self.config.flip and share.flips[row] else pixels
        return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()

    def fingerprint(self) -> str:
        names = "\n".join(path.relative_to(self.root).as_posix() for path in self.paths)
        return hashlib.sha256(names.encode()).hexdigest()


def _load(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidRequestError(f"cannot read the image {path}: {error}") from error


def open_source(config: DataConfig) -> ImageSource:
    """The images of ``config.path``.

    Raises:
        ConfigError: nothing there, or not what :class:`DataConfig` describes.
    """
    if not config.path:
        raise ConfigError("data.path is empty: name a folder of classes or an .npz file")
    path = Path(config.path)
    if path.suffix != ".npz":
        return FolderSource.make(path, config)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
            names = [str(name) for name in arrays["class_names"]] if "class_names" in arrays else None
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} is no .npz with images and labels: {error}") from error
    return ArraySource.make(images, labels, config, names)


def share_of_step(seed: int, step: int, count: int, batch: int, world: World) -> Share:
    """What process ``world.rank`` reads at ``step`` (from 0) of an epoch-wise shuffled run over ``count`` images.

    Raises:
        ConfigError: fewer images than one batch, or a batch that the processes cannot share evenly.
    """
    if count < batch:
        raise ConfigError(f"{count} images do not fill a batch of {batch}")
    if batch % world.size:
        raise ConfigError(f"batch_size {batch} is not divisible by the {world.size} processes")
    per_epoch = count // batch
    epoch, place = divmod(step, per_epoch)
    order, places, flips = _epoch(seed, epoch, count)
    local = batch // world.size
    first = place * batch + world.rank * local
    chosen = order[first : first + local]
    drops = np.random.default_rng([seed, _LABELS, step]).random(batch)[world.rank * local :][:local]
    return Share(chosen, places[chosen], flips[chosen], drops)


_Epoch = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]
_LAST: dict[tuple[int, int, int], _Epoch] = {}


def _epoch(seed: int, epoch: int, count: int) -> _Epoch:
    """Order, crop places and flips of one epoch; the last one is remembered."""
    key = (seed, epoch, count)
    if key not in _LAST:
        random = np.random.default_rng([seed, _ORDER, epoch])
        made = random.permutation(count), random.random((count, 2)), random.random(count) < 0.5
        _LAST.clear()
        _LAST[key] = made
    return _LAST[key]


class _Steps(torch.utils.data.Dataset[Batch]):
    """Step number -> this process's batch."""

    def __init__(self, source: ImageSource, seed: int, batch: int, world: World) -> None:
        self.source, self.seed, self.batch, self.world = source, seed, batch, world

    def __getitem__(self, step: int) -> Batch:
        share = share_of_step(self.seed, step, len(self.source.labels), self.batch, self.world)
        labels = torch.from_numpy(self.source.labels[share.indices])
        return Batch(self.source.read(share), labels, torch.from_numpy(share.drops))


def batches(source: ImageSource, config: TrainConfig, world: World, first: int, last: int) -> Iterator[Batch]:
    """This process's batches of steps ``first`` to ``last - 1``; ``config.data.workers`` processes read ahead."""
    share_of_step(config.seed, 0, len(source.labels), config.batch_size, world)  # refuses what cannot work
    steps = _Steps(source, config.seed, config.batch_size, world)
    if config.data.workers == 0:
        return (steps[step] for step in range(first, last))
    loader: Any = torch.utils.data.DataLoader(
        steps,
        batch_size=None,
        sampler=range(first, last),
        num_workers=config.data.workers,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)
