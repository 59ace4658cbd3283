"""The labels of a run, in image order."""

from __future__ import annotations

import hashlib
from pathlib import Path

from gear_engine.errors import InvalidRequestError
from gear_engine.runs.batches import official_batches
from gear_engine.runs.seeds import image_label

__all__ = ["balanced_labels", "check_labels", "official_labels", "random_labels", "read_labels", "text_hash"]


def random_labels(run_seed: int, count: int, num_classes: int) -> list[int]:
    """Labels that depend on the run's seed and the image's number alone."""
    return [image_label(run_seed, index, num_classes) for index in range(count)]


def balanced_labels(count: int, num_classes: int) -> list[int]:
    """Image k has label ``k % num_classes``."""
    return [index % num_classes for index in range(count)]


def official_labels(run_seed: int, count: int, num_classes: int, batch: int, world_size: int, device: str) -> list[int]:
    """The labels of GEAR ``src/inference.py``, the surplus of the last batch included.

    Rank r draws ``randint(0, num_classes, (batch,))`` once per batch from a generator on ``device`` seeded
    ``run_seed * world_size + r``; entry i of its batch is image ``i * world_size + r`` plus the images before.

    Returns:
        ``ceil(count / (batch * world_size)) * batch * world_size`` labels.
    """
    import torch

    batches = [official_batches(count, batch, world_size, rank) for rank in range(world_size)]
    labels = [0] * (len(batches[0]) * batch * world_size)
    for rank in range(world_size):
        generator = torch.Generator(device=device).manual_seed(run_seed * world_size + rank)
        for indices in batches[rank]:
            drawn = torch.randint(0, num_classes, (batch,), device=device, generator=generator).tolist()
            for index, label in zip(indices, drawn, strict=True):
                labels[index] = label
    return labels


def read_labels(path: Path, count: int | None = None) -> list[int]:
    """The labels in ``path``, one integer per line; blank lines at the end do not count.

    Args:
        count: number of labels to take from the start; None takes all.

    Raises:
        InvalidRequestError: the file cannot be read, a line is no integer, or there are fewer than ``count``.
    """
    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"cannot read labels from {path}: {error}") from error
    labels = []
    for number, line in enumerate(lines, start=1):
        try:
            labels.append(int(line))
        except ValueError:
            raise InvalidRequestError(f"{path} line {number}: {line.strip()!r} is not an integer label") from None
    if not labels:
        raise InvalidRequestError(f"{path} holds no labels")
    if count is not None and len(labels) < count:
        raise InvalidRequestError(f"{path} holds {len(labels)} labels, {count} images need as many; lower --fid-num")
    return labels[:count]


def check_labels(labels: list[int], highest: int) -> None:
    """Raises :class:`InvalidRequestError`, naming the image, unless every label lies in [0, ``highest``]."""
    for index, label in enumerate(labels):
        if not 0 <= label <= highest:
            raise InvalidRequestError(f"the label of image {index} is {label}; labels lie in [0, {highest}]")


def text_hash(items: list[int] | list[str]) -> str:
    """SHA-256 of the items, one per line (line breaks inside an item are escaped)."""
    lines = (str(item).replace("\\", "\\\\").replace("\n", "\\n") for item in items)
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
