"""Opens a checkpoint file without running, trusting or loading it: plain data now, the chosen tensors later.

Two formats are read: zip files of ``torch.save`` (the default since torch 1.6) and safetensors. The older torch formats
(a chain of pickles; a tar file) are refused with a message that says how to save them again: their sizes cannot be
checked before they are allocated.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch

from gear_engine.checkpoint.pickle_data import read_pickle
from gear_engine.checkpoint.records import Record, RecordFile, read_into
from gear_engine.checkpoint.stored import OtherTensor, StorageRef, StoredTensor, contiguous_stride
from gear_engine.checkpoint.views import View, plan_views, shaped
from gear_engine.errors import CheckpointError, OutOfMemoryError, UnsafeCheckpointError

__all__ = ["CheckpointFile", "open_checkpoint"]

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_RESAVE = "torch.save(torch.load(old, map_location='cpu', weights_only=True), new)"
#: Python objects that a pickle may build beyond the size of its file.
_PICKLE_BUDGET = 40 << 20
_MAX_HEADER = 4 << 20
#: Names in a file may be of any length; a message is for people.
_LONGEST_MESSAGE = 3000
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_KNOWN_RECORDS = {"data.pkl", "version", "byteorder"}


class CheckpointFile:
    """An open checkpoint.

    Attributes:
        path: the file.
        size: its bytes.
        root: what it holds as plain data, tensors as :class:`StoredTensor` (nothing of them is read yet).
        metadata: the strings in a safetensors header; empty for torch files.
        verified: whether the file has checksums, which are compared as tensors are read.
    """

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.size, self._file = path, size, file
        self.metadata: dict[str, str] = {}
        self._records: RecordFile | None = None
        self._spans: dict[str, tuple[int, int]] = {}
        if file.read(4) == b"PK\x03\x04":
            self._open_zip()
        else:
            self._open_safetensors()

    @property
    def verified(self) -> bool:
        return self._records is not None and self._records.has_checksums

    def read_tensors(
        self, wanted: Mapping[str, StoredTensor], finish: Callable[[str, torch.Tensor], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Reads tensors into memory of their own, one at a time.

        Args:
            wanted: name -> stored tensor.
            finish: what to do with each tensor as soon as it is there (check, convert, move).

        Returns:
            name -> what ``finish`` returned, in the order of ``wanted``.

        Raises:
            CheckpointError: damaged or truncated.
            UnsafeCheckpointError: a tensor that is larger than its storage, or storages larger than the file.
        """
        storages: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in wanted.items():
            storages.setdefault(tensor.storage.key, {})[name] = tensor
        found: dict[str, torch.Tensor] = {}
        for tensors in storages.values():
            views = plan_views(tensors)
            with self._storage(next(iter(tensors.values()))) as reader:
                for view, flat in reader(views):
                    value = shaped(flat, view.tensor)
                    del flat
                    for name in view.names:
                        found[name] = finish(name, value)
        return {name: found[name] for name in wanted}

    # -- torch ---------------------------------------------------------------
    def _open_zip(self) -> None:
        self._records = records = RecordFile(self._file, self.size)
        names = records.records
        if any(name.startswith("code/") or name == "constants.pkl" for name in names):
            raise UnsafeCheckpointError("a TorchScript program, not a state dict; save model.state_dict() instead")
        for name in names:
            if name not in _KNOWN_RECORDS and not name.startswith(("data/", ".")):
                raise CheckpointError(f"an unknown zip record {name!r}; torch.save writes none of that name")
        if "data.pkl" not in names:
            raise CheckpointError("not a torch checkpoint: the zip file has no data.pkl")
        order = names.get("byteorder")
        if order is not None and (order.size > 8 or records.read(order) != b"little"):
            raise CheckpointError("the tensors are not little-endian; save the file again on a little-endian machine")
        self.root = read_pickle(records.read(names["data.pkl"]), _PICKLE_BUDGET + self.size)

    def _record_of(self, storage: StorageRef, itemsize: int) -> Record:
        assert self._records is not None
        record = self._records.records.get(f"data/{storage.key}")
        if record is None:
            raise CheckpointError(f"truncated: the file has no record for storage {storage.key!r:.40}")
        if storage.numel * itemsize != record.size:
            raise UnsafeCheckpointError(
                f"storage {storage.key!r:.40} is declared as {storage.numel} elements of {itemsize} bytes, "
                f"but the file holds {record.size} bytes for it"
            )
        return record

    # -- safetensors -----------------------------------------------------------
    def _open_safetensors(self) -> None:
        self._file.seek(0)
        head = self._file.read(512)
        length = struct.unpack_from("<Q", head)[0] if len(head) >= 9 else 0
        if not (len(head) >= 9 and head[8:9] == b"{" and length <= max(self.size, 100 << 20)):
            raise _unknown_format(head)
        if length > min(_MAX_HEADER, self.size - 8):
            raise UnsafeCheckpointError(f"a safetensors header of {length} bytes in a file of {self.size}")
        try:
            with safetensors.safe_open(self.path, "pt"):
                pass  # It checks the header: sizes, gaps, overlaps.
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"not a sound safetensors file: {error}") from error
        self._file.seek(8)
        header = json.loads(self._file.read(length), object_pairs_hook=_unique)
        self.metadata = header.pop("__metadata__", None) or {}
        self.root = {}
        for name, entry in header.items():
            dtype, shape = _SAFETENSORS_DTYPES.get(entry["dtype"]), tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            if dtype is None:
                self.root[name] = OtherTensor(f"{entry['dtype']} tensor")
                continue
            storage = StorageRef(name, dtype, math.prod(shape))
            self.root[name] = StoredTensor(storage, dtype, 0, shape, contiguous_stride(shape))
            self._spans[name] = (8 + length + begin, end - begin)

    # -- bytes ---------------------------------------------------------------
    @contextmanager
    def _storage(self, tensor: StoredTensor) -> Iterator[Callable[[list[View]], Iterator[tuple[View, torch.Tensor]]]]:
        """Reads one storage front to back, each span into a tensor of its own; then its checksum is compared."""
        storage, itemsize = tensor.storage, tensor.dtype.itemsize
        record = None
        if self._records is not None:
            record = self._record_of(storage, itemsize)
            offset, size = self._records.data_offset(record), record.size
        else:
            offset, size = self._spans[storage.key]
        progress = _Progress(self._file, offset, size)

        def read(views: list[View]) -> Iterator[tuple[View, torch.Tensor]]:
            for view in views:
                if view.end * itemsize > size:
                    raise UnsafeCheckpointError(
                        f"tensor {view.names[0]!r} reaches element {view.end} of a storage of {storage.numel}"
                    )
                progress.skip_to(view.start * itemsize)
                yield view, progress.take(view.end - view.start, view.tensor.dtype)

        yield read
        if record is not None and self._records is not None and self._records.has_checksums:
            progress.skip_to(size)
            if progress.crc != record.crc:
                raise CheckpointError(
                    f"damaged: a tensor's bytes ({record.name}) do not have the checksum that the file records; "
                    "copy or download it again"
                )


class _Progress:
    """A place in a record, and the CRC-32 of what lies before it."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size = file, offset, size
        self.position = self.crc = 0

    def take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        size = count * dtype.itemsize
        try:
            raw = torch.empty(size, dtype=torch.uint8)
        except (RuntimeError, MemoryError) as error:
            raise OutOfMemoryError(f"a tensor of {size} bytes does not fit in memory beside what is loaded") from error
        self._read(raw.numpy().data)
        return raw.view(dtype)

    def skip_to(self, position: int) -> None:
        chunk = memoryview(bytearray(min(1 << 20, max(0, position - self.position))))
        while self.position < position:
            self._read(chunk[: position - self.position])

    def _read(self, out: memoryview) -> None:
        self._file.seek(self._offset + self.position)
        self.crc = read_into(self._file, out, self.crc)
        self.position += len(out)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise CheckpointError("damaged: two entries of the safetensors header have one name")
    return out


def _unknown_format(head: bytes) -> CheckpointError:
    """What a file that is neither zip nor safetensors seems to be, and what to do about it."""
    if head.startswith(_LEGACY_MAGIC):
        return CheckpointError(f"saved in the format of torch before 1.6; save it again with {_RESAVE}")
    if head[257:262] == b"ustar":
        return CheckpointError(f"a tar file (the format of torch before 0.1.10, or an archive); {_RESAVE} converts one")
    if head.startswith(b"\x80"):
        return UnsafeCheckpointError(
            "a bare pickle, which could run code when read; nothing was read. Save the state dict with torch.save"
        )
    if head.startswith(b"version https://git-lfs"):
        return CheckpointError("a Git LFS pointer, not the file itself; run `git lfs pull`")
    if head.lstrip()[:1] == b"<":
        return CheckpointError("a web page, not a checkpoint; download the file itself")
    return CheckpointError(
        "not a checkpoint: neither a torch.save (zip) nor a safetensors file; give a .pt, .pth, .ckpt or .safetensors"
    )


@contextmanager
def open_checkpoint(path: str | os.PathLike[str]) -> Iterator[CheckpointFile]:
    """An open :class:`CheckpointFile`; errors within the block name the path.

    Raises:
        CheckpointError: missing, not a regular file, empty, truncated, damaged, or of another format.
        UnsafeCheckpointError: it asks for code to be run or for memory that its size cannot justify.
    """
    path = Path(path)
    try:
        # A named pipe would wait for a writer for ever: look before opening, and never block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise CheckpointError(f"cannot read {path}: it is {what}; give a checkpoint file")
        if status.st_size == 0:
            raise CheckpointError(f"cannot read {path}: the file is empty")
        try:
            yield CheckpointFile(path, file, status.st_size)
        except UnsafeCheckpointError as error:
            raise UnsafeCheckpointError(f"{path}: {str(error)[:_LONGEST_MESSAGE]}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {str(error)[:_LONGEST_MESSAGE]}") from error
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
