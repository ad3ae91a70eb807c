"""The cold tier beside its disk: flush, cold reads, and small blocks that must be durable.

Owns: these measures, the raw streams they are compared with, and the goals. Invariants:
(1) The reference moves the same number of bytes on the same disk, past the page cache (O_DIRECT), and is as durable at the end.
(2) A cold read has no copy in the memory tier: the mount was taken down with --drop-memory before.
(3) Where the filesystem refuses O_DIRECT the run ends with a line that says so: a reference from the page cache is none.
"""

import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from cascadefs.bench import io
from cascadefs.bench.io import GB, KIB, MIB, Figures, Kit, Measure, Place
from cascadefs.bench.lines import Goal
from cascadefs.bench.targets import DISK, Mounted
from cascadefs.errors import UserError

BLOCK = 80 * MIB  # the KV data of 256 tokens of a large model
REQUEST, DEPTH = 4 * MIB, 4
BATCH, SMALL = 100, 64 * KIB
FULL_BLOCKS, QUICK_BLOCKS, WARM_UP_BLOCKS = 6, 2, 1
FULL_BATCHES, QUICK_BATCHES, WARM_UP_BATCHES = 5, 2, 1
ENVIRONMENT = {"CASCADEFS_SEAL_DELAY": "60"}  # nothing is flushed behind the measure's back
NEAR_RAW, TIMES_FILES = 0.9, 5.0
METHOD = (
    "flush: so many files of 80 MiB are written; the clock runs while `cascadefs flush` (fsync of .cascade/flush) makes"
    " them durable; none of it was sealed or flushed before (seal_delay=60). Raw: one file of the same bytes, O_DIRECT,"
    " 4 MiB requests, four in flight (threads), and fdatasync, all in the clock.",
    "cold read: the mount is taken down with --drop-memory and up again; open, one readv, close of each file of 80 MiB;"
    " open brings it to memory, the rest reads it from there; memory that is free is touched before (see io.Ballast). Raw: the"
    " raw file, four requests of 4 MiB in flight. Buffers lie on huge pages.",
    "small blocks: 100 files of 64 KiB are written and closed, then one `cascadefs flush` (data and names of all of them are"
    " durable; fsync of a plain folder would be names only, fsync of one file that file only). Raw: a file for"
    " each block on the same disk, write, fsync, close.",
    "One run, both places one after the other, the order rotating with the repeat; medians over the repeats.",
)


def flush_name(blocks: int) -> str:
    """The row of a flush."""
    return f"flush {blocks} x 80 MiB"


def read_name(blocks: int) -> str:
    """The row of a cold read."""
    return f"cold read {blocks} x 80 MiB"


def open_name(blocks: int) -> str:
    """The row of the part of a cold read that is open(2): there a file is brought to memory."""
    return f"of it, open {blocks} x 80 MiB"


SMALL_ROW = "64 KiB blocks, durable per batch of 100"


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def sync_all(mount: Path) -> None:
    """Everything on a cascadefs mount is durable afterwards."""
    fd = os.open(mount / ".cascade/flush", os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def in_flight(fd: int, view: memoryview, size: int, write: bool) -> None:
    """`size` bytes in requests of REQUEST, DEPTH of them under way; each writer or reader has its own part of `view`."""

    def lane(number: int) -> None:
        with view[number * REQUEST : (number + 1) * REQUEST] as part:
            for offset in range(number * REQUEST, size, DEPTH * REQUEST):
                length = min(REQUEST, size - offset)
                done = os.pwrite(fd, part[:length], offset) if write else os.preadv(fd, [part[:length]], offset)
                if done != length:
                    raise OSError(errno.EIO, f"{done} of {length} bytes")

    with ThreadPoolExecutor(DEPTH) as lanes:
        list(lanes.map(lane, range(DEPTH)))
    if write:
        os.fdatasync(fd)


def _direct(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        raise UserError(f"{path.parent} has no O_DIRECT (a tmpfs?); give a folder on a disk with --store") from e


def _raw(blocks: int, folder: Path, kit: Kit) -> Figures:
    size = blocks * BLOCK
    kit.source.stamp(DEPTH * REQUEST)
    fd = _direct(folder / "raw", os.O_RDWR | os.O_CREAT)
    try:
        wrote = _timed(partial(in_flight, fd, kit.source.view, size, True))
        read = _timed(partial(in_flight, fd, kit.sink, size, False))
    finally:
        os.close(fd)
    return {flush_name(blocks): size / wrote / GB, read_name(blocks): size / read / GB}


def _cascade(blocks: int, place: Mounted, folder: Path, kit: Kit) -> Figures:
    firsts = []
    for number in range(blocks):
        firsts.append(kit.source.next_number)
        io.write_file(folder / str(number), kit.source, BLOCK, BLOCK)
    pending = place.status()["pending_bytes"]
    if pending != blocks * BLOCK:
        raise OSError(errno.EBUSY, f"{pending} of {blocks * BLOCK} bytes were left to flush")
    flushed = _timed(partial(sync_all, place.folder))
    place.remount(True)
    kit.touch()
    opening, reading = 0.0, 0.0
    for number, first in enumerate(firsts):
        start = time.perf_counter()
        with open(folder / str(number), "rb", buffering=0) as file:
            opened = time.perf_counter()
            io.read_all(file.fileno(), kit.sink[:BLOCK])
        opening, reading = opening + opened - start, reading + time.perf_counter() - opened
        io.check(kit.sink[:BLOCK], first)
    size = blocks * BLOCK / GB
    names = (flush_name(blocks), read_name(blocks), open_name(blocks))
    return dict(zip(names, (size / flushed, size / (opening + reading), size / opening), strict=True))


def _large(blocks: int, place: Place, kit: Kit) -> Figures:
    with io.scratch(place) as folder:
        return _cascade(blocks, place, folder, kit) if isinstance(place, Mounted) else _raw(blocks, folder, kit)


def _write_small(path: Path, view: memoryview, sync: bool) -> None:
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        io.write_all(fd, view)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def _small(batches: int, place: Place, kit: Kit) -> Figures:
    """Data is made outside the clock: each block of the buffer has a stamp of its own."""
    spent = 0.0
    with io.scratch(place) as folder:
        for batch in range(batches):
            kit.source.stamp(BATCH * SMALL)
            parts = [kit.source.view[n * SMALL : (n + 1) * SMALL] for n in range(BATCH)]
            start = time.perf_counter()
            for number, part in enumerate(parts):
                _write_small(folder / f"{batch}-{number}", part, not isinstance(place, Mounted))
            if isinstance(place, Mounted):
                sync_all(place.folder)
            spent += time.perf_counter() - start
    return {SMALL_ROW: batches * BATCH / spent}


def measures(blocks: int, batches: int) -> list[Measure]:
    """Flush and cold read, then small blocks."""
    return [
        Measure(dict.fromkeys((flush_name(blocks), read_name(blocks), open_name(blocks)), io.RATE_GB), partial(_large, blocks)),
        Measure({SMALL_ROW: io.PER_S}, partial(_small, batches)),
    ]


def goals(blocks: int) -> list[Goal]:
    """Beside the raw disk."""
    return [
        Goal(flush_name(blocks), NEAR_RAW, True, DISK),
        Goal(read_name(blocks), NEAR_RAW, True, DISK),
        Goal(SMALL_ROW, TIMES_FILES, True, DISK),
    ]
