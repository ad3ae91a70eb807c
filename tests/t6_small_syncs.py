"""Files that stay open and are synced again and again, over real mounts: after every loss of memory each has what its last
fsync was told. The judge is a plain file beside, changed by the same calls."""

import mmap
import os
import random
import shutil

import pytest

from cascadefs.config import KIB, MIB
from tests.posix.support import fallocate

SIZE = 9 * MIB + 777
KEEP, PUNCH = 1, 2  # FALLOC_FL_*


class Twins:
    """One file on the mount and one beside it."""

    def __init__(self, mount, plain, name, chance, flags):
        self.mount, self.chance = mount, chance
        self.paths = (mount.path / name, plain / name)
        data = chance.randbytes(SIZE)
        for path in self.paths:
            path.write_bytes(data)
        if "sealed" in flags:
            mount.flush()
        self.fds = [[os.open(path, os.O_RDWR) for _ in range(2)] for path in self.paths]
        if "creator" in flags:  # a handle that made the file: in passthrough nobody sees its writes
            self.close()
            self.fds = [[os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for _ in range(2)] for path in self.paths]
            self.both(lambda fd: os.pwrite(fd, data, 0))

    def open_again(self):
        """With the bytes that the mount has."""
        shutil.copyfile(*self.paths)
        self.fds = [[os.open(path, os.O_RDWR) for _ in range(2)] for path in self.paths]

    def both(self, work):
        which = self.chance.randrange(2)
        for handles in self.fds:
            work(handles[which])

    def close(self):
        for fd in (fd for handles in self.fds for fd in handles):
            os.close(fd)

    @property
    def size(self):
        return os.fstat(self.fds[1][0]).st_size

    def place(self, most):
        """An offset and a length in the file, or a little behind its end."""
        return self.chance.randrange(max(1, self.size + 100)), self.chance.randint(1, most)

    def write(self):
        offset, length = self.place(9000)
        data = self.chance.randbytes(length)
        self.both(lambda fd: os.pwrite(fd, data, offset))

    def write_much(self):
        offset, length = self.place(600 * KIB)
        data = self.chance.randbytes(length)
        self.both(lambda fd: os.pwrite(fd, data, offset))

    def append(self):
        data = self.chance.randbytes(self.chance.randint(1, 70_000))
        end = self.size
        self.both(lambda fd: os.pwrite(fd, data, end))

    def map(self):
        at, data = self.chance.randrange(self.size - 10), self.chance.randbytes(10)
        for handles in self.fds:
            with mmap.mmap(handles[0], self.size) as area:
                area[at : at + 10] = data

    def cut(self):
        size = self.chance.randrange(self.size // 2, self.size + 50_000)
        self.both(lambda fd: os.ftruncate(fd, size))

    def cut_and_grow(self):
        end = self.size
        cut = self.chance.randrange(end // 2, end)
        self.both(lambda fd: (os.ftruncate(fd, cut), os.ftruncate(fd, end)))

    def punch(self):
        offset, length = self.place(100_000)
        self.both(lambda fd: fallocate(fd, KEEP | PUNCH, offset, length))

    def allocate(self):
        offset, length = self.place(100_000)
        self.both(lambda fd: fallocate(fd, 0, offset, length))

    def copy(self):
        source, length = self.place(100_000)
        target = self.chance.randrange(self.size)
        length = max(1, min(length, abs(source - target)))  # they must not overlap
        self.both(lambda fd: os.copy_file_range(fd, fd, length, source, target))

    def sync(self):
        self.both(os.fsync)
        return self.paths[1].read_bytes()


SMALL = ("write", "write", "write", "append", "map")
ANY = (*SMALL, "write_much", "cut", "cut_and_grow", "punch", "allocate", "copy")


@pytest.mark.parametrize("how", ["updated", "sealed", "creator"])
@pytest.mark.parametrize("kinds", [SMALL, ANY], ids=["small", "any"])
def test_what_was_synced_is_there_after_a_loss_of_memory(mount, tmp_path, how, kinds):
    chance, logs = random.Random(f"{how}{len(kinds)}"), set()
    folder = mount.store / "patches"
    (tmp_path / "plain").mkdir()
    mount.start("--shm-size", "200MiB")
    twins = Twins(mount, tmp_path / "plain", "f", chance, how)
    for _ in range(2):
        wanted = twins.sync()
        for _ in range(15):
            for _ in range(chance.randint(0, 4)):
                getattr(twins, chance.choice(kinds))()
            wanted = twins.sync()
            logs.update(os.listdir(folder) if folder.exists() else ())
            if chance.random() < 0.06:
                mount.kill_worker()
        twins.write()  # and is not synced
        unsynced = twins.paths[1].read_bytes()
        mount.kill()
        twins.close()
        mount.wipe_memory()
        mount.start("--shm-size", "200MiB")
        found = twins.paths[0].read_bytes()
        pages = range(0, max(len(wanted), len(found)), 4096)
        assert found in (wanted, unsynced), [at for at in pages if found[at : at + 4096] != wanted[at : at + 4096]]
        assert logs
        twins.open_again()
    twins.close()
    mount.flush()
    assert twins.paths[0].read_bytes() == found
    mount.stop("--drop-memory", "--force")
    assert os.listdir(folder) == []
    mount.start()
    assert twins.paths[0].read_bytes() == found
