"""Writers in a memory cgroup of 100 MiB: what they write through the mount is not charged to them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MIB = 1 << 20
LIMIT = 100 * MIB
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
WRITER = """
import os, sys
group, folder, count, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
open(group + "/cgroup.procs", "w").write(str(os.getpid()))
data = os.urandom(1 << 20)
for n in range(count):
    fd = os.open(f"{folder}/{n}", os.O_CREAT | os.O_WRONLY)
    for _ in range(size):
        os.write(fd, data)
    blocks = os.fstat(fd).st_blocks * 512
    assert blocks == size << 20, blocks
    os.close(fd)
"""


class Group:
    """A memory cgroup of its own, of either version."""

    def __init__(self) -> None:
        v2 = (V2 / "cgroup.controllers").exists() and "memory" in (V2 / "cgroup.controllers").read_text().split()
        self.path = (V2 if v2 else V1) / f"cascadefs-test-{os.getpid()}-{time.monotonic_ns()}"
        try:
            if v2:
                (V2 / "cgroup.subtree_control").write_text("+memory")
            self.path.mkdir()
            (self.path / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(str(LIMIT))
        except OSError as e:
            self.remove()
            pytest.skip(f"no memory cgroup can be made here: {e}")

    def shared_bytes(self) -> int:
        """Pages of tmpfs that are charged now."""
        lines = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        return int(lines["shmem"])

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self.path.rmdir()


@pytest.fixture
def group():
    found = Group()
    yield found
    found.remove()


@pytest.mark.parametrize(("count", "size"), [(200, 1), (4, 300), (60, 10)])
def test_a_writer_with_little_memory_is_not_killed(mount, group, count, size):
    mount.start("--shm-size", "2GiB")
    done = subprocess.run(
        [sys.executable, "-c", WRITER, group.path, mount.path, str(count), str(size)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode != -signal.SIGKILL, "killed for lack of memory"
    assert done.returncode == 0, done.stderr
    assert group.shared_bytes() < LIMIT // 2
    assert sorted(os.listdir(mount.path)) == sorted(map(str, range(count)))
    assert all(os.stat(mount.path / str(n)).st_size == size * MIB for n in range(count))
    mount.flush()
    staged = list((mount.memory / "staged").iterdir())
    assert sum(f.stat().st_blocks for f in staged if f.stat().st_size) == 0
    kept = [f.stat() for f in (mount.memory / "objects").iterdir()]
    assert all(state.st_blocks * 512 == state.st_size for state in kept)  # what was allocated ahead has been given back


MANY = """
import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
files = [os.open(f"{sys.argv[2]}/{n}", os.O_CREAT | os.O_WRONLY) for n in range(100)]
for _ in range(30):
    for fd in files:
        os.write(fd, b"x" * 100_000)
"""


def test_many_files_that_grow_at_once(mount, group):
    """None of them takes all that may be allocated ahead, though the last file of their folder was long."""
    mount.start("--shm-size", "2GiB")
    command = [sys.executable, "-c", WRITER, group.path, mount.path, "1", "60"]
    assert subprocess.run(command, timeout=100, check=False).returncode == 0
    os.unlink(mount.path / "0")
    assert subprocess.run([sys.executable, "-c", MANY, group.path, mount.path], timeout=100, check=False).returncode == 0
    assert group.shared_bytes() < LIMIT // 2


SCATTERED = """
import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
fd = os.open(sys.argv[2], os.O_CREAT | os.O_RDWR)
os.write(fd, b"begin")
os.ftruncate(fd, 1 << 30)
for at in range(1 << 21, 1 << 30, 1 << 21):
    os.pwrite(fd, b"x" * 4096, at)
assert os.fstat(fd).st_blocks == 512 * 8, os.fstat(fd).st_blocks
os.close(fd)
"""


def test_gaps_stay_gaps(mount, group):
    mount.start("--shm-size", "2GiB")
    command = [sys.executable, "-c", SCATTERED, group.path, mount.path / "f"]
    assert subprocess.run(command, timeout=100, check=False).returncode == 0


def test_the_next_file_is_expected_to_be_as_long(mount, group):
    """Small files after large ones, and a file that is opened again, take no more than they hold once they are sealed."""
    mount.start("--shm-size", "2GiB")
    for size in (64, 1):
        (mount.path / str(size)).mkdir()
        command = [sys.executable, "-c", WRITER, group.path, mount.path / str(size), "6", str(size)]
        assert subprocess.run(command, timeout=100, check=False).returncode == 0
    with open(mount.path / "1/0", "ab") as file:
        file.write(b"x" * 5000)
    mount.flush()
    space = os.statvfs(mount.memory)
    written = 64 * MIB + MIB + MIB + 8192  # equal files share an object; each run has its own bytes
    assert (space.f_blocks - space.f_bfree) * space.f_frsize <= written + 8 * MIB
