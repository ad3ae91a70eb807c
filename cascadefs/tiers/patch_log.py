"""Logs of patches: what changed in an open file since its last whole version, one file in STORE/patches for each such inode.

Owns: the files. Knows no index: which log counts is said there. Everything blocks. Invariants:
(1) append() returns after fdatasync, create() when the name is durable, too.
(2) A log whose append() failed is never appended to again.
(3) The payload of a patch is what its fingerprint was computed from. Reading ends before the first that is not whole: its
    append never returned.
"""

import os
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from mmap import mmap
from pathlib import Path

from cascadefs.crash import point
from cascadefs.ext import hashing
from cascadefs.formats.record import (
    PATCH_HEADER_BYTES,
    RANGE_BYTES,
    LogHeader,
    PatchHeader,
    decode_log_header,
    decode_patch_header,
    decode_ranges,
    encode_log_header,
    encode_patch_header,
    encode_ranges,
    patch_bytes,
)
from cascadefs.media import file_io
from cascadefs.media.file_io import ALIGN

# Zeros are written ahead of small patches: to overwrite and sync a page takes the disk here 45 us, to extend a file by one 80
# at the median and 2000 to 4000 in one of ten, because the filesystem commits its new size each time.
ROOM_BYTES, LARGE_BYTES = 1 << 20, 256 << 10
FOLDER = "patches"
Range = tuple[int, int]  # offset and length


@dataclass(frozen=True, slots=True)
class Patch:
    """A patch that is whole."""

    header: PatchHeader
    payload: bytes

    def parts(self) -> Iterator[tuple[int, memoryview]]:
        """(offset in the file, bytes) of each range."""
        at = self.header.ranges * RANGE_BYTES
        view = memoryview(self.payload)
        for offset, length in decode_ranges(view[:at]):
            yield offset, view[at : at + length]
            at += length


class PatchLog:
    """One log that is written to, by one caller at a time."""

    def __init__(self, folder: Path, header: LogHeader, secret: bytes) -> None:
        self.header, self.path = header, path_of(folder, header.ino, header.number)
        self.end = ALIGN  # of the last patch
        self._secret, self._room, self._count = secret, 0, 0

    def create(self, store_id: bytes) -> None:
        """The file, and its name."""
        if file_io.make_folder(self.path.parent):
            file_io.sync_folder(self.path.parent.parent)
        fd = file_io.open_file(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            file_io.write_fully(fd, encode_log_header(store_id, self.header) + bytes(ROOM_BYTES), 0)
            file_io.sync_file(fd)
        finally:
            os.close(fd)
        file_io.sync_folder(self.path.parent)
        self._room = ALIGN + ROOM_BYTES

    def pack(self, buffer: mmap, draft: PatchHeader, ranges: Sequence[Range], file_fd: int) -> int:
        """The next patch at the beginning of a buffer that is large enough, with the bytes that these ranges of a file have
        now; its length there. `draft` says size and times."""
        told = encode_ranges(ranges)
        end = at = PATCH_HEADER_BYTES + len(told)
        with memoryview(buffer) as view:
            view[PATCH_HEADER_BYTES:at] = told
            for offset, length in ranges:
                end = at + length
                with view[at:end] as part:
                    got = file_io.read_fully(file_fd, part, offset)
                    part[got:] = bytes(length - got)  # it has shrunk meanwhile
                at = end
            length = end - PATCH_HEADER_BYTES
            with view[PATCH_HEADER_BYTES:end] as payload:
                fingerprint = hashing.fingerprint(payload, self._secret)
            header = replace(
                draft, fingerprint=fingerprint, number=self.header.number, place=self._count, ranges=len(ranges), length=length
            )
            view[:PATCH_HEADER_BYTES] = encode_patch_header(header)
            view[end : patch_bytes(length)] = bytes(patch_bytes(length) - end)
        return patch_bytes(length)

    def append(self, buffer: mmap, used: int) -> None:
        """What pack() has made."""
        fd = file_io.open_direct(self.path, os.O_RDWR)
        try:
            with memoryview(buffer) as view, view[:used] as part:
                file_io.write_fully(fd, part, self.end)
            end = self.end + used
            if end > self._room and used < LARGE_BYTES:
                with mmap(-1, ROOM_BYTES) as zeros:
                    file_io.write_fully(fd, zeros, end)
                self._room = end + ROOM_BYTES
            point("written")
            file_io.sync_data(fd)
        finally:
            os.close(fd)
        self.end, self._count = end, self._count + 1


def path_of(folder: Path, ino: int, number: int) -> Path:
    """A log's file."""
    return folder / f"{ino}-{number}"


def known(folder: Path) -> list[tuple[int, int]]:
    """(inode, number) of the logs that there are."""
    names = [name.split("-") for name in os.listdir(folder)] if folder.is_dir() else []
    return sorted((int(one[0]), int(one[1])) for one in names if len(one) == 2 and all(part.isdigit() for part in one))


def remove_all_but(folder: Path, kept: Container[tuple[int, int]]) -> None:
    """Logs that no index names."""
    for one in known(folder):
        if one not in kept:
            with suppress(OSError):  # at the next opening
                file_io.remove(path_of(folder, *one))


def read_header(path: Path | str) -> LogHeader | None:
    """None: it is no log."""
    try:
        fd = file_io.open_file(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        found = decode_log_header(_read(fd, 0, ALIGN))
    finally:
        os.close(fd)
    return found[1] if found is not None else None


def read(path: Path | str, secret: bytes) -> Iterator[Patch]:
    """The patches of a log, in order, as far as they are whole. OSError."""
    header = read_header(path)
    fd, at, place = file_io.open_file(path, os.O_RDONLY), ALIGN, 0
    try:
        while header is not None and (found := _patch(fd, at, header.number, place, secret)) is not None:
            yield found
            at, place = at + patch_bytes(found.header.length), place + 1
    finally:
        os.close(fd)


def _patch(fd: int, at: int, number: int, place: int, secret: bytes) -> Patch | None:
    header = decode_patch_header(_read(fd, at, PATCH_HEADER_BYTES))
    if header is None or (header.number, header.place) != (number, place):
        return None
    payload = _read(fd, at + PATCH_HEADER_BYTES, header.length)
    if len(payload) < header.length or hashing.fingerprint(payload, secret) != header.fingerprint:
        return None
    return Patch(header, payload)


def apply(path: Path | str, secret: bytes, fd: int) -> PatchHeader | None:
    """Change a file that holds the base into what was durable; the last patch's header, None when there is none."""
    last = None
    for patch in read(path, secret):
        file_io.truncate(fd, patch.header.size_bytes)
        for offset, part in patch.parts():
            file_io.write_fully(fd, part, offset)
        last = patch.header
    return last


def _read(fd: int, at: int, length: int) -> bytes:
    length = min(length, max(0, os.fstat(fd).st_size - at))  # a damaged header may say anything
    buffer = bytearray(length)
    with memoryview(buffer) as view:
        got = file_io.read_fully(fd, view, at)
    return bytes(buffer[:got])
