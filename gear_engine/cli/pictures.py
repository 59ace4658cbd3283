"""Pictures of pictures: images on a grid, each with a line of text below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = ["labelled_grid"]

_GAP = 4
_LINE = 16


def labelled_grid(images: Sequence[NDArray[np.uint8]], labels: Sequence[str], columns: int) -> Image.Image:
    """Images ([H, W, 3] uint8, of any sizes) row by row, ``columns`` per row, each above its label."""
    if not images or len(images) != len(labels) or columns < 1:
        raise ValueError(f"{len(images)} images, {len(labels)} labels and {columns} columns make no grid")
    font: Any = ImageFont.load_default()
    height = max(image.shape[0] for image in images) + _LINE
    width = max([image.shape[1] for image in images] + [round(font.getlength(label)) for label in labels])
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    size = (_GAP + columns * (width + _GAP), _GAP + rows * (height + _GAP))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        left = _GAP + number % columns * (width + _GAP)
        top = _GAP + number // columns * (height + _GAP)
        canvas.paste(Image.fromarray(np.ascontiguousarray(image)), (left, top))
        draw.text((left, top + image.shape[0] + 2), label, fill="black", font=font)
    return canvas
