"""The records of a torch checkpoint: an uncompressed zip file, read without trusting what it says about itself.

Every declared size is compared with the file before anything is allocated, and every record that is read is checked
against its CRC-32. Python's ``zipfile`` is not used: it builds a large object per entry and inflates compressed ones.

Source: PKWARE APPNOTE.TXT 6.3.10, sections 4.3 and 4.5.3 (zip64).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from gear_engine.errors import CheckpointError, UnsafeCheckpointError

__all__ = ["MAX_RECORDS", "Record", "RecordFile", "read_into"]

#: A stage-1 file of the largest published model with all its optimizer states has about 5,000.
MAX_RECORDS = 100_000

_EOCD = struct.Struct("<4sHHHHIIH")
_EOCD64_LOCATOR = struct.Struct("<4sIQI")
_EOCD64 = struct.Struct("<4sQHHIIQQQQ")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_MAX_COMMENT = 0xFFFF
_CHUNK = 4 << 20
_DIRECTORY_LIMIT = 32 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """One stored (uncompressed) zip entry: ``size`` bytes whose local header is at ``header_offset``."""

    name: str
    header_offset: int
    size: int
    crc: int


class RecordFile:
    """An open zip file of stored records, by name without the archive's own folder.

    Attributes:
        records: name (``"data.pkl"``, ``"data/0"``) -> :class:`Record`.
        has_checksums: false for files written with ``torch.serialization.set_crc32_options(False)``.

    Raises:
        CheckpointError: truncated or damaged.
        UnsafeCheckpointError: compressed or overlapping records, sizes beyond the file, duplicates, too many records.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.size = size
        entries, directory_offset = _read_directory(file, size)
        self.records = _strip_archive_name(entries)
        self.has_checksums = any(record.crc for record in entries)
        _check_layout(entries, directory_offset)

    def data_offset(self, record: Record) -> int:
        """Where the record's bytes begin; its local header must agree with the directory."""
        header = _read_at(self._file, record.header_offset, _LOCAL.size)
        fields = _LOCAL.unpack(header)
        name_length, extra_length = fields[9], fields[10]
        if fields[0] != b"PK\x03\x04" or fields[3] != 0:
            raise CheckpointError(f"damaged: no local header for record {record.name!r}")
        name = _read_at(self._file, record.header_offset + _LOCAL.size, name_length)
        offset = record.header_offset + _LOCAL.size + name_length + extra_length
        if name != record.name.encode() or offset + record.size > self.size:
            raise CheckpointError(f"damaged: the local header of record {record.name!r} disagrees with the directory")
        return int(offset)

    def read(self, record: Record) -> bytes:
        """The whole record, checked."""
        buffer = bytearray(record.size)
        self.read_into(record, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, record: Record, out: memoryview) -> None:
        """Fills ``out`` (``record.size`` bytes) and compares the CRC-32.

        Raises:
            CheckpointError: truncated, or the checksum differs.
        """
        self._file.seek(self.data_offset(record))
        crc = read_into(self._file, out)
        if self.has_checksums and crc != record.crc:
            raise CheckpointError(
                f"damaged: record {record.name!r} has CRC-32 {crc:08x}, its directory entry says {record.crc:08x}; "
                "copy or download the file again"
            )


def read_into(file: BinaryIO, out: memoryview, crc: int = 0) -> int:
    """Fills ``out`` from the file's position; returns the CRC-32 of what was read, going on from ``crc``."""
    position = 0
    while position < len(out):
        part = out[position : position + _CHUNK]
        count = file.readinto(part)  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError("truncated: the file ends early")
        crc = zlib.crc32(part[:count], crc)
        position += count
    return crc


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = bytearray(size)
    read_into(file, memoryview(data))
    return bytes(data)


def _read_directory(file: BinaryIO, size: int) -> tuple[list[Record], int]:
    """All entries of the central directory and the directory's offset."""
    count, length, offset, end = _find_directory(file, size)
    if count > MAX_RECORDS:
        raise UnsafeCheckpointError(f"{count} zip records; a checkpoint has at most {MAX_RECORDS}")
    if length > _DIRECTORY_LIMIT or offset + length > end or count * _CENTRAL.size > length:
        raise UnsafeCheckpointError(
            f"the zip directory claims {count} records in {length} bytes at {offset}, in a file of {size} bytes"
        )
    data = _read_at(file, offset, length)
    entries, position = [], 0
    for _ in range(count):
        if position + _CENTRAL.size > length:
            raise CheckpointError("damaged: the zip directory ends early")
        record, position = _parse_entry(data, position, offset)
        entries.append(record)
    if position != length:
        raise CheckpointError("damaged: the zip directory has bytes after its last entry")
    return entries, offset


def _find_directory(file: BinaryIO, size: int) -> tuple[int, int, int, int]:
    """(entries, bytes, offset, where the end record begins) of the central directory."""
    tail_size = min(size, _EOCD.size + _MAX_COMMENT)
    tail = _read_at(file, size - tail_size, tail_size)
    position = tail.rfind(b"PK\x05\x06")
    if position < 0 or position + _EOCD.size > len(tail):
        raise CheckpointError(
            "truncated: a zip file (torch.save format) without its directory at the end; copy or download it again"
        )
    end = size - tail_size + position
    _, disk, _, _, count, length, offset, comment = _EOCD.unpack_from(tail, position)
    if position + _EOCD.size + comment != len(tail):
        raise CheckpointError("damaged: bytes after the end of the zip directory")
    locator_at = end - _EOCD64_LOCATOR.size
    if locator_at >= 0:
        locator = _EOCD64_LOCATOR.unpack(_read_at(file, locator_at, _EOCD64_LOCATOR.size))
        if locator[0] == b"PK\x06\x07":
            end = locator[2]
            if end + _EOCD64.size > size:
                raise CheckpointError("damaged: the zip64 directory record lies outside the file")
            fields = _EOCD64.unpack(_read_at(file, end, _EOCD64.size))
            if fields[0] != b"PK\x06\x06":
                raise CheckpointError("damaged: no zip64 directory record where the file says it is")
            disk, count, length, offset = fields[4], fields[7], fields[8], fields[9]
    if disk != 0:
        raise CheckpointError("the zip file is split over several volumes")
    return count, length, offset, end


def _parse_entry(data: bytes, position: int, limit: int) -> tuple[Record, int]:
    fields = _CENTRAL.unpack_from(data, position)
    signature, _, _, flags, method, _, _, crc, packed, size = fields[:10]
    name_length, extra_length, comment_length = fields[10:13]
    offset = fields[16]
    if signature != b"PK\x01\x02":
        raise CheckpointError("damaged: the zip directory holds something that is no entry")
    position += _CENTRAL.size
    end = position + name_length + extra_length + comment_length
    if end > len(data):
        raise CheckpointError("damaged: a zip entry reaches beyond the directory")
    try:
        name = data[position : position + name_length].decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError("damaged: a zip entry's name is not UTF-8") from error
    wide = _zip64_values(data[position + name_length : end - comment_length])
    size = next(wide, size) if size == 0xFFFFFFFF else size
    packed = next(wide, packed) if packed == 0xFFFFFFFF else packed
    offset = next(wide, offset) if offset == 0xFFFFFFFF else offset
    if flags & 1:
        raise CheckpointError(f"record {name!r} is encrypted")
    if method != 0 or packed != size:
        raise UnsafeCheckpointError(
            f"record {name!r} is compressed ({packed} bytes for {size}); torch.save stores its records as they are; "
            "TorchScript programs are not read. Save the state dict with torch.save"
        )
    if offset + _LOCAL.size + size > limit:
        raise UnsafeCheckpointError(f"record {name!r} claims {size} bytes at {offset}, beyond the {limit} there are")
    return Record(name, offset, size, crc), end


def _zip64_values(extra: bytes) -> Iterator[int]:
    """The 8-byte values of the zip64 extra field, in order."""
    position = 0
    while position + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, position)
        position += 4
        if tag == 1:
            for start in range(position, min(position + length, len(extra)) - 7, 8):
                yield struct.unpack_from("<Q", extra, start)[0]
            return
        position += length


def _check_layout(entries: list[Record], directory_offset: int) -> None:
    """No two records share bytes (they would be read as often as they are listed)."""
    end, before = 0, ""
    for record in sorted(entries, key=lambda record: record.header_offset):
        if record.header_offset < end:
            raise UnsafeCheckpointError(f"zip records {before!r} and {record.name!r} overlap")
        end, before = record.header_offset + _LOCAL.size + record.size, record.name
    if end > directory_offset:
        raise UnsafeCheckpointError(f"zip record {before!r} overlaps the directory")


def _strip_archive_name(entries: list[Record]) -> dict[str, Record]:
    """Records by their name below the archive's one folder; torch names that folder after the file."""
    records: dict[str, Record] = {}
    folder = None
    for record in entries:
        head, slash, name = record.name.partition("/")
        if not slash or not name or (folder is not None and head != folder):
            raise CheckpointError(
                f"not a torch checkpoint: zip record {record.name!r} is not below "
                + (f"{folder!r}" if folder else "a folder")
            )
        folder = head
        if name in records:
            raise UnsafeCheckpointError(f"two zip records are called {record.name!r}")
        records[name] = record
    return records
