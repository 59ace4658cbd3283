"""PNG images: written whole, and told from damaged ones without decoding pixels."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gear_engine.files import write_atomic

__all__ = ["png_size", "read_png", "write_png"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB8 = (8, 2)  # bit depth, colour type


def write_png(path: Path, image: NDArray[np.uint8]) -> None:
    """Writes ``image`` ([H, W, 3] uint8) to ``path``, atomically.

    The bytes are not forced to the disk: :func:`png_size` finds what a power failure damaged.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image must be [H, W, 3] uint8, got {image.dtype} {image.shape}")
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG")
    write_atomic(path, buffer.getbuffer(), sync=False)


def read_png(path: Path) -> NDArray[np.uint8]:
    """The pixels of ``path``: [H, W, 3] uint8."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)


def png_size(path: Path) -> tuple[int, int] | None:
    """(height, width) of an undamaged 8-bit RGB PNG, or None for anything else, a missing file included.

    Every chunk's checksum is compared and the file must end with its end marker, so a truncated file, a hole of zeros
    and a flipped bit are all found, at the cost of one read.
    """
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if not data.startswith(_SIGNATURE):
        return None
    size: tuple[int, int] | None = None
    offset = len(_SIGNATURE)
    while offset + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, offset)
        end = offset + 12 + length
        if end > len(data) or zlib.crc32(data[offset + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            return None
        if kind == b"IHDR" and length == 13:
            width, height, *form = struct.unpack_from(">IIBB", data, offset + 8)
            size = (height, width) if tuple(form) == _RGB8 else None
        if kind == b"IEND":
            return size if end == len(data) else None
        offset = end
    return None
