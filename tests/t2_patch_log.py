"""patch_log.py: what was appended is read back and put on top of its base; cut or flipped anywhere, a whole beginning of it."""

import mmap
import os
import random

import pytest

from cascadefs.formats.record import LogHeader, PatchHeader
from cascadefs.media.file_io import ALIGN
from cascadefs.tiers import patch_log
from cascadefs.tiers.patch_log import PatchLog
from cascadefs.writeback.patches import cut, merged

SECRET = bytes(range(192))
HEADER = LogHeader(77, 1234567, b"b" * 16)
SIZE = 100_000


@pytest.fixture
def contents(tmp_path, monkeypatch):
    """A log of ten patches in tmp_path/"patches", and what the file held before and after each."""
    monkeypatch.setattr(patch_log, "ROOM_BYTES", 3 * ALIGN)
    chance, result = random.Random(5), [os.urandom(SIZE)]
    log = PatchLog(tmp_path / "patches", HEADER, SECRET)
    log.create(bytes(16))
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, result[0])
    for turn in range(10):
        size = SIZE + chance.randint(-500, 500)
        os.ftruncate(fd, size)
        ranges = [(max(0, size - 600), 600)]
        for _ in range(chance.randint(0, 4)):
            ranges.append((chance.randrange(size - 600), chance.randint(1, 40_000)))
        ranges = cut(merged(ranges), size)
        for offset, length in ranges:
            os.pwrite(fd, os.urandom(length), offset)
        with mmap.mmap(-1, 1 << 20) as buffer:
            buffer[:] = b"\xee" * len(buffer)
            log.append(buffer, log.pack(buffer, PatchHeader(b"", 0, 0, size, turn, turn + 1, 0, 0), ranges, fd))
        result.append(os.pread(fd, 2 * SIZE, 0))
    os.close(fd)
    return log, result


def applied(log, base, tmp_path):
    fd = os.open(tmp_path / "again", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.write(fd, base)
    last = patch_log.apply(log.path, SECRET, fd)
    data = os.pread(fd, 2 * SIZE, 0)
    os.close(fd)
    return last, data


def test_what_was_appended_comes_back(contents, tmp_path):
    log, held = contents
    last, data = applied(log, held[0], tmp_path)
    assert data == held[-1] and (last.size_bytes, last.mtime_ns, last.ctime_ns, last.place) == (len(held[-1]), 9, 10, 9)
    assert patch_log.read_header(log.path) == HEADER
    assert patch_log.known(tmp_path / "patches") == [(77, 1234567)]


def test_a_log_that_is_cut_anywhere_gives_a_beginning(contents, tmp_path):
    log, held = contents
    whole = log.path.read_bytes()
    seen = set()
    for length in range(0, len(whole), 997):
        log.path.write_bytes(whole[:length])
        _, data = applied(log, held[0], tmp_path)
        assert data in held
        seen.add(held.index(data))
    assert len(seen) == len(held)


def test_a_flipped_bit_is_never_served(contents, tmp_path):
    log, held = contents
    whole, chance = bytearray(log.path.read_bytes()), random.Random(6)
    for _ in range(300):
        bit = chance.randrange(8 * log.end)
        whole[bit // 8] ^= 1 << bit % 8
        log.path.write_bytes(whole)
        assert applied(log, held[0], tmp_path)[1] in held
        whole[bit // 8] ^= 1 << bit % 8


def test_patches_of_another_log_behind_the_end_are_none(contents, tmp_path):
    """A disk may show old blocks where a file was extended."""
    log, held = contents
    data = log.path.read_bytes()
    other = PatchLog(tmp_path / "patches", LogHeader(77, 42, b"b" * 16), SECRET)
    other.create(bytes(16))
    other.path.write_bytes(other.path.read_bytes()[:ALIGN] + data[ALIGN:])
    assert list(patch_log.read(other.path, SECRET)) == []
    patch_log.remove_all_but(tmp_path / "patches", {(77, 42)})
    assert patch_log.known(tmp_path / "patches") == [(77, 42)]


def test_ranges_are_merged_as_sets_of_bytes():
    chance = random.Random(7)
    for _ in range(200):
        ranges = [(chance.randrange(60), chance.randint(1, 12)) for _ in range(chance.randint(0, 9))]
        size = chance.randrange(80)
        found = cut(merged(ranges), size)
        wanted = {at for offset, length in ranges for at in range(offset, offset + length) if at < size}
        assert {at for offset, length in found for at in range(offset, offset + length)} == wanted
        assert all(a + n < b for (a, n), (b, _) in zip(found, found[1:], strict=False))
