"""Files that outgrow the memory tier while they are written, as in a container with a small /dev/shm: no program notices."""

import mmap
import os
import subprocess
import sys
import threading
from functools import partial

import pytest
from conftest import AS_NOBODY, Mount, cascadefs, mounted, need_root_and_fuse

MIB = 1 << 20
LENGTH = 100 * MIB
BLOCK = bytes(range(256)) * (MIB // 256)
# Each of four processes writes a file, reads it and has it read.
PROGRAM = """
import os, sys
name, data = sys.argv[1], os.urandom(1 << 20)
with open(name, "w+b", buffering=0) as file:
    for number in range(100):
        assert file.write(number.to_bytes(8, "big") + data) == len(data) + 8
    file.seek(0)
    for number in range(100):
        assert file.read(len(data) + 8) == number.to_bytes(8, "big") + data
with open(name + ".reserved", "wb") as file:
    os.posix_fallocate(file.fileno(), 0, 150 << 20)
"""


@pytest.mark.usefixtures("open_to_users")
def test_an_ordinary_user_with_a_small_shm(home, tmp_path):
    """Whose writes do not fit the socket to Python."""
    (tmp_path / "shm").mkdir()
    with mounted("-t", "tmpfs", "-o", "size=64M,mode=1777", "none", tmp_path / "shm"):
        options = ("--store", home / "store", "--shm-size", "48MiB", "-o", f"shm_dir={tmp_path / 'shm'}")
        done = cascadefs("mount", home / "mnt", *options, by=AS_NOBODY)
        assert done.returncode == 0 and "has room for" not in done.stdout, done
        words = [*AS_NOBODY, sys.executable, "-c", PROGRAM]
        programs = [subprocess.Popen([*words, home / f"mnt/{name}"]) for name in "abcd"]
        assert [program.wait(timeout=120) for program in programs] == [0] * 4
        for command in ("flush", "umount"):
            done = cascadefs(command, *(["--drop-memory"] if command == "umount" else []), home / "mnt", by=AS_NOBODY)
            assert done.returncode == 0, done.stderr


@pytest.fixture
def small(tmp_path):
    """A portable mount, the filesystem of whose memory is made small while it looks roomy."""
    need_root_and_fuse()
    found = Mount(tmp_path, "--shm-size", "64MiB", "--no-passthrough").start()
    subprocess.run(["mount", "-o", "remount,size=40M", found.memory], check=True)
    yield found
    found.clean()


def fill(path):
    for _ in range(LENGTH // MIB):
        with open(path, "ab", buffering=0) as file:
            file.write(BLOCK)


def test_all_writers_and_readers_of_a_file_go_on(small):
    """By handles of their own, at once, over the moment when it moves, and when the worker dies."""
    path = small.path / "f"
    path.write_bytes(bytes(LENGTH)[:MIB])
    unbuffered = partial(open, path, buffering=0)
    with unbuffered(mode="rb") as reader, unbuffered(mode="r+b") as first, unbuffered(mode="r+b") as other:

        def write(file, odd):
            for at in range(odd, LENGTH // MIB, 2):
                assert os.pwrite(file.fileno(), BLOCK, at * MIB) == MIB
                assert os.pread(reader.fileno(), MIB, at * MIB) == BLOCK

        threads = [threading.Thread(target=write, args=pair) for pair in ((first, 0), (other, 1))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert list((small.store / "parking/staged").iterdir())
        assert not list((small.memory / "staged").iterdir())
        small.kill_worker()
        first.write(b"after")
        assert os.pread(reader.fileno(), 6, 0) == b"after" + BLOCK[5:6]
        os.fsync(other.fileno())
    assert path.read_bytes() == b"after" + BLOCK[5:] + BLOCK * (LENGTH // MIB - 1)
    small.flush()
    small.kill()
    small.wipe_memory()
    assert small.start().path.joinpath("f").read_bytes() == b"after" + BLOCK[5:] + BLOCK * (LENGTH // MIB - 1)


def test_times_and_length_stay(small):
    path = small.path / "f"
    with open(path, "wb", buffering=0) as file:
        file.write(BLOCK * 30)
        os.utime(path, ns=(1, 2))
        os.posix_fallocate(file.fileno(), 0, LENGTH)
        assert os.fstat(file.fileno()).st_size == LENGTH
        os.utime(path, ns=(1, 2))
        os.pwrite(file.fileno(), b"x", LENGTH - 1)
        assert path.stat().st_mtime_ns > 2 and path.stat().st_size == LENGTH
    assert path.read_bytes() == BLOCK * 30 + bytes(LENGTH - 30 * MIB - 1) + b"x"


def test_what_is_written_through_a_mapping(small):
    with open(small.path / "f", "w+b") as file:
        file.truncate(LENGTH)
        with mmap.mmap(file.fileno(), LENGTH) as area:
            for at in range(0, LENGTH, MIB):
                area[at : at + MIB] = BLOCK
            area.flush()
    assert (small.path / "f").read_bytes() == BLOCK * (LENGTH // MIB)


def test_a_file_that_was_there_and_is_opened_again(small):
    fill(small.path / "f")
    assert (small.path / "f").read_bytes() == BLOCK * (LENGTH // MIB)


@pytest.mark.parametrize("options", [(), ("--no-passthrough",)])
def test_many_times_what_memory_holds(tmp_path, options):
    """In each mode, with a memory of our own."""
    need_root_and_fuse()
    mount = Mount(tmp_path, "--shm-size", "16MiB", *options).start()
    try:
        for name in "ab":
            fill(mount.path / name)
        for name in "ab":
            assert (mount.path / name).read_bytes() == BLOCK * (LENGTH // MIB)
    finally:
        mount.clean()
