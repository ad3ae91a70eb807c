"""Files with gaps, through a mount: what they take in memory and on disk, where they say that holes are, what they hold."""

import json
import mmap
import os
import random
import time
from pathlib import Path

import pytest

KIB, MIB = 1 << 10, 1 << 20
BIG = 512 * MIB  # eight times the memory


def memory_taken(mount):
    space = os.statvfs(mount.memory)
    return (space.f_blocks - space.f_bfree) * space.f_frsize


def page_option(mount):
    """Of the memory tier's tmpfs: "within_size" while writers get huge pages."""
    (line,) = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {mount.memory} " in line]
    return line.rpartition("huge=")[2].split(",")[0]


def becomes(mount, option):
    """A close is heard of a little later."""
    end = time.monotonic() + 20
    while page_option(mount) != option and time.monotonic() < end:
        time.sleep(0.01)
    return page_option(mount) == option


def pwrites(fd, places):
    for at, data in places.items():
        os.pwrite(fd, data, at)


def mapped(fd, places):
    with mmap.mmap(fd, BIG) as memory:
        for at, data in places.items():
            memory[at : at + len(data)] = data


def direct(fd, places):
    other = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT)
    for at, data in places.items():
        buffer = mmap.mmap(-1, len(data))
        buffer[:] = data
        os.pwrite(other, buffer, at)
    os.close(other)


def each(step, size, count):
    return {at * step: os.urandom(size) for at in range(count)}


def anywhere(count):
    pick = random.Random(count)
    return {pick.randrange(BIG // MIB) * MIB: os.urandom(pick.choice([4, 8, 64, 256]) * KIB) for _ in range(count)}


CASES = {
    "4 KiB each 2 MiB": (pwrites, each(2 * MIB, 4 * KIB, 250)),
    "4 KiB each 64 KiB": (pwrites, each(64 * KIB, 4 * KIB, 2000)),
    "a mapping": (mapped, each(2 * MIB, 4 * KIB, 250)),
    "O_DIRECT": (direct, each(2 * MIB, 4 * KIB, 250)),
    "anywhere": (pwrites, anywhere(100)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_with_gaps_takes_what_was_written(mount, case):
    mount.start()
    write, places = CASES[case]
    written = sum(map(len, places.values()))
    fd, before = os.open(mount.path / "f", os.O_CREAT | os.O_RDWR), memory_taken(mount)
    os.ftruncate(fd, BIG)
    write(fd, places)
    assert memory_taken(mount) - before <= 1.2 * written + MIB
    os.fsync(fd)
    assert os.fstat(fd).st_blocks * 512 <= 1.2 * written + MIB
    os.close(fd)
    mount.flush()
    extents = list((mount.store / "extents").iterdir())
    assert sum(f.stat().st_blocks * 512 for f in extents) <= 2.5 * written + 4 * MIB
    assert becomes(mount, "within_size")
    mount.stop("--drop-memory")
    mount.start()
    fd = os.open(mount.path / "f", os.O_RDONLY)
    assert os.fstat(fd).st_size == BIG
    for at, data in places.items():
        assert os.pread(fd, len(data), at) == data
        assert not any(os.pread(fd, 4 * KIB, at + len(data))) or at + len(data) in places
    os.close(fd)


def data_of(fd, size):
    """[(begin, end)] as SEEK_DATA and SEEK_HOLE tell."""
    found, at = [], 0
    while at < size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break
        at = os.lseek(fd, begin, os.SEEK_HOLE)
        found.append((begin, at))
    return found


def test_holes_are_told_to_the_page(mount):
    mount.start()
    fd = os.open(mount.path / "f", os.O_CREAT | os.O_RDWR)
    os.ftruncate(fd, 16 * MIB)
    for at, size in ((0, 1), (3 * MIB + 4096, 8192), (7 * MIB, MIB), (16 * MIB - 1, 1)):
        os.pwrite(fd, b"x" * size, at)
    told = [(0, 4096), (3 * MIB + 4096, 3 * MIB + 12288), (7 * MIB, 8 * MIB), (16 * MIB - 4096, 16 * MIB)]
    assert data_of(fd, 16 * MIB) == told
    os.close(fd)
    assert data_of(fd := os.open(mount.path / "f", os.O_RDWR), 16 * MIB) == told
    os.pwrite(fd, b"x", 5 * MIB)  # opened again it has gaps from the beginning
    assert os.fstat(fd).st_blocks * 512 == 4096 * 5 + MIB
    os.close(fd)


def test_a_cold_file_that_memory_does_not_take_tells_its_holes_as_before(mount):
    mount.start()
    fd = os.open(mount.path / "f", os.O_CREAT | os.O_RDWR)
    os.ftruncate(fd, BIG + 5)
    pwrites(fd, {0: b"x", 4 * MIB - 4096: b"x" * 8192, BIG // 2 + 4096: os.urandom(9 * MIB), BIG: b"x"})
    told = data_of(fd, BIG + 5)
    assert len(told) == 4
    os.close(fd)
    mount.stop("--drop-memory")
    mount.start()
    fd = os.open(mount.path / "f", os.O_RDONLY)
    assert data_of(fd, BIG + 5) == told
    with pytest.raises(OSError):
        os.lseek(fd, BIG + 5, os.SEEK_HOLE)
    mount.kill_worker()
    assert data_of(fd, BIG + 5) == told
    os.close(fd)


def test_a_file_without_gaps_gets_large_pages(mount):
    mount.start()
    if not json.loads((mount.path / ".cascade/stats").read_text())["huge_pages"]:
        pytest.skip("no tmpfs of our own")
    gaps = os.open(mount.path / "gaps", os.O_CREAT | os.O_RDWR)
    os.ftruncate(gaps, 8 * MIB)
    assert page_option(mount) == "advise"
    os.pwrite(gaps, b"x" * 8 * MIB, 0)
    with open(mount.path / "other", "wb") as file:  # is opened and closed: whoever has gaps is looked at again
        file.write(b"x")
    os.truncate(mount.path / "gaps", 9 * MIB)
    assert page_option(mount) == "advise"
    os.close(gaps)
    assert becomes(mount, "within_size")


def test_who_writes_far_behind_the_end_first_is_seen(mount):
    mount.start()
    fd = os.open(mount.path / "f", os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, b"x", BIG - 1)
    assert becomes(mount, "advise")
    before = memory_taken(mount)
    pwrites(fd, each(2 * MIB, 4 * KIB, 200))
    assert memory_taken(mount) - before <= 2 * MIB
    os.close(fd)
    assert becomes(mount, "within_size")
