"""The cold tier: extents, append-only files that pack many records. FORMAT.md and record.py draw the bytes.

Owns: <store>/extents/*.cfx. Does not know what a block belongs to. Every method blocks: call it in a thread. Invariants:
(1) Bytes of a record are written once, at a multiple of 4096, with O_DIRECT where the filesystem has it.
(2) append() returns after fdatasync: whoever commits a location afterwards commits a durable one.
(3) Nothing is returned by read() whose length, place and fingerprint were not checked.
"""

import errno
import fcntl
import mmap
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cascadefs.config import MIB
from cascadefs.doors import open_private, private_folder
from cascadefs.errors import CorruptRecord
from cascadefs.ext import hashing
from cascadefs.record import (
    ALIGN,
    HEADER_BYTES,
    RecordHeader,
    align_up,
    decode_record_header,
    encode_extent_header,
    encode_footer,
    encode_record_header,
    record_bytes,
)
from cascadefs.types import Location

LUSTRE_MAGIC = 0x0BD00BD0
WRITE_BYTES = 8 * MIB  # two blocks a write: larger gained nothing on ext4, smaller loses on Lustre
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE = 1, 2


@dataclass(frozen=True, slots=True)
class Piece:
    """`length` bytes at `offset` of an open file, which have `fingerprint`; `bid` is handed through."""

    bid: int
    fingerprint: bytes
    fd: int
    offset: int
    length: int


class ColdTier:
    """Extents of one store. `store_id` and `secret` as in store.json."""

    def __init__(self, folder: Path, store_id: str, secret: bytes) -> None:
        private_folder(folder)
        self.folder, self._store_id, self._secret = folder, bytes.fromhex(store_id), secret
        self.on_lustre = filesystem_magic(folder) == LUSTRE_MAGIC

    def path(self, number: int) -> Path:
        """The file of an extent."""
        return self.folder / f"{number:08d}.cfx"

    def create(self, number: int) -> int:
        """A new extent with its header; returns the size in bytes. A file of that number that nothing knows is replaced."""
        path = self.path(number)
        path.unlink(missing_ok=True)
        if self.on_lustre and (lfs := shutil.which("lfs")):
            subprocess.run([lfs, "setstripe", "-c", "16", "-S", "4m", path], check=False, timeout=60, capture_output=True)
        fd = open_private(path, os.O_WRONLY | os.O_CREAT)
        try:
            os.pwrite(fd, encode_extent_header(self._store_id, number), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        sync_folder(self.folder)
        return ALIGN

    def append(self, number: int, position: int, pieces: Sequence[Piece]) -> tuple[list[tuple[int, Location]], int]:
        """Write pieces as records from `position` on; ((bid, location) list, new end). EIO if a piece changed under us.

        Bytes past `position` that no index knows (a crash) are cut off first.
        """
        fd = open_direct(self.path(number), os.O_RDWR)
        try:
            os.ftruncate(fd, position)
            placed = []
            for batch in _batches(pieces):
                locations, data = self._pack(number, position, batch)
                with data:
                    _write_fully(fd, data, position)
                position += sum(record_bytes(piece.length) for piece in batch)
                placed += locations
            os.fdatasync(fd)
        finally:
            os.close(fd)
        return placed, position

    def _pack(self, number: int, position: int, batch: Sequence[Piece]) -> tuple[list[tuple[int, Location]], mmap.mmap]:
        """Records of `batch` in one page-aligned buffer."""
        data = mmap.mmap(-1, sum(record_bytes(piece.length) for piece in batch))
        view, at, locations = memoryview(data), 0, []
        for piece in batch:
            payload = view[at + HEADER_BYTES : at + HEADER_BYTES + piece.length]
            if not self._still_there(piece, payload):
                raise CorruptRecord(f"block {piece.fingerprint.hex()} changed in memory before it was written")
            header = encode_record_header(RecordHeader(piece.fingerprint, piece.length, position + at))
            view[at : at + HEADER_BYTES] = header
            locations.append((piece.bid, Location(number, position + at, piece.length)))
            at += record_bytes(piece.length)
            payload.release()
        view.release()
        return locations, data

    def _still_there(self, piece: Piece, payload: memoryview) -> bool:
        """Read a piece; False when its file was opened for writing meanwhile and is another one now, or shorter."""
        try:
            return hashing.read_fingerprint(piece.fd, piece.offset, payload, self._secret) == piece.fingerprint
        except OSError:
            if os.fstat(piece.fd).st_size < piece.offset + piece.length:
                return False
            raise

    def seal(self, number: int, position: int, records: Sequence[tuple[bytes, int, int]]) -> int:
        """Write the footer at `position`; returns the final size in bytes."""
        footer = encode_footer(number, position, [RecordHeader(f, length, offset) for f, offset, length in records])
        fd = open_private(self.path(number), os.O_RDWR)
        try:
            os.ftruncate(fd, position)
            _write_fully(fd, footer, position)
            os.fsync(fd)
        finally:
            os.close(fd)
        return position + len(footer)

    def read(self, at: Location, fingerprint: bytes) -> tuple[mmap.mmap, memoryview]:
        """(buffer, view of the payload in it), verified. The caller releases the view, then closes the buffer."""
        buffer = mmap.mmap(-1, record_bytes(at.length))
        try:
            fd = open_direct(self.path(at.extent), os.O_RDONLY)
            try:
                _read_fully(fd, buffer, at.offset)
            finally:
                os.close(fd)
            header = decode_record_header(buffer[:HEADER_BYTES])
            payload = memoryview(buffer)[HEADER_BYTES : HEADER_BYTES + at.length]
            expected = RecordHeader(fingerprint, at.length, at.offset)
            if header == expected and hashing.fingerprint(payload, self._secret) == fingerprint:
                return buffer, payload
            payload.release()
        except FileNotFoundError:
            pass  # reported below like any other loss: the record is not there
        buffer.close()
        raise CorruptRecord(f"record {at.extent}:{at.offset} is damaged")

    def punch(self, at: Location) -> None:
        """Give the space of a dead record back to the filesystem, where it can."""
        try:
            fd = open_private(self.path(at.extent), os.O_RDWR)
        except FileNotFoundError:
            return  # the whole extent went before
        try:
            punch_hole(fd, at.offset, record_bytes(at.length))
        finally:
            os.close(fd)

    def remove(self, number: int) -> None:
        """Delete an extent without live records."""
        self.path(number).unlink(missing_ok=True)

    def allocated_bytes(self) -> int:
        """What the extents take on disk."""
        return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(self.folder))


def _batches(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Group so that a group is about WRITE_BYTES long."""
    groups: list[list[Piece]] = []
    filled = 0
    for piece in pieces:
        if not groups or filled + record_bytes(piece.length) > WRITE_BYTES + ALIGN * 2:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += record_bytes(piece.length)
    return groups


def open_direct(path: Path, flags: int) -> int:
    """Open with O_DIRECT, without where the filesystem refuses it (tmpfs of old kernels)."""
    try:
        return open_private(path, flags | os.O_DIRECT)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        return open_private(path, flags)


def _write_fully(fd: int, data: "mmap.mmap | bytes", position: int) -> None:
    view = memoryview(data)
    try:
        done = 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], position + done)
    finally:
        view.release()


def _read_fully(fd: int, buffer: mmap.mmap, position: int) -> None:
    with memoryview(buffer) as view:
        done = 0
        while done < len(view):
            got = os.preadv(fd, [view[done:]], position + done)
            if got == 0:
                raise CorruptRecord(f"extent ends at {position + done}")
            done += got
            if got % ALIGN and done < len(view):
                raise CorruptRecord(f"extent ends at {position + done}")


def punch_hole(fd: int, offset: int, length: int) -> None:
    """fallocate(PUNCH_HOLE | KEEP_SIZE); a filesystem without it keeps the space."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    mode = FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE
    if libc.fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) and ctypes.get_errno() != errno.EOPNOTSUPP:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def filesystem_magic(folder: Path) -> int:
    """f_type of statfs(2): tells Lustre from the rest. Python's statvfs does not carry it."""
    import ctypes

    buffer = (ctypes.c_long * 32)()
    libc = ctypes.CDLL(None, use_errno=True)
    return buffer[0] if libc.statfs(os.fsencode(folder), buffer) == 0 else 0


def lease_is_free(read_only_fd: int) -> bool:
    """Whether no writable descriptor and no writable mapping of the file exists: the sealing rule."""
    try:
        fcntl.fcntl(read_only_fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as e:
        if e.errno == errno.EAGAIN:
            return False
        raise
    fcntl.fcntl(read_only_fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


__all__ = ["ColdTier", "Piece", "align_up", "lease_is_free", "open_direct", "punch_hole", "sync_folder"]
