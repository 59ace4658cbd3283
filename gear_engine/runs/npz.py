"""``samples.npz``: one uint8 array, written image by image."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from gear_engine.files import atomic_file

__all__ = ["write_npz"]

#: A fixed entry date, so that equal images give equal files.
_DATE = (1980, 1, 1, 0, 0, 0)


def write_npz(path: Path, images: Iterable[NDArray[np.uint8]], count: int) -> tuple[int, int, int, int]:
    """Writes ``count`` images ([H, W, 3] uint8, all of one size) as ``arr_0`` [N, H, W, 3] of an npz file.

    One image is in memory at a time. The file holds the array uncompressed, as ``numpy.savez`` writes it, and appears
    under its name only when it is complete and on the disk.

    Returns:
        The shape of ``arr_0``.

    Raises:
        ValueError: there are not ``count`` images, or they differ in size.
    """
    rows = _checked(images, count)
    first = next(rows)
    shape = (count, *first.shape)
    entry = zipfile.ZipInfo("arr_0.npy", date_time=_DATE)
    with (
        atomic_file(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
        archive.open(entry, "w", force_zip64=True) as array,
    ):
        header: dict[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(cast(BinaryIO, array), header)
        array.write(first.tobytes())
        for row in rows:
            array.write(row.tobytes())
    return cast(tuple[int, int, int, int], shape)


def _checked(images: Iterable[NDArray[np.uint8]], count: int) -> Iterator[NDArray[np.uint8]]:
    shape: tuple[int, ...] | None = None
    number = 0
    for number, image in enumerate(images, start=1):
        if image.dtype != np.uint8 or image.ndim != 3:
            raise ValueError(f"image {number - 1} is {image.dtype} {image.shape}, not [H, W, 3] uint8")
        if shape is not None and image.shape != shape:
            raise ValueError(f"image {number - 1} is {image.shape}, the ones before it are {shape}")
        if number > count:
            raise ValueError(f"there are more than {count} images")
        shape = image.shape
        yield image
    if number != count or count == 0:
        raise ValueError(f"{count} images were announced, {number} came")
