"""Checksums of the index: the sidecar index.sums, and what can be said of index.db and its WAL before SQLite opens them.

Owns: the sidecar's bytes (FORMAT.md draws them) and the judgement. Reads and writes these three files only; knows no table.
Invariants:
(1) A page of index.db that has no frame in the WAL has the sum that the sidecar tells. Database.checkpoint() keeps it: the
    sidecar is renamed into place after the WAL was synced and before SQLite copies frames into index.db.
(2) While the machine runs on, a frame of the WAL that is wrong by one bit is damage: the page cache has what was written. After
    a loss of power it may be a write that reached the disk in part: then SQLite's own rule holds (the WAL ends before it).
"""

import contextlib
import os
import struct
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from cascadefs.ext import index_pages
from cascadefs.media import file_io

VERSION = 1
WAL_HEADER, FRAME_HEADER = 32, 24
_HEAD = struct.Struct("<4sIIIQ")  # magic, version, page bytes, zeros, number of pages
_SUM = struct.Struct("<Q")
CHUNK_PAGES = 1024
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
WAL_MAGIC = 0x377F0682  # the low bit tells the byte order of its checksums
Sums = npt.NDArray[np.uint64]


def encode(page_bytes: int, sums: Sums) -> bytes:
    """The sidecar's bytes."""
    head = _HEAD.pack(b"CFSM", VERSION, page_bytes, 0, len(sums))
    body = head + _SUM.pack(xxhash.xxh3_64_intdigest(head)) + sums.astype("<u8").tobytes()
    return body + _SUM.pack(xxhash.xxh3_64_intdigest(body))


def decode(data: bytes) -> tuple[int, Sums] | None:
    """(page bytes, sums), or None for anything that is not exactly what encode() wrote."""
    start = _HEAD.size + _SUM.size
    if len(data) < start + _SUM.size or _SUM.unpack_from(data, len(data) - 8)[0] != xxhash.xxh3_64_intdigest(data[:-8]):
        return None
    magic, version, page_bytes, zeros, count = _HEAD.unpack_from(data)
    if (magic, version, zeros) != (b"CFSM", VERSION, 0) or len(data) != start + 8 * count + 8:
        return None
    return page_bytes, np.frombuffer(data, "<u8", count, start).astype(np.uint64)


def of_bytes(data: "bytes | memoryview", page_bytes: int) -> Sums:
    """Sums of the whole pages of a buffer."""
    sums = np.zeros(len(data) // page_bytes, np.uint64)
    if len(sums):
        index_pages.page_sums(data, page_bytes, sums.data)
    return sums


def of_file(path: Path, page_bytes: int) -> tuple[Sums, int]:
    """(sums of the whole pages of a file, its size in bytes); read in pieces that stay in the processor's cache."""
    parts, size, buffer = [np.zeros(0, np.uint64)], 0, memoryview(bytearray(CHUNK_PAGES * page_bytes))
    with path.open("rb", buffering=0) as file:
        while got := _fill(file, buffer):
            parts.append(of_bytes(buffer[:got], page_bytes))
            size += got
    return np.concatenate(parts), size


def _fill(file: RawIOBase, buffer: memoryview) -> int:
    """Read until `buffer` is full or the file ends; how many bytes."""
    done = 0
    while got := file.readinto(buffer[done:]):
        done += got
    return done


@dataclass
class Wal:
    """What a WAL holds. `committed`: frames up to the last commit before the first bad one; `pages` and `pages_after` (size
    of the database in pages, told by a commit frame) describe those. `stray`: frames of this generation after that end.

    `flips`: numbers of bits, counted from the start of the file, of which one was flipped; none when no single one explains it.
    """

    data: bytes
    page_bytes: int = 0
    committed: int = 0
    pages: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    pages_after: int = 0
    stray: int = 0
    header_bad: bool = False
    flips: list[int] = field(default_factory=list)

    def page(self, frame: int) -> bytes:
        """The page in a frame."""
        start = WAL_HEADER + frame * (FRAME_HEADER + self.page_bytes) + FRAME_HEADER
        return self.data[start : start + self.page_bytes]

    def last_frames(self) -> dict[int, int]:
        """page number -> the frame with its newest committed version."""
        return {int(page): frame for frame, page in enumerate(self.pages)}


def read_wal(data: bytes) -> Wal:
    """Judge the bytes of a WAL file."""
    wal = Wal(data)
    if len(data) < WAL_HEADER:
        return wal
    magic, _, wal.page_bytes = struct.unpack_from(">III", data)
    swap = bool(magic & 1)
    known = magic & ~1 == WAL_MAGIC and 512 <= wal.page_bytes <= 65536 and not wal.page_bytes & (wal.page_bytes - 1)
    if not known or index_pages.words_sum(data[:24], swap) != struct.unpack_from(">II", data, 24):
        wal.header_bad, wal.page_bytes = len(data) > WAL_HEADER, 0  # a header alone holds no transaction
        wal.flips = _header_flips(data[:WAL_HEADER]) if wal.header_bad else []
        return wal
    _read_frames(wal, swap)
    return wal


def _header_flips(header: bytes) -> list[int]:
    found = []
    for bit in range(len(header) * 8):
        tried = bytearray(header)
        tried[bit // 8] ^= 1 << bit % 8
        magic = struct.unpack_from(">I", tried)[0]
        right = index_pages.words_sum(tried[:24], bool(magic & 1)) == struct.unpack_from(">II", tried, 24)
        if magic & ~1 == WAL_MAGIC and right:
            found.append(bit)
    return found


def _read_frames(wal: Wal, swap: bool) -> None:
    step = FRAME_HEADER + wal.page_bytes
    count = (len(wal.data) - WAL_HEADER) // step
    checks = np.zeros(count, np.uint8)
    if not count:
        return
    index_pages.frame_checks(wal.data, wal.page_bytes, swap, checks.data)
    heads = np.frombuffer(wal.data, np.dtype([("page", ">u4"), ("after", ">u4"), ("rest", f"V{step - 8}")]), count, WAL_HEADER)
    good = checks == index_pages.SALTS_MATCH | index_pages.CHAIN_MATCHES
    valid = count if good.all() else int(np.argmin(good))
    commits = np.flatnonzero(heads["after"][:valid])
    wal.committed = int(commits[-1]) + 1 if len(commits) else 0
    wal.pages = heads["page"][: wal.committed].astype(np.int64)
    wal.pages_after = int(heads["after"][wal.committed - 1]) if wal.committed else 0
    if valid < count:
        _judge_end(wal, valid, checks, swap)


def _judge_end(wal: Wal, first: int, checks: npt.NDArray[np.uint8], swap: bool) -> None:
    """What follows the valid frames: an older generation (nothing to say), a flipped bit, or a torn or damaged tail."""
    step = FRAME_HEADER + wal.page_bytes
    start = WAL_HEADER + first * step
    before = wal.data[start - step + 16 : start - step + 24] if first else wal.data[24:32]
    frame = bytearray(wal.data[start : start + step])
    if checks[first] or checks[first:].any():
        wal.stray = int(np.count_nonzero(checks[first:] & index_pages.SALTS_MATCH))
        bits = index_pages.flipped_frame_bits(frame, wal.data[:WAL_HEADER], before, swap)
        wal.flips = [start * 8 + bit for bit in bits]


@dataclass
class Judgement:
    """The state of index.db, its WAL and the sidecar. `bad_pages`: numbers from 1 on, of pages without a frame in the WAL
    that have not the sum they should; `sums` is None when the sidecar is missing or (`sums_damaged`) wrong."""

    wal: Wal
    sums: Sums | None
    page_bytes: int
    power_lost: bool = False
    sums_damaged: bool = False
    bad_pages: list[int] = field(default_factory=list)
    size_bad: bool = False

    @property
    def damaged(self) -> bool:
        """Whether it must not be opened: committed rows may be wrong or missing."""
        return bool(self.bad_pages or self.size_bad or self.sums_damaged or self.wal.header_bad or self.wal_flipped)

    @property
    def wal_flipped(self) -> bool:
        """Whether a frame of the WAL has a flipped bit, and a loss of power cannot be the reason."""
        return bool(self.wal.flips) and not self.power_lost

    @property
    def torn(self) -> bool:
        """Frames after the valid end that were never finished."""
        return self.wal.stray > 0 and not self.wal_flipped


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def power_was_lost(folder: Path) -> bool:
    """Whether the machine has booted since the store was used (parking.py writes the mark)."""
    return _bytes(folder / "parking/boot") != BOOT_ID.read_bytes()


def judge(folder: Path) -> Judgement:
    """Look at the index of a store that nobody has open. Changes nothing."""
    wal, path = read_wal(_bytes(folder / "index.db-wal")), folder / "index.sums"
    known = decode(path.read_bytes()) if path.exists() else None
    if known is None:
        return Judgement(wal, None, wal.page_bytes, power_was_lost(folder), sums_damaged=path.exists())
    page_bytes, sums = known
    result = Judgement(wal, sums, page_bytes, power_was_lost(folder))
    actual, size = of_file(folder / "index.db", page_bytes)
    in_wal = wal.last_frames()
    common = min(len(actual), len(sums))
    differs = np.flatnonzero(actual[:common] != sums[:common]) + 1
    result.bad_pages = [int(page) for page in differs if int(page) not in in_wal]
    wanted = wal.pages_after or len(sums)
    extra = set(range(common + 1, max(len(actual), len(sums)) + 1))
    result.size_bad = size % page_bytes != 0 or any(page <= wanted and page not in in_wal for page in extra)
    result.size_bad |= not wal.committed and len(actual) != len(sums)
    return result


def updated(sums: Sums, wal: Wal) -> Sums:
    """The sums that index.db will have when the WAL has been copied into it."""
    result = np.full(wal.pages_after or len(sums), xxhash.xxh3_64_intdigest(bytes(wal.page_bytes)), np.uint64)
    kept = min(len(sums), len(result))
    result[:kept] = sums[:kept]
    for page, frame in wal.last_frames().items():
        if page <= len(result):
            result[page - 1] = xxhash.xxh3_64_intdigest(wal.page(frame))
    return result


def write(folder: Path, page_bytes: int, sums: Sums) -> None:
    """Replace the sidecar; durable on return."""
    partial = folder / "index.sums.new"
    try:
        fd = file_io.open_file(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            file_io.write_fully(fd, encode(page_bytes, sums), 0)
            file_io.sync_file(fd)
        finally:
            os.close(fd)
        file_io.rename(partial, folder / "index.sums")
    except OSError:
        with contextlib.suppress(OSError):
            file_io.remove(partial)
        raise
    file_io.sync_folder(folder)
