"""Several processes and threads at once: appends, races for one name, locks, readers beside renames."""

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .support import KIB, MIB, PATIENCE_S, Child, case, gates, opened, pattern, refused, same, settle

THREADS = 8


def together(work: Callable[[int], object], count: int = THREADS) -> list[object]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count), timeout=PATIENCE_S))


def wins(call: Callable[[], object], lost: int) -> bool:
    """True if the call succeeded, False if it lost the race with that errno."""
    try:
        call()
    except OSError as error:
        if error.errno != lost:
            raise
        return False
    return True


@case
def two_processes_append_without_loss(path: Path) -> None:
    log = path / "log"
    log.touch()

    def append(letter: bytes) -> None:
        with opened(log, os.O_WRONLY | os.O_APPEND) as fd:
            for index in range(500):
                os.write(fd, letter + b"%05d\n" % index)

    children = [Child(lambda letter=letter: append(letter)) for letter in (b"a", b"b")]
    for child in children:
        child.finish()
    lines = log.read_bytes().split()
    assert len(lines) == 1000
    for letter in (b"a", b"b"):
        assert [line for line in lines if line[:1] == letter] == [letter + b"%05d" % index for index in range(500)]


@case
def two_processes_write_their_halves(path: Path) -> None:
    file = path / "file"
    file.touch()

    def write_half(half: int) -> None:
        with opened(file, os.O_WRONLY) as fd:
            for index in range(half, 64, 2):
                os.pwrite(fd, pattern(16 * KIB, seed=index), index * 16 * KIB)

    children = [Child(lambda half=half: write_half(half)) for half in (0, 1)]
    for child in children:
        child.finish()
    same(file.read_bytes(), b"".join(pattern(16 * KIB, seed=index) for index in range(64)))


@case
def threads_create_and_unlink_in_one_folder(path: Path) -> None:
    def churn(thread: int) -> None:
        for index in range(40):
            file = path / f"{thread}-{index}"
            file.write_bytes(b"%d" % index)
            assert file.read_bytes() == b"%d" % index
            if index % 2:
                file.unlink()

    together(churn)
    expected = {f"{thread}-{index}" for thread in range(THREADS) for index in range(0, 40, 2)}
    assert set(os.listdir(path)) == expected


@case
def threads_read_one_file_at_offsets(path: Path) -> None:
    data = pattern(5 * MIB)
    (path / "file").write_bytes(data)
    with opened(path / "file") as fd:

        def read(thread: int) -> None:
            for offset in range(thread * 1000, 5 * MIB, 512 * KIB):
                same(os.pread(fd, 10_000, offset), data[offset : offset + 10_000])

        together(read)


@case
def threads_write_equal_files(path: Path) -> None:
    data = pattern(1 * MIB)
    together(lambda thread: (path / f"{thread}").write_bytes(data))
    settle()
    with opened(path / "0", os.O_WRONLY) as fd:
        os.pwrite(fd, b"x", 0)
    for thread in range(1, THREADS):
        same((path / f"{thread}").read_bytes(), data)


@case
def exclusive_creation_has_one_winner(path: Path) -> None:
    for index in range(20):

        def create(_: int, name: Path = path / f"{index}") -> bool:
            return wins(lambda: os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)), errno.EEXIST)

        assert together(create, 4).count(True) == 1


@case
def mkdir_and_rmdir_have_one_winner(path: Path) -> None:
    for index in range(20):
        name = path / f"{index}"
        assert together(lambda _, name=name: wins(name.mkdir, errno.EEXIST), 4).count(True) == 1
        assert together(lambda _, name=name: wins(name.rmdir, errno.ENOENT), 4).count(True) == 1


@case
def rename_of_one_file_has_one_winner(path: Path) -> None:
    for index in range(20):
        (path / "source").write_bytes(b"%d" % index)

        def move(thread: int, index: int = index) -> bool:
            return wins(lambda: os.rename(path / "source", path / f"{index}-{thread}"), errno.ENOENT)

        assert together(move, 4).count(True) == 1
    assert len(os.listdir(path)) == 20


@case
def readers_beside_renames_see_old_or_new(path: Path) -> None:
    file = path / "file"
    file.write_bytes(b"0" * 50_000)
    with gates(1) as (ready,):

        def replace() -> None:
            ready.wait()
            for version in range(1, 60):
                (path / "tmp").write_bytes(b"%d" % (version % 10) * 50_000)
                os.rename(path / "tmp", file)

        child = Child(replace)
        ready.open()
        for _ in range(200):
            data = file.read_bytes()
            assert len(data) == 50_000
            assert data.count(data[:1]) == 50_000
        child.finish()
    assert os.listdir(path) == ["file"]


@case
def readers_beside_unlink_see_all_or_nothing(path: Path) -> None:
    file = path / "file"
    with gates(1) as (ready,):

        def come_and_go() -> None:
            ready.wait()
            for _ in range(60):
                (path / "tmp").write_bytes(b"x" * 30_000)
                os.rename(path / "tmp", file)
                os.unlink(file)

        child = Child(come_and_go)
        ready.open()
        for _ in range(200):
            try:
                data = file.read_bytes()
            except FileNotFoundError:
                continue
            assert data == b"x" * 30_000
        child.finish()
    assert os.listdir(path) == []


@case
def flock_excludes_another_process(path: Path) -> None:
    (path / "lock").touch()
    with gates(1) as (released,), opened(path / "lock") as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)

        def contend() -> None:
            with opened(path / "lock") as mine:
                refused(errno.EWOULDBLOCK, fcntl.flock, mine, fcntl.LOCK_SH | fcntl.LOCK_NB)
                released.wait()
                fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)

        child = Child(contend)
        # The child inherits this descriptor, hence unlocking and not closing is what frees the lock.
        settle()
        fcntl.flock(fd, fcntl.LOCK_UN)
        released.open()
        child.finish()


@case
def flock_is_shared_among_readers(path: Path) -> None:
    (path / "lock").touch()
    with opened(path / "lock") as one, opened(path / "lock") as two:
        fcntl.flock(one, fcntl.LOCK_SH)
        fcntl.flock(two, fcntl.LOCK_SH | fcntl.LOCK_NB)
        refused(errno.EWOULDBLOCK, fcntl.flock, two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)


@case
def record_locks_exclude_by_range(path: Path) -> None:
    (path / "file").write_bytes(bytes(100))
    with gates(2) as (tried, released), opened(path / "file", os.O_RDWR) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX, 50, 0)

        def contend() -> None:
            with opened(path / "file", os.O_RDWR) as mine:
                refused({errno.EAGAIN, errno.EACCES}, fcntl.lockf, mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 45)
                fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 50, 50)
                tried.open()
                released.wait()
                fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 100, 0)

        child = Child(contend)
        tried.wait()
        refused({errno.EAGAIN, errno.EACCES}, fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 99)
        fcntl.lockf(fd, fcntl.LOCK_UN, 50, 0)
        released.open()
        child.finish()


@case
def record_lock_tells_its_holder(path: Path) -> None:
    (path / "file").touch()
    with gates(2) as (locked, asked):

        def hold() -> None:
            with opened(path / "file", os.O_RDWR) as fd:
                fcntl.lockf(fd, fcntl.LOCK_EX)
                locked.open()
                asked.wait()

        child = Child(hold)
        locked.wait()
        with opened(path / "file", os.O_RDWR) as fd:
            # struct flock of 64-bit Linux: type, whence, start, length, pid.
            question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, pid = struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_GETLK, question))
            assert (kind, pid) == (fcntl.F_WRLCK, child.pid)
        asked.open()
        child.finish()


@case
def record_lock_ends_with_its_process(path: Path) -> None:
    (path / "file").touch()
    with gates(1) as (locked,):

        def die_locking() -> None:
            fcntl.lockf(os.open(path / "file", os.O_RDWR), fcntl.LOCK_EX)
            locked.open()

        child = Child(die_locking)
        locked.wait()
        child.finish()
    with opened(path / "file", os.O_RDWR) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


@case
def waiting_lock_is_granted(path: Path) -> None:
    (path / "lock").touch()
    with opened(path / "lock") as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)

        def wait_for_it() -> None:
            with opened(path / "lock") as mine:
                fcntl.flock(mine, fcntl.LOCK_EX)

        child = Child(wait_for_it)
        settle()
        fcntl.flock(fd, fcntl.LOCK_UN)
        child.finish()
