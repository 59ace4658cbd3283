"""Rendered scenes of shapes: images by class that follow from a seed, made by this file alone.

One shaded shape with a soft shadow on a gradient. Every shape is a signed distance function, so edges are antialiased
at any size. Image i of a seed depends on (seed, i, size) and on nothing else; its class is ``i % len(CLASS_NAMES)``.

    python -m gear_engine.training.scenes train.npz --count 8192 --seed 1
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gear_engine.errors import InvalidRequestError
from gear_engine.files import write_atomic

__all__ = ["CLASS_NAMES", "make_scenes", "render_scene"]

Floats = NDArray[np.float32]

#: Colour of the shapes, and of the ground at its upper and its lower edge, sRGB. One pair of colours for all scenes
#: keeps the images simple enough for a tokenizer that a processor trains in minutes.
_SHAPE_COLOUR: Final = np.asarray((252, 204, 62), np.float32)
_GROUND: Final = np.asarray([(34, 58, 116), (72, 118, 190)], np.float32)
_MAX_TURN: Final = 0.25
_SHADOW: Final = (0.05, 0.09)


def _circle(x: Floats, y: Floats) -> Floats:
    return np.hypot(x, y) - np.float32(0.9)


def _ring(x: Floats, y: Floats) -> Floats:
    return np.abs(np.hypot(x, y) - np.float32(0.72)) - np.float32(0.24)


def _box(x: Floats, y: Floats, width: float, height: float) -> Floats:
    dx, dy = np.abs(x) - np.float32(width), np.abs(y) - np.float32(height)
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _square(x: Floats, y: Floats) -> Floats:
    return _box(x, y, 0.74, 0.74) - np.float32(0.06)


def _cross(x: Floats, y: Floats) -> Floats:
    return np.minimum(_box(x, y, 0.9, 0.26), _box(x, y, 0.26, 0.9)) - np.float32(0.05)


def _polygon(x: Floats, y: Floats, corners: list[tuple[float, float]]) -> Floats:
    """Distance to a closed polygon, negative inside (even-odd rule)."""
    nearest = np.full(x.shape, np.inf, np.float32)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - np.float32(ax), y - np.float32(ay)
        t = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1).astype(np.float32)
        nearest = np.minimum(nearest, np.hypot(px - t * np.float32(ex), py - t * np.float32(ey)))
        if ey != 0:
            inside ^= ((ay > y) != (by > y)) & (px < py * np.float32(ex / ey))
    return np.where(inside, -nearest, nearest)


def _on_circle(radii: list[float]) -> list[tuple[float, float]]:
    """Corners at equal angles from the top, clockwise."""
    angles = 2 * np.pi * np.arange(len(radii)) / len(radii)
    return [(float(r * np.sin(a)), float(-r * np.cos(a))) for r, a in zip(radii, angles, strict=True)]


_TRIANGLE: Final = [(0.0, -0.88), (0.92, 0.72), (-0.92, 0.72)]
_STAR: Final = _on_circle([1.05, 0.46] * 5)


def _triangle(x: Floats, y: Floats) -> Floats:
    return _polygon(x, y, _TRIANGLE) - np.float32(0.05)


def _star(x: Floats, y: Floats) -> Floats:
    return _polygon(x, y, _STAR) - np.float32(0.03)


def _heart(x: Floats, y: Floats) -> Floats:
    """A square on its corner with two half discs (source: Quilez, 2D distance functions)."""
    px, py = np.abs(x) / np.float32(1.45), (np.float32(0.82) - y) / np.float32(1.45)
    top = np.hypot(px - np.float32(0.25), py - np.float32(0.75)) - np.float32(np.sqrt(2) / 4)
    half = np.maximum(px + py, 0) / 2
    below = np.minimum(np.hypot(px, py - 1), np.hypot(px - half, py - half)) * np.sign(px - py)
    distance: Floats = np.where(px + py > 1, top, below) * np.float32(1.45)
    return distance


def _moon(x: Floats, y: Floats) -> Floats:
    disc = np.hypot(x, y) - np.float32(0.95)
    bite = np.hypot(x - np.float32(0.48), y + np.float32(0.2)) - np.float32(0.72)
    distance: Floats = np.maximum(disc, -bite)
    return distance


_SHAPES: Final[dict[str, Callable[[Floats, Floats], Floats]]] = {
    "circle": _circle,
    "cross": _cross,
    "heart": _heart,
    "moon": _moon,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}
#: Name of each label.
CLASS_NAMES: Final = tuple(_SHAPES)


def _cover(distance: Floats, blur: float) -> Floats:
    """Share of a pixel inside: 1 within, 0 outside, smooth over ``blur`` pixels (``distance`` in pixels)."""
    t = np.clip(np.float32(0.5) - distance / np.float32(blur), 0, 1)
    cover: Floats = (t * t * (3 - 2 * t))[..., None]
    return cover


def render_scene(seed: int, index: int, size: int = 64) -> tuple[NDArray[np.uint8], int]:
    """Image number ``index`` of ``seed``: uint8 [size, size, 3] and its label.

    Raises:
        InvalidRequestError: a negative number, or a size below 16.
    """
    if min(seed, index) < 0 or size < 16:
        raise InvalidRequestError(f"seed {seed} and index {index} must not be negative, size {size} at least 16")
    random = np.random.default_rng([seed, index])
    label = index % len(CLASS_NAMES)
    turn = random.uniform(-_MAX_TURN, _MAX_TURN)
    radius = random.uniform(0.27, 0.36)
    centre = random.uniform(-1, 1, 2) * (0.43 - radius)
    light = random.uniform(0.9, 1.0)

    # Coordinates in units of the picture's edge, (0, 0) in the middle.
    line = ((np.arange(size, dtype=np.float32) + np.float32(0.5)) / size - np.float32(0.5)).astype(np.float32)
    x, y = np.meshgrid(line, line)
    picture = _GROUND[0] + (y + np.float32(0.5))[..., None] * (_GROUND[1] - _GROUND[0])

    cosine, sine = np.float32(np.cos(turn) / radius), np.float32(np.sin(turn) / radius)

    def distance(dx: float, dy: float) -> Floats:
        """In pixels, to the shape moved by (dx, dy) from its place."""
        px, py = x - np.float32(centre[0] + dx), y - np.float32(centre[1] + dy)
        found = _SHAPES[CLASS_NAMES[label]](px * cosine + py * sine, py * cosine - px * sine)
        return found.astype(np.float32) * np.float32(radius * size)

    picture = picture * (1 - np.float32(0.35) * _cover(distance(*_SHADOW), 0.1 * size))
    # Light from the upper left, as on a slightly domed surface.
    shade = np.clip(1 - (x - np.float32(centre[0]) + y - np.float32(centre[1])) * np.float32(0.45 / radius), 0.6, 1.35)
    body = np.minimum(
        _SHAPE_COLOUR * (np.float32(light) * (np.float32(0.15) * shade + np.float32(0.85)))[..., None], 255
    )
    alpha = _cover(distance(0, 0), 1.5)
    return (picture * (1 - alpha) + body * alpha + np.float32(0.5)).clip(0, 255).astype(np.uint8), label


def make_scenes(count: int, seed: int, size: int = 64) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The first ``count`` images of ``seed``, uint8 [count, size, size, 3], and their labels, int64 [count].

    Raises:
        InvalidRequestError: as :func:`render_scene`; no images.
    """
    if count < 1:
        raise InvalidRequestError(f"the number of scenes must be at least 1, got {count}")
    made = [render_scene(seed, index, size) for index in range(count)]
    return np.stack([image for image, _ in made]), np.asarray([label for _, label in made], np.int64)


def main(arguments: list[str] | None = None) -> int:
    """Writes scenes as an ``.npz`` that the trainer reads."""
    parser = argparse.ArgumentParser(description="Renders scenes of shapes into an .npz file.")
    parser.add_argument("path", type=Path, help="file to write: images, labels, class_names")
    parser.add_argument("--count", type=int, default=8192, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="edge in pixels (%(default)s)")
    flags = parser.parse_args(arguments)
    images, labels = make_scenes(flags.count, flags.seed, flags.size)
    packed = io.BytesIO()
    np.savez(packed, images=images, labels=labels, class_names=np.asarray(CLASS_NAMES))
    write_atomic(flags.path, packed.getvalue())
    print(f"{flags.count} images of {flags.size} x {flags.size} pixels: {flags.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
