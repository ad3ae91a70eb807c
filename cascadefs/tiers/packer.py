"""Files that somebody may be writing go straight into an extent: each block is read once, hashed where it lies, and written.

Owns: the records of one such append; which of the blocks need one is asked of the caller. Knows no index and no inode.
Everything blocks. Invariants:
(1) The payload of a record is what its fingerprint was computed from, whatever happens to the file meanwhile.
(2) run() returns after fdatasync: whoever commits the places afterwards commits durable ones. Before, no index knows of them,
    and the next append to the extent begins where this one began.
(3) Among files that share blocks each block is written once.
"""

import contextlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from cascadefs.config import MIB
from cascadefs.crash import point
from cascadefs.errors import UnreadableCopy
from cascadefs.ext import hashing
from cascadefs.formats.record import HEADER_BYTES, RecordHeader, encode_record_header, record_bytes
from cascadefs.media import file_io
from cascadefs.media.file_io import ALIGN
from cascadefs.media.transfers import Writes
from cascadefs.tiers.extents import WRITE_BYTES, ColdTier
from cascadefs.types import Location, Print

FIRST_BYTES = WRITE_BYTES // 2  # of the first write, before which nothing is on its way
TOGETHER_BYTES = 8 * MIB  # to hash so much takes a millisecond, to begin a thread a tenth
NO_BLOCK = 0  # they have no numbers yet, and those count from 1
Tail = Callable[[], bytes]  # a manifest; asked for when every block has been read
PAGE = 4096  # each block of a subject with `pages` begins at a multiple of it
TAIL_BYTES = 64 << 10  # of room for one, nearly always enough
Lacking = Callable[[Sequence[Print]], set[Print]]


@dataclass(eq=False, slots=True)
class Subject:
    """An open file of at least `size_bytes`. `places` is one dictionary for all files that share their blocks. `step`: length
    of its blocks, 0 for the usual one. `is_known`: most of them have a place; they are looked at before they are read.
    `pages`: room for the fingerprints of its pages, to be filled in."""

    fd: int
    size_bytes: int
    shares: bool
    places: dict[Print, Location]
    step: int = 0
    is_known: bool = False
    pages: bytearray | None = None
    prints: list[Print] = field(default_factory=list)


Part = tuple[Subject, int, int, int]  # number, offset and length of a block


class Capture:
    """One append to extent `number` from `position` on. `lacking`: which of these blocks have no place in the cold tier."""

    def __init__(self, cold: ColdTier, block_bytes: int, number: int, position: int, lacking: Lacking) -> None:
        self._cold, self._block_bytes, self._lacking = cold, block_bytes, lacking
        self._number, self._start, self._end = number, position, position
        self._packed: tuple[mmap.mmap, int] | None = None

    def pack(self, subjects: Sequence[Subject], tail: Tail) -> None:
        """The first half of run(), for little: read without a thread, before write() in one."""
        group = [part for parts in _groups(self._parts(subjects)) for part in parts]
        data = self._cold.buffers.take(max(MIB, _room(group)))  # of a size that is kept
        self._packed = self._with_tail(data, self._fill(data, group), tail)

    def write(self) -> int:
        """Write what was packed; the new end."""
        assert self._packed is not None
        data, used = self._packed
        with self._opened() as fd:
            self._put(fd, data, used)
        return self._end

    def run(self, subjects: Sequence[Subject], tail: Tail | None) -> int:
        """Write what is lacking, and a manifest behind it, if there is one; fill in prints and places. The new end."""
        groups = list(_groups(self._parts(subjects))) or [[]]
        with self._opened() as fd:
            if len(groups) == 1:
                data = self._cold.buffers.take(max(MIB, _room(groups[0])))
                self._put(fd, *self._with_tail(data, self._fill(data, groups[0]), tail))
            else:
                self._write_groups(fd, groups, tail)
        return self._end

    def _parts(self, subjects: Sequence[Subject]) -> Iterator[Part]:
        """The blocks that must be read."""
        for subject in subjects:
            step = subject.step or self._block_bytes
            lengths = [min(step, subject.size_bytes - at) for at in range(0, subject.size_bytes, step)]
            subject.prints = [(b"", length) for length in lengths]
            known = self._known(subject, step) if subject.is_known else set[int]()
            yield from (
                (subject, number, number * step, length) for number, length in enumerate(lengths) if number not in known
            )

    def _known(self, subject: Subject, step: int) -> set[int]:
        """Blocks that have a place as they are now; their prints are filled in. A copy costs more than the hash."""
        try:
            found = self._mapped_prints(subject.fd, subject.size_bytes, step)
        except OSError:
            return set()  # it has shrunk: reading deals with that
        prints = [(fingerprint, length) for fingerprint, (_, length) in zip(found, subject.prints, strict=True)]
        lacking = self._lacking(prints)
        known = {number for number, one in enumerate(prints) if one not in lacking}
        for number in known:
            subject.prints[number] = prints[number]
        return known

    def _mapped_prints(self, fd: int, size_bytes: int, step: int) -> list[bytes]:
        """A second processor takes half of what is much."""
        half = size_bytes // (2 * step) * step
        if size_bytes < TOGETHER_BYTES or half % ALIGN:
            return hashing.mapped_fingerprints(fd, 0, size_bytes, step, self._cold.secret)
        with ThreadPoolExecutor(1, "cascadefs-hash") as thread:
            rest = thread.submit(hashing.mapped_fingerprints, fd, half, size_bytes - half, step, self._cold.secret)
            return hashing.mapped_fingerprints(fd, 0, half, step, self._cold.secret) + rest.result()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """The extent, to be written from where it ends; synced afterwards, or as before."""
        fd = file_io.open_direct(self._cold.path(self._number), os.O_RDWR)
        try:
            file_io.truncate(fd, self._start)
            try:
                yield fd
            except OSError:
                with contextlib.suppress(OSError):
                    file_io.truncate(fd, self._start)  # a full disk gets back at once what a half batch took
                raise
            point("written")
            file_io.sync_data(fd)
        finally:
            os.close(fd)

    def _put(self, fd: int, data: mmap.mmap, used: int) -> None:
        """A single write needs no thread."""
        with memoryview(data) as view, view[:used] as part:
            file_io.write_with_holes(fd, part, self._end)
        self._cold.buffers.give(data)
        self._end += used

    def _write_groups(self, fd: int, groups: Sequence[Sequence[Part]], tail: Tail | None) -> None:
        """The next group is read while the last is on its way."""
        with Writes(fd, self._cold.buffers) as writes:
            for group in groups:
                data = writes.buffer(_room(group))
                used = self._fill(data, group)
                if group is groups[-1]:
                    data, used = self._with_tail(data, used, tail)
                writes.put(data, used, self._end)
                self._end += used
            writes.finish()

    def _fill(self, data: mmap.mmap, group: Sequence[Part]) -> int:
        """Records of the blocks that are lacking at the beginning of the buffer; how long they are."""
        at, found = 0, list[tuple[Subject, Print, int]]()
        with memoryview(data) as view:
            for subject, number, offset, length in group:
                with view[at + HEADER_BYTES : at + HEADER_BYTES + length] as payload:
                    fingerprint = self._read(subject.fd, offset, payload)
                    if subject.pages is not None:
                        at_page = offset // PAGE * 16
                        pages = hashing.page_prints(payload, self._cold.secret)
                        subject.pages[at_page : at_page + len(pages)] = pages
                found.append((subject, (fingerprint, length), at))
                subject.prints[number] = fingerprint, length
                at += record_bytes(length)
            lacking = self._lacking([one for subject, one, _ in found if subject.shares and one not in subject.places])
            used = 0
            for subject, one, at in found:
                if one not in subject.places and (one in lacking or not subject.shares):
                    subject.places[one] = self._frame(view, at, used, one)
                    used += record_bytes(one[1])
        return used

    def _with_tail(self, data: mmap.mmap, used: int, tail: Tail | None) -> tuple[mmap.mmap, int]:
        """A manifest behind the records, if there is one; the buffer, or a larger one, and how much of it is used."""
        if tail is None:
            return data, used
        with self._cold.pack_manifest(self._end + used, tail()) as packed:
            if used + len(packed) > len(data):
                small, data = data, self._cold.buffers.take(used + len(packed))
                data[:used] = small[:used]
                self._cold.buffers.give(small)
            data[used : used + len(packed)] = packed[:]
            return data, used + len(packed)

    def _read(self, fd: int, offset: int, payload: memoryview) -> bytes:
        try:
            return hashing.read_fingerprint(fd, offset, payload, self._cold.secret)
        except OSError as e:
            if os.fstat(fd).st_size >= offset + len(payload):
                raise UnreadableCopy(e, NO_BLOCK) from e
        got = file_io.read_fully(fd, payload, offset)  # it shrank meanwhile: what is missing reads as zeros
        payload[got:] = bytes(len(payload) - got)
        return hashing.fingerprint(payload, self._cold.secret)

    def _frame(self, view: memoryview, at: int, to: int, one: Print) -> Location:
        """Make the payload that was read for a record at `at` a record at `to`, which is not behind it."""
        fingerprint, length = one
        begin, end = to + HEADER_BYTES, to + HEADER_BYTES + length
        if to != at:
            view[begin:end] = view[at + HEADER_BYTES : at + HEADER_BYTES + length]
        view[to:begin] = encode_record_header(RecordHeader(fingerprint, length, self._end + to))
        view[end : to + record_bytes(length)] = bytes(to + record_bytes(length) - end)
        return Location(self._number, self._end + to, length)


def _room(group: Sequence[Part]) -> int:
    """Bytes of all records that there may be."""
    return sum(record_bytes(length) for *_, length in group) + TAIL_BYTES


def _groups(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """In groups of at most FIRST_BYTES, then WRITE_BYTES, of payload, or of one block."""
    group, filled, limit = list[Part](), 0, FIRST_BYTES
    for part in parts:
        if group and filled + part[3] > limit:
            yield group
            group, filled, limit = [], 0, WRITE_BYTES
        group.append(part)
        filled += part[3]
    if group:
        yield group
