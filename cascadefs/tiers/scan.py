"""Walks extents from their first record to their last: what lies where, and whether it is what it says.

Owns: the walk, for whoever has no index to go by (rebuild.py). Changes nothing. Invariants:
(1) A record is reported only if its header, its place and the fingerprint of its payload are right.
(2) After anything else the walk goes on at the next multiple of ALIGN: damage hides nothing but itself.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cascadefs.ext import hashing
from cascadefs.formats.record import (
    HEADER_BYTES,
    MANIFEST,
    TAIL_BYTES,
    RecordHeader,
    align_up,
    decode_footer,
    decode_record_header,
    decode_tail,
    record_bytes,
)
from cascadefs.media import file_io
from cascadefs.media.file_io import ALIGN

STEP_BYTES = 1 << 20  # how much of a gap is read at once


@dataclass(frozen=True, slots=True)
class Found:
    """A good record: its header and, for a manifest, its payload."""

    extent: int
    header: RecordHeader
    payload: bytes


def extents(folder: Path) -> list[tuple[int, Path]]:
    """(number, file) of every extent, by number."""
    return sorted((int(path.stem), path) for path in folder.glob("*.cfx") if path.stem.isdigit())


def footer(fd: int, size_bytes: int) -> tuple[int, set[int]] | None:
    """(where the footer of a sealed extent starts, offsets of the records in it); None when it has none that is right."""
    if size_bytes < ALIGN + TAIL_BYTES:
        return None
    tail = decode_tail(_read(fd, size_bytes - TAIL_BYTES, TAIL_BYTES))
    if tail is None or not ALIGN <= tail[0] <= size_bytes - tail[1]:
        return None
    listed = decode_footer(_read(fd, tail[0], tail[1]))
    return (tail[0], {entry.offset for entry in listed[1]}) if listed is not None else None


def records(path: Path, number: int, secret: bytes) -> Iterator[Found | int]:
    """Good records, and now and then the position in bytes (for a progress bar). Blocks."""
    fd = file_io.open_file(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        found, at = footer(fd, size), ALIGN
        end = found[0] if found is not None else size
        while at < end:
            record = _record(fd, number, at, end, secret)
            if record is not None:
                at += record_bytes(record.header.length)
                yield record
            else:
                at = _next_candidate(fd, at + ALIGN, end)
            yield at
    finally:
        os.close(fd)


def _record(fd: int, number: int, at: int, end: int, secret: bytes) -> Found | None:
    header = decode_record_header(_read(fd, at, HEADER_BYTES))
    if header is None or header.offset != at or at + HEADER_BYTES + header.length > end:
        return None
    payload = _read(fd, at + HEADER_BYTES, header.length)
    if hashing.fingerprint(payload, secret) != header.fingerprint:
        return None
    return Found(number, header, payload if header.kind == MANIFEST else b"")


def _next_candidate(fd: int, at: int, end: int) -> int:
    """The next multiple of ALIGN at which a record may start: holes and zeros are passed quickly."""
    while at < end:
        try:
            at = align_up(os.lseek(fd, at, os.SEEK_DATA) - ALIGN + 1)
        except OSError:
            return end  # only a hole follows
        data = _read(fd, at, min(STEP_BYTES, end - at))
        for start in range(0, len(data), ALIGN):
            if data[start : start + 2] == b"CF":
                return at + start
        at += max(len(data), ALIGN)
    return end


def _read(fd: int, at: int, length: int) -> bytes:
    buffer = bytearray(length)
    with memoryview(buffer) as view:
        got = file_io.read_fully(fd, view, at)
    return bytes(buffer[:got])
