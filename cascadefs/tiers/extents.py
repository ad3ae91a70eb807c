"""The cold tier: extents, append-only files that pack many records. FORMAT.md and record.py draw the bytes.

Owns: <store>/extents/*.cfx. Does not know what a block belongs to. Every method blocks: call it in a thread. Invariants:
(1) Bytes of a record are written once, at a multiple of 4096, with O_DIRECT where the filesystem has it; long zeros are holes.
(2) append() returns after fdatasync: whoever commits a location afterwards commits a durable one.
(3) Nothing is returned by read() whose length, place and fingerprint were not checked.
"""

import contextlib
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cascadefs.config import MIB
from cascadefs.crash import point
from cascadefs.errors import CorruptRecord, UnreadableCopy
from cascadefs.ext import hashing
from cascadefs.formats.record import (
    BLOCK,
    HEADER_BYTES,
    MANIFEST,
    RecordHeader,
    decode_record_header,
    encode_extent_header,
    encode_footer,
    encode_record_header,
    record_bytes,
)
from cascadefs.media import file_io
from cascadefs.media.file_io import ALIGN
from cascadefs.media.transfers import Buffers, Writes, page_buffer
from cascadefs.types import Location

LUSTRE_MAGIC = 0x0BD00BD0
Turn = contextlib.AbstractContextManager[object, bool | None]  # a lock
AT_ONCE: Turn = contextlib.nullcontext()
WRITE_BYTES = 8 * MIB  # two blocks a write: larger gained nothing on ext4, smaller loses on Lustre


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
        file_io.make_folder(folder)
        self.folder, self._store_id, self.secret = folder, bytes.fromhex(store_id), secret
        self.buffers = Buffers()
        self.on_lustre = file_io.filesystem_magic(folder) == LUSTRE_MAGIC

    def path(self, number: int) -> Path:
        """The file of an extent."""
        return self.folder / f"{number:08d}.cfx"

    def create(self, number: int) -> int:
        """A new extent with its header; returns the size in bytes. A file of that number that nothing knows is replaced."""
        path = self.path(number)
        file_io.remove(path)
        if self.on_lustre and (lfs := shutil.which("lfs")):
            subprocess.run([lfs, "setstripe", "-c", "16", "-S", "4m", path], check=False, timeout=60, capture_output=True)
        fd = file_io.open_file(path, os.O_WRONLY | os.O_CREAT)
        try:
            file_io.write_fully(fd, encode_extent_header(self._store_id, number), 0)
            file_io.sync_file(fd)
        finally:
            os.close(fd)
        file_io.sync_folder(self.folder)
        return ALIGN

    def append(
        self, number: int, position: int, pieces: Sequence[Piece], manifest: bytes | None = None
    ) -> tuple[list[tuple[int, Location]], int]:
        """Write pieces as records from `position` on; ((bid, location) list, new end). EIO if a piece changed under us.

        A manifest goes behind them as a record of its own, which ends at the new end. Bytes past `position` that no index
        knows (a crash) are cut off first.
        """
        fd = file_io.open_direct(self.path(number), os.O_RDWR)
        try:
            file_io.truncate(fd, position)
            start = position
            try:
                placed, position = self._write_batches(fd, number, position, _batches(pieces))
                if manifest is not None:
                    with self.pack_manifest(position, manifest) as data:
                        file_io.write_fully(fd, data, position)
                    position += record_bytes(len(manifest))
            except OSError:
                with contextlib.suppress(OSError):
                    file_io.truncate(fd, start)  # a full disk gets back at once what a half batch took
                raise
            point("written")
            file_io.sync_data(fd)
        finally:
            os.close(fd)
        return placed, position

    def pack_manifest(self, position: int, manifest: bytes) -> mmap.mmap:
        """The record of a manifest that will lie at `position`."""
        data = mmap.mmap(-1, record_bytes(len(manifest)))
        fingerprint = hashing.fingerprint(manifest, self.secret)
        header = encode_record_header(RecordHeader(fingerprint, len(manifest), position, MANIFEST))
        data[: HEADER_BYTES + len(manifest)] = header + manifest
        return data

    def _write_batches(
        self, fd: int, number: int, position: int, batches: Sequence[Sequence[Piece]]
    ) -> tuple[list[tuple[int, Location]], int]:
        """Write each batch; the next is packed while the last is on its way. A single one needs no thread."""
        placed = list[tuple[int, Location]]()
        if len(batches) == 1:
            data = self.buffers.take(max(MIB, size := _total(batches[0])))  # of a length that is kept
            try:
                placed = self._pack(number, position, batches[0], data)
                with memoryview(data) as view, view[:size] as part:
                    file_io.write_with_holes(fd, part, position)
            finally:
                self.buffers.give(data)
            return placed, position + size
        with Writes(fd, self.buffers) as writes:
            for batch in batches:
                data = writes.buffer(size := _total(batch))
                placed += self._pack(number, position, batch, data)
                writes.put(data, size, position)
                position += size
            writes.finish()
        return placed, position

    def _pack(self, number: int, position: int, batch: Sequence[Piece], data: mmap.mmap) -> list[tuple[int, Location]]:
        """Records of `batch`, one after the other, at the beginning of a buffer that may hold other bytes."""
        at, locations = 0, list[tuple[int, Location]]()
        with memoryview(data) as view:
            for piece in batch:
                end = at + HEADER_BYTES + piece.length
                with view[at + HEADER_BYTES : end] as payload:
                    self._read_piece(piece, payload)
                view[at : at + HEADER_BYTES] = encode_record_header(
                    RecordHeader(piece.fingerprint, piece.length, position + at)
                )
                locations.append((piece.bid, Location(number, position + at, piece.length)))
                at += record_bytes(piece.length)
                view[end:at] = bytes(at - end)
        return locations

    def _read_piece(self, piece: Piece, payload: memoryview) -> None:
        try:
            found = hashing.read_fingerprint(piece.fd, piece.offset, payload, self.secret)
        except OSError as e:
            raise UnreadableCopy(e, piece.bid) from e  # or it was opened for writing meanwhile, and cut
        if found != piece.fingerprint:
            raise CorruptRecord(f"block {piece.fingerprint.hex()} changed in memory before it was written")

    def seal(self, number: int, position: int, records: Sequence[tuple[bytes, int, int]]) -> int:
        """Write the footer at `position`; returns the final size in bytes."""
        footer = encode_footer(number, position, [RecordHeader(f, length, offset) for f, offset, length in records])
        fd = file_io.open_file(self.path(number), os.O_RDWR)
        try:
            file_io.truncate(fd, position)
            file_io.write_fully(fd, footer, position)
            file_io.sync_file(fd)
        finally:
            os.close(fd)
        return position + len(footer)

    def verify(self, at: Location, fingerprint: bytes, kind: bytes = BLOCK) -> None:
        """Read a record as read() does, padding included, and drop it. CorruptRecord when a byte of it is wrong."""
        buffer, payload = self.read(at, fingerprint, kind)
        payload.release()
        padding = buffer[HEADER_BYTES + at.length :]
        buffer.close()
        if any(padding):
            raise CorruptRecord(f"the padding of record {at.extent}:{at.offset} is damaged")

    def read(self, at: Location, fingerprint: bytes, kind: bytes = BLOCK) -> tuple[mmap.mmap, memoryview]:
        """(buffer, view of the payload in it), verified. The caller releases the view, then closes the buffer."""
        buffer = page_buffer(record_bytes(at.length))
        try:
            return buffer, self.read_into(buffer, at, fingerprint, kind)
        except BaseException:
            buffer.close()
            raise

    def read_into(
        self, buffer: mmap.mmap, at: Location, fingerprint: bytes, kind: bytes = BLOCK, turn: Turn = AT_ONCE
    ) -> memoryview:
        """View of the payload, verified, in a buffer of at least record_bytes(at.length). `turn` is held while it is on its way
        from the disk, and not while it is checked."""
        self._fetch(buffer, at, turn)
        header = decode_record_header(buffer[:HEADER_BYTES])
        payload = memoryview(buffer)[HEADER_BYTES : HEADER_BYTES + at.length]
        expected = RecordHeader(fingerprint, at.length, at.offset, kind)
        if header == expected and hashing.fingerprint(payload, self.secret) == fingerprint:
            return payload
        payload.release()
        raise CorruptRecord(f"record {at.extent}:{at.offset} is damaged")

    def _fetch(self, buffer: mmap.mmap, at: Location, turn: Turn) -> None:
        """The bytes of a record, whatever they are."""
        wanted = record_bytes(at.length)
        try:
            fd = file_io.open_direct(self.path(at.extent), os.O_RDONLY)
        except FileNotFoundError:  # reported like any other loss: the record is not there
            raise CorruptRecord(f"record {at.extent}:{at.offset} is damaged") from None
        try:
            with memoryview(buffer) as view, view[:wanted] as part, turn:
                got = file_io.read_fully(fd, part, at.offset)
        finally:
            os.close(fd)
        if got < wanted:
            raise CorruptRecord(f"extent {at.extent} ends at {at.offset + got}")

    def punch(self, dead: Iterable[Location]) -> None:
        """Give the space of dead records back to the filesystem, where it can: neighbours in one hole, for each hole costs the
        filesystem a transaction. Where it cannot, the space stays with them until their extent dies: a leak, no loss."""
        for extent, holes in holes_of(dead).items():
            with contextlib.suppress(OSError):  # also: the whole extent went before
                fd = file_io.open_file(self.path(extent), os.O_RDWR)
                try:
                    if os.fstat(fd).st_nlink > 1:
                        continue  # a copy of the store, made by hard links, may need them
                    for begin, end in holes:
                        file_io.punch_hole(fd, begin, end - begin)
                finally:
                    os.close(fd)

    def remove(self, number: int) -> None:
        """Delete an extent without live records."""
        file_io.remove(self.path(number))

    def room_bytes(self) -> int:
        """What may be appended: the disk needs some of what is free to keep track of it. Nothing where somebody took the store
        away."""
        try:
            space = os.statvfs(self.folder)
        except FileNotFoundError:
            return 0
        return space.f_bavail * space.f_frsize // 8 * 7

    def allocated_bytes(self) -> int:
        """What the extents take on disk."""
        with contextlib.suppress(FileNotFoundError):  # somebody took the store away, or one extent went meanwhile
            return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(self.folder))
        return 0


def holes_of(dead: Iterable[Location]) -> dict[int, list[tuple[int, int]]]:
    """extent -> [(begin, end)] of the records, ascending; those that touch each other are one."""
    found: dict[int, list[tuple[int, int]]] = {}
    for at in sorted(dead, key=lambda at: (at.extent, at.offset)):
        holes, end = found.setdefault(at.extent, []), at.offset + record_bytes(at.length)
        if holes and holes[-1][1] == at.offset:
            holes[-1] = holes[-1][0], end
        else:
            holes.append((at.offset, end))
    return found


def _total(batch: Sequence[Piece]) -> int:
    return sum(record_bytes(piece.length) for piece in batch)


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


def parts_of(pieces: Sequence[Piece], limit_bytes: int) -> Iterator[list[Piece]]:
    """Groups of at most `limit_bytes`, or of one piece."""
    part, total = list[Piece](), 0
    for piece in pieces:
        if part and total + piece.length > limit_bytes:
            yield part
            part, total = [], 0
        part.append(piece)
        total += piece.length
    if part:
        yield part
