"""Times: utimens in its forms and ranges, and which operation moves which time of which node."""

import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from .support import UTIME_NOW, UTIME_OMIT, birth_ns, case, in_child, opened, pattern, rest, settle, tick, utimensat

SECOND_NS = 1_000_000_000
PAST_NS = 1_000_000_000 * SECOND_NS


def moved(path: Path, act: Callable[[], object]) -> set[str]:
    """Which of mtime and ctime of path the act moves forward; any step back is an error."""
    before = os.lstat(path)
    tick()
    act()
    after = os.lstat(path)
    assert after.st_ctime_ns >= before.st_ctime_ns
    pairs = {"mtime": (before.st_mtime_ns, after.st_mtime_ns), "ctime": (before.st_ctime_ns, after.st_ctime_ns)}
    return {name for name, (old, new) in pairs.items() if old != new}


@case
def no_time_steps_back_from_the_creation_on(path: Path) -> None:
    """What is written within the same tick of the kernel's clock has its time, which may be coarser than others."""
    for number in range(200):
        access = os.O_RDWR if number % 2 else os.O_WRONLY
        with opened(path / f"file{number}", os.O_CREAT | access) as fd:
            states = [os.fstat(fd)]
            for change in (lambda fd=fd: os.write(fd, b"x"), lambda fd=fd: os.ftruncate(fd, 5)):  # type: ignore[misc]
                change()
                states.append(os.fstat(fd))
        states.append(os.stat(path / f"file{number}"))
        times = [(state.st_mtime_ns, state.st_ctime_ns) for state in states]
        assert all(a <= b for before, after in pairwise(times) for a, b in zip(before, after, strict=True)), times


@case
def utimens_keeps_nanoseconds(path: Path) -> None:
    (path / "file").touch()
    (path / "folder").mkdir()
    for entry in (path / "file", path / "folder"):
        os.utime(entry, ns=(PAST_NS + 123_456_789, PAST_NS + 987_654_321))
        about = entry.stat()
        assert (about.st_atime_ns, about.st_mtime_ns) == (PAST_NS + 123_456_789, PAST_NS + 987_654_321)


@case
def utimens_by_descriptor(path: Path) -> None:
    with opened(path / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"x")
        os.utime(fd, ns=(PAST_NS + 1, PAST_NS + 2))
        about = os.fstat(fd)
    assert (about.st_atime_ns, about.st_mtime_ns) == (PAST_NS + 1, PAST_NS + 2)


@case
def utimens_before_the_close_stays(path: Path) -> None:
    # cp -p and tar set the times while the file is still open; nothing behind the close may move them.
    file = path / "file"
    with opened(file, os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, pattern(200_000))
        os.utime(fd, ns=(PAST_NS, PAST_NS + 5))
    assert file.stat().st_mtime_ns == PAST_NS + 5
    settle()
    assert file.stat().st_mtime_ns == PAST_NS + 5
    rest(file)
    assert file.stat().st_mtime_ns == PAST_NS + 5


@case
def utimens_on_a_symlink(path: Path) -> None:
    (path / "file").touch()
    os.symlink("file", path / "link")
    os.utime(path / "file", ns=(PAST_NS, PAST_NS))
    os.utime(path / "link", ns=(PAST_NS + 1, PAST_NS + 2), follow_symlinks=False)
    assert os.lstat(path / "link").st_mtime_ns == PAST_NS + 2
    assert (path / "file").stat().st_mtime_ns == PAST_NS


@case
def atime_alone(path: Path) -> None:
    file = path / "file"
    file.write_bytes(b"x")
    os.utime(file, ns=(PAST_NS, PAST_NS + 7))
    utimensat(file, (1_234_567_890, 42), (0, UTIME_OMIT))
    assert file.stat().st_atime_ns == 1_234_567_890 * SECOND_NS + 42
    assert file.stat().st_mtime_ns == PAST_NS + 7


@case
def mtime_alone(path: Path) -> None:
    file = path / "file"
    file.write_bytes(b"x")
    os.utime(file, ns=(PAST_NS + 3, PAST_NS))
    utimensat(file, (0, UTIME_OMIT), (1_234_567_890, 43))
    assert file.stat().st_atime_ns == PAST_NS + 3
    assert file.stat().st_mtime_ns == 1_234_567_890 * SECOND_NS + 43


@case
def now_is_now(path: Path) -> None:
    file = path / "file"
    file.touch()
    os.utime(file, ns=(PAST_NS, PAST_NS))
    # The clock of file times is coarse: it may lie one step behind.
    before = time.time_ns() - SECOND_NS
    utimensat(file, (0, UTIME_NOW), (0, UTIME_OMIT))
    about = file.stat()
    assert before <= about.st_atime_ns <= time.time_ns() + SECOND_NS
    assert about.st_mtime_ns == PAST_NS
    utimensat(file, (0, UTIME_OMIT), (0, UTIME_NOW))
    assert before <= file.stat().st_mtime_ns <= time.time_ns() + SECOND_NS


@case
def both_omitted_changes_nothing(path: Path) -> None:
    (path / "file").write_bytes(b"x")
    assert moved(path / "file", lambda: utimensat(path / "file", (0, UTIME_OMIT), (0, UTIME_OMIT))) == set()


@case
def times_before_1970(path: Path) -> None:
    file = path / "file"
    file.touch()
    for when_ns in (-1, -500_000_000, -SECOND_NS, -1_000_000_000 * SECOND_NS + 1):
        os.utime(file, ns=(when_ns, when_ns))
        assert (file.stat().st_atime_ns, file.stat().st_mtime_ns) == (when_ns, when_ns)


@case
def times_far_ahead(path: Path) -> None:
    file = path / "file"
    file.touch()
    for seconds in (2**31, 2**32 + 5, 10_000_000_000):
        os.utime(file, ns=(seconds * SECOND_NS + 1, seconds * SECOND_NS + 999_999_999))
        assert file.stat().st_atime_ns == seconds * SECOND_NS + 1
        assert file.stat().st_mtime_ns == seconds * SECOND_NS + 999_999_999


@case
def write_moves_mtime_and_ctime(path: Path) -> None:
    file = path / "file"
    with opened(file, os.O_CREAT | os.O_RDWR) as fd:
        assert moved(file, lambda: os.write(fd, b"x")) == {"mtime", "ctime"}
        assert moved(file, lambda: os.pwrite(fd, b"y", 0)) == {"mtime", "ctime"}
        assert moved(file, lambda: os.pwrite(fd, b"", 0)) == set()


@case
def write_after_utimens_moves_mtime(path: Path) -> None:
    file = path / "file"
    with opened(file, os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"x")
        os.utime(file, ns=(PAST_NS, PAST_NS))
        os.write(fd, b"y")
        assert os.fstat(fd).st_mtime_ns > PAST_NS
    assert file.stat().st_mtime_ns > PAST_NS


@case
def truncate_moves_mtime_and_ctime(path: Path) -> None:
    file = path / "file"
    file.write_bytes(b"0123456789")
    assert moved(file, lambda: os.truncate(file, 5)) == {"mtime", "ctime"}
    assert moved(file, lambda: os.truncate(file, 50)) == {"mtime", "ctime"}
    with opened(file, os.O_RDWR) as fd:
        assert moved(file, lambda: os.ftruncate(fd, 20)) == {"mtime", "ctime"}
    assert moved(file, lambda: os.close(os.open(file, os.O_WRONLY | os.O_TRUNC))) == {"mtime", "ctime"}


@case
def read_stat_and_sync_move_nothing(path: Path) -> None:
    file = path / "file"
    file.write_bytes(pattern(100_000))
    assert moved(file, file.read_bytes) == set()
    assert moved(file, file.stat) == set()
    assert moved(file, lambda: rest(file)) == set()
    assert moved(file, lambda: os.close(os.open(file, os.O_RDWR))) == set()


@case
def attribute_changes_move_ctime_alone(path: Path) -> None:
    file = path / "file"
    file.write_bytes(b"x")
    assert moved(file, lambda: os.chmod(file, 0o600)) == {"ctime"}
    assert moved(file, lambda: os.chown(file, 1, 1)) == {"ctime"}
    assert moved(file, lambda: os.link(file, path / "second")) == {"ctime"}
    assert moved(file, lambda: os.unlink(path / "second")) == {"ctime"}
    assert moved(file, lambda: os.setxattr(file, "user.test", b"1")) == {"ctime"}
    assert moved(file, lambda: utimensat(file, (1, 1), (0, UTIME_OMIT))) == {"ctime"}


@case
def rename_moves_ctime_of_the_file(path: Path) -> None:
    (path / "file").write_bytes(b"x")
    before = os.stat(path / "file")
    tick()
    os.rename(path / "file", path / "moved")
    after = os.stat(path / "moved")
    assert after.st_ctime_ns > before.st_ctime_ns
    assert after.st_mtime_ns == before.st_mtime_ns


@case
def entries_move_the_times_of_their_folder(path: Path) -> None:
    both = {"mtime", "ctime"}
    (path / "other").mkdir()
    assert moved(path, lambda: (path / "file").touch()) == both
    assert moved(path, lambda: (path / "folder").mkdir()) == both
    assert moved(path, lambda: os.symlink("x", path / "link")) == both
    assert moved(path, lambda: os.link(path / "file", path / "hard")) == both
    assert moved(path, lambda: os.rename(path / "file", path / "moved")) == both
    assert moved(path / "other", lambda: os.rename(path / "moved", path / "other" / "in")) == both
    assert moved(path, lambda: os.unlink(path / "hard")) == both
    assert moved(path, lambda: os.rmdir(path / "folder")) == both


@case
def use_of_a_file_leaves_its_folder(path: Path) -> None:
    (path / "file").write_bytes(b"x")
    assert moved(path, lambda: (path / "file").write_bytes(b"longer")) == set()
    assert moved(path, lambda: os.chmod(path / "file", 0o600)) == set()
    assert moved(path, lambda: os.listdir(path)) == set()


@case
def mtime_written_by_another_process_is_seen(path: Path) -> None:
    file = path / "file"
    file.write_bytes(b"x")

    def append() -> None:
        with opened(file, os.O_WRONLY | os.O_APPEND) as fd:
            os.write(fd, b"y")

    assert moved(file, lambda: in_child(append)) == {"mtime", "ctime"}
    assert file.stat().st_size == 2


@case
def birth_is_told_and_never_moves(path: Path) -> None:
    before = time.time_ns() - 10**9  # the clock of the kernel is coarse
    (path / "file").write_bytes(b"born")
    (path / "folder").mkdir()
    os.symlink("file", path / "link")
    born = birth_ns(path / "file")
    assert born is not None and before < born <= (path / "file").stat().st_ctime_ns
    tick()
    (path / "file").write_bytes(b"changed")
    os.utime(path / "file", ns=(1, 1))
    os.chmod(path / "file", 0o600)
    rest(path / "file")
    os.rename(path / "file", path / "folder" / "moved")
    assert birth_ns(path / "folder" / "moved") == born
    assert (path / "folder" / "moved").stat().st_mtime_ns == 1
    found = birth_ns(path / "folder")
    assert found is not None and found >= born
    with opened(path / "folder" / "moved", os.O_RDWR) as fd:
        os.write(fd, b"more than before")
        assert birth_ns(path / "folder" / "moved") == born
        assert os.stat(path / "folder" / "moved").st_size == 16
