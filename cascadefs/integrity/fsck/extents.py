"""Checks of the extents: every byte from the header page to the tail is what it should be.

Owns: a reader of the format of its own, written from FORMAT.md, so that a fault of record.py cannot hide itself. Reads past the
page cache where the filesystem allows it. Changes nothing.
"""

import os
import sqlite3
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from cascadefs.ext import hashing
from cascadefs.integrity.fsck.names import Paths
from cascadefs.integrity.fsck.report import Places, Progress, Report
from cascadefs.media import file_io
from cascadefs.media.transfers import page_buffer

PAGE = 4096
HEAD = struct.Struct("<4sI16sQQ16sQ")
FOOT, ENTRY, TAIL = struct.Struct("<4sIQQ"), struct.Struct("<16sQQ"), struct.Struct("<4sIQQQ")
BLOCK, MANIFEST = b"CFRC", b"CFMN"
BUFFER_BYTES = 4 << 20 | 1 << 16


@dataclass(frozen=True, slots=True)
class Expected:
    """A record that the index knows. `key`: the block's number, or the manifest's."""

    kind: bytes
    fingerprint: bytes
    length: int
    key: int


def header_page(store_id: str, number: int) -> bytes:
    """What the first page of an extent holds."""
    body = struct.pack("<4sI16sQ", b"CFXT", 1, bytes.fromhex(store_id), number)
    return (body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))).ljust(PAGE, b"\0")


def frame(kind: bytes, fingerprint: bytes, length: int, offset: int) -> bytes:
    """The header of a record."""
    body = HEAD.pack(kind, 1, fingerprint, length, offset, bytes(16), 0)[:-8]
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


def record_size(length: int) -> int:
    """Header, payload and padding."""
    return -(-(HEAD.size + length) // PAGE) * PAGE


class Extent:
    """One file, and what the index knows of it."""

    def __init__(self, number: int, path: Path, size: int, sealed: bool, known: dict[int, Expected]) -> None:
        self.number, self.size, self.sealed, self.known = number, size, sealed, known
        self._fd = file_io.open_direct(path, os.O_RDONLY)
        self.file_size = os.fstat(self._fd).st_size
        self._buffer = page_buffer(BUFFER_BYTES)
        self.hole_bytes = 0  # between records, where nothing is read

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def read(self, at: int, length: int) -> memoryview:
        """Bytes at a multiple of PAGE; fewer at the end of the file. Valid until the next call."""
        wanted = -(-length // PAGE) * PAGE
        if wanted > len(self._buffer):
            self._buffer = page_buffer(wanted)
        with memoryview(self._buffer)[:wanted] as view:
            got = file_io.read_fully(self._fd, view, at)
        return memoryview(self._buffer)[: min(got, length)]

    def next_data(self, at: int) -> int:
        """The page in which the next data are; the file's size when only a hole follows."""
        try:
            return os.lseek(self._fd, at, os.SEEK_DATA) // PAGE * PAGE
        except OSError:
            return self.file_size

    def last_known_end(self) -> int:
        """Where the last record that the index knows ends."""
        return max((at + record_size(found.length) for at, found in self.known.items()), default=PAGE)


class Checker:
    """All extents of a store."""

    def __init__(
        self, image: sqlite3.Connection, places: Places, store_id: str, secret: bytes, report: Report, progress: Progress
    ) -> None:
        self.image, self.places, self.report, self.progress = image, places, report, progress
        self.store_id, self.secret, self.paths = store_id, secret, Paths(image)

    def run(self) -> None:
        """Every extent that is there, or should be."""
        files = {int(p.stem): p for p in self.places.extents.glob("*.cfx") if p.stem.isdigit()}
        known = self.image.execute("SELECT number, size, sealed FROM extents WHERE size>0")
        rows = {number: (size, bool(sealed)) for number, size, sealed in known}
        total, done = sum(size for size, _ in rows.values()), 0
        for number in sorted(files.keys() - rows.keys()):
            self.report.notes.append(f"{files[number].name} is not in the index: a leftover, or of a newer index")
        for number, (size, sealed) in sorted(rows.items()):
            records = self._known(number)
            if number not in files:
                for at, expected in records.items():
                    self._damaged(number, at, expected, "is missing with its extent")
                if not records:
                    self.report.notes.append(f"extent {number} is gone, and nothing needed it: the next mount forgets it")
                continue
            extent = Extent(number, files[number], size, sealed, records)
            try:
                base = done
                self._check(extent, lambda at, base=base: self.progress("extents", base + at, total))  # type: ignore[misc]
            finally:
                extent.close()
            done += size
            self.report.bytes_read += min(size, extent.file_size) - extent.hole_bytes

    def _known(self, number: int) -> dict[int, Expected]:
        query = "SELECT offset, fingerprint, length, bid FROM blocks WHERE extent=?"
        found = {at: Expected(BLOCK, f, length, bid) for at, f, length, bid in self.image.execute(query, (number,))}
        if self.image.execute("SELECT 1 FROM sqlite_master WHERE name='manifests'").fetchone():
            query = "SELECT offset, fingerprint, length, seq FROM manifests WHERE extent=?"
            found |= {at: Expected(MANIFEST, f, length, seq) for at, f, length, seq in self.image.execute(query, (number,))}
        return found

    def _check(self, extent: Extent, progress: Callable[[int], None]) -> None:
        if bytes(extent.read(0, PAGE)) != header_page(self.store_id, extent.number):
            what = f"the header page of extent {extent.number} is damaged"
            self.report.add("extents", what, (), "rewrite_header", extent.number)
        end = self._check_end(extent)
        at = PAGE
        for start in sorted(extent.known):
            self._check_dead(extent, at, min(start, end))
            if start < at:
                self.report.add("extents", f"record {extent.number}:{start} overlaps the one before it")
            self._check_record(extent, start, extent.known[start])
            at = start + record_size(extent.known[start].length)
            progress(at)
        self._check_dead(extent, at, end)

    # --- records

    def _check_record(self, extent: Extent, at: int, expected: Expected) -> None:
        view = extent.read(at, record_size(expected.length))
        payload = view[HEAD.size : HEAD.size + expected.length]
        if len(payload) < expected.length or hashing.fingerprint(payload, self.secret) != expected.fingerprint:
            self._damaged(extent.number, at, expected, "is damaged")
            return
        wrong = []
        if bytes(view[: HEAD.size]) != frame(expected.kind, expected.fingerprint, expected.length, at):
            wrong.append("header")
        if len(view) < record_size(expected.length) or any(view[HEAD.size + expected.length :]):
            wrong.append("padding")
        if wrong:
            what = f"the {' and '.join(wrong)} of record {extent.number}:{at} is damaged, its payload is good"
            arguments = (extent.number, at, expected.kind, expected.fingerprint, expected.length)
            self.report.add("extents", what, (), "rewrite_frame", *arguments)

    def _damaged(self, number: int, at: int, expected: Expected, how: str) -> None:
        if expected.kind == MANIFEST:
            what = f"manifest {expected.key} in extent {number} {how}: the next mount writes a new snapshot"
            self.report.add("extents", what, (), "drop_manifest", expected.key)
        else:
            what = f"block {expected.key} in record {number}:{at} {how}"
            self.report.add("extents", what, self.paths.of_block(expected.key), "heal_block", expected.key)

    def _check_dead(self, extent: Extent, start: int, end: int) -> None:
        """Between the records that the index knows there are holes and whole dead records, and nothing else."""
        at = start
        while at < end:
            data_from = min(max(at, extent.next_data(at)), end)
            extent.hole_bytes += data_from - at
            at = data_from
            if at >= end:
                return
            size = self._dead_record(extent, at, end)
            if size:
                at += size
            elif any(extent.read(at, PAGE)):
                stop = self._end_of_rubbish(extent, at, end)
                what = f"{stop - at} bytes at {extent.number}:{at} belong to no record"
                self.report.add("extents", what, (), "punch", extent.number, at, stop - at)
                at = stop
            else:
                at += PAGE

    def _dead_record(self, extent: Extent, at: int, end: int) -> int:
        """The size of the dead record at `at`; 0 when there is none. Its payload is checked like any other."""
        head = bytes(extent.read(at, HEAD.size))
        if len(head) < HEAD.size:
            return 0
        kind, _, fingerprint, length, *_ = HEAD.unpack(head)
        if kind not in (BLOCK, MANIFEST) or head != frame(kind, fingerprint, length, at) or at + record_size(length) > end:
            return 0
        view = extent.read(at, record_size(length))
        good = hashing.fingerprint(view[HEAD.size : HEAD.size + length], self.secret) == fingerprint
        if not good or any(view[HEAD.size + length :]):
            what = f"a dead record at {extent.number}:{at} is damaged: nothing needs it"
            self.report.add("extents", what, (), "punch", extent.number, at, record_size(length))
        return record_size(length)

    def _end_of_rubbish(self, extent: Extent, at: int, end: int) -> int:
        at += PAGE
        while at < end:
            page = extent.read(at, PAGE)
            if not any(page) or self._dead_record(extent, at, end):
                return at
            at += PAGE
        return end

    # --- the end

    def _check_end(self, extent: Extent) -> int:
        """Where the records end. A sealed extent must have the footer that tells all of them."""
        if not extent.sealed:
            if extent.file_size > extent.size:
                self.report.notes.append(f"extent {extent.number} has bytes past its end: the next flush cuts them off")
            return extent.size
        if extent.file_size > extent.size:
            what = f"sealed extent {extent.number} is longer than it should be"
            self.report.add("extents", what, (), "cut", extent.number, extent.size)
        at, listed = self._footer(extent)
        missing = [start for start, found in extent.known.items() if listed.get(start) != (found.fingerprint, found.length)]
        if missing:
            what = f"the footer of extent {extent.number} is damaged"
            self.report.add("extents", what, (), "rewrite_footer", extent.number, at)
        return at

    def _footer(self, extent: Extent) -> tuple[int, dict[int, tuple[bytes, int]]]:
        """(where it starts, offset -> (fingerprint, length)); nothing listed when a byte of it is wrong."""
        last = extent.read(extent.size - PAGE, PAGE)
        wrong: dict[int, tuple[bytes, int]] = {-1: (b"", 0)} if not extent.known else {}
        tail = bytes(last[-TAIL.size :])
        magic, version, at, length, _ = TAIL.unpack(tail) if len(tail) == TAIL.size else (b"", 0, 0, 0, 0)
        good = (magic, version) == (b"CFTL", 1) and TAIL.pack(magic, version, at, length, _sum(tail[:-8])) == tail
        if not good or not PAGE <= at <= extent.size - length or at % PAGE:
            self._footer_wrong(extent, self._find_footer(extent))
            return self._find_footer(extent), wrong
        data = bytes(extent.read(at, extent.size - at))
        body = data[: length - 8]
        count = FOOT.unpack_from(body)[3] if length >= FOOT.size + 8 else -1
        expected = FOOT.pack(b"CFFT", 1, extent.number, max(count, 0)) + body[FOOT.size :]
        whole = len(body) == FOOT.size + count * ENTRY.size and body == expected
        if not whole or data[length - 8 : length] != struct.pack("<Q", _sum(body)) or any(data[length : -TAIL.size]):
            self._footer_wrong(extent, at)
            return at, wrong
        return at, {start: (fingerprint, size) for fingerprint, start, size in ENTRY.iter_unpack(body[FOOT.size :])}

    def _footer_wrong(self, extent: Extent, at: int) -> None:
        if not extent.known:  # nothing would be missed in it: say it here
            what = f"the footer of extent {extent.number} is damaged"
            self.report.add("extents", what, (), "rewrite_footer", extent.number, at)

    def _find_footer(self, extent: Extent) -> int:
        for at in range(extent.last_known_end(), extent.size, PAGE):
            if bytes(extent.read(at, 4)) == b"CFFT":
                return at
        return extent.last_known_end()


def _sum(data: bytes) -> int:
    return int(xxhash.xxh3_64_intdigest(data))
