"""One file open several times, and several files with equal bytes: who sees a change, and who must not.

These are the places where a content-addressed store can go wrong: equal bytes may lie in one place, a change may not.
"""

import os
from contextlib import ExitStack
from pathlib import Path

from .support import MIB, Child, case, gates, in_child, opened, pattern, rest, same, settle

CREATE = os.O_CREAT | os.O_RDWR
SIZE = 5 * MIB + 11


def twins(path: Path, count: int = 2) -> list[Path]:
    made = [path / f"twin{index}" for index in range(count)]
    for file in made:
        file.write_bytes(pattern(SIZE))
    return made


def patched(offset: int, patch: bytes) -> bytes:
    data = bytearray(pattern(SIZE))
    data[offset : offset + len(patch)] = patch
    return bytes(data)


@case
def reader_sees_an_overwrite(path: Path) -> None:
    file = path / "file"
    file.write_bytes(pattern(SIZE))
    with opened(file) as reader:
        same(os.pread(reader, 100, 0), pattern(SIZE)[:100])
        with opened(file, os.O_WRONLY) as writer:
            os.pwrite(writer, b"NEW", 10)
            assert os.pread(reader, 3, 10) == b"NEW"
        assert os.pread(reader, 3, 10) == b"NEW"
    same(file.read_bytes(), patched(10, b"NEW"))


@case
def reader_of_a_resting_file_sees_an_overwrite(path: Path) -> None:
    file = path / "file"
    file.write_bytes(pattern(SIZE))
    rest(file)
    with opened(file) as reader:
        same(os.pread(reader, SIZE, 0), pattern(SIZE))
        with opened(file, os.O_RDWR) as writer:
            os.pwrite(writer, b"NEW", 4 * MIB)
            assert os.pread(writer, 3, 4 * MIB) == b"NEW"
        assert os.pread(reader, 3, 4 * MIB) == b"NEW"
        assert os.fstat(reader).st_size == SIZE


@case
def reader_sees_growth_and_truncation(path: Path) -> None:
    file = path / "file"
    file.write_bytes(b"start")
    with opened(file) as reader, opened(file, os.O_WRONLY | os.O_APPEND) as writer:
        assert os.read(reader, 100) == b"start"
        assert os.read(reader, 100) == b""
        os.write(writer, b"more")
        assert os.read(reader, 100) == b"more"
        os.ftruncate(writer, 2)
        assert os.fstat(reader).st_size == 2
        assert os.pread(reader, 100, 0) == b"st"


@case
def reader_sees_a_rewrite_with_trunc(path: Path) -> None:
    file = path / "file"
    file.write_bytes(pattern(SIZE))
    rest(file)
    with opened(file) as reader:
        file.write_bytes(b"rewritten")
        assert os.pread(reader, 100, 0) == b"rewritten"
        assert os.fstat(reader).st_ino == file.stat().st_ino


@case
def reader_sees_truncate_by_path(path: Path) -> None:
    file = path / "file"
    file.write_bytes(pattern(SIZE))
    rest(file)
    with opened(file) as reader:
        os.truncate(file, 1000)
        same(os.pread(reader, SIZE, 0), pattern(SIZE)[:1000])


@case
def reader_in_another_process_sees_an_overwrite(path: Path) -> None:
    file = path / "file"
    file.write_bytes(b"old bytes")
    with gates(2) as (ready, changed):

        def read_twice() -> None:
            with opened(file) as reader:
                assert os.pread(reader, 100, 0) == b"old bytes"
                ready.open()
                changed.wait()
                assert os.pread(reader, 100, 0) == b"new bytes"

        child = Child(read_twice)
        ready.wait()
        with opened(file, os.O_WRONLY) as writer:
            os.pwrite(writer, b"new", 0)
            changed.open()
            child.finish()


@case
def writer_reopened_at_once_keeps_writing(path: Path) -> None:
    file = path / "log"
    for index in range(100):
        with opened(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND) as fd:
            os.write(fd, b"%03d," % index)
    assert file.read_bytes() == b"".join(b"%03d," % index for index in range(100))


@case
def second_writer_after_the_first_closed(path: Path) -> None:
    file = path / "file"
    with opened(file, CREATE) as first:
        os.write(first, b"first.....")
        with opened(file, os.O_RDWR) as second:
            os.pwrite(second, b"second", 0)
        settle()
        os.pwrite(first, b"!", 9)
    assert file.read_bytes() == b"second...!"


@case
def equal_files_then_one_changes(path: Path) -> None:
    left, right = twins(path)
    with opened(left, os.O_WRONLY) as fd:
        os.pwrite(fd, b"changed", 4 * MIB - 3)
    same(right.read_bytes(), pattern(SIZE))
    same(left.read_bytes(), patched(4 * MIB - 3, b"changed"))


@case
def equal_resting_files_then_one_changes(path: Path) -> None:
    left, right, third = twins(path, 3)
    for file in (left, right, third):
        rest(file)
    with opened(left, os.O_WRONLY) as fd:
        os.pwrite(fd, b"changed", 0)
    third.unlink()
    rest(left)
    same(right.read_bytes(), pattern(SIZE))
    same(left.read_bytes(), patched(0, b"changed"))


@case
def equal_files_open_for_reading_then_one_changes(path: Path) -> None:
    left, right = twins(path)
    rest(left)
    rest(right)
    with opened(left) as left_fd, opened(right) as right_fd:
        same(os.pread(left_fd, SIZE, 0), os.pread(right_fd, SIZE, 0))
        with opened(left, os.O_RDWR) as writer:
            os.pwrite(writer, b"changed", 100)
        same(os.pread(right_fd, SIZE, 0), pattern(SIZE))
        same(os.pread(left_fd, SIZE, 0), patched(100, b"changed"))
        settle()
        same(os.pread(right_fd, SIZE, 0), pattern(SIZE))


@case
def equal_files_then_one_is_cut_or_deleted(path: Path) -> None:
    cut, deleted, kept = twins(path, 3)
    rest(kept)
    os.truncate(cut, 10)
    with opened(deleted) as fd:
        deleted.unlink()
        rest(cut)
        same(os.pread(fd, SIZE, 0), pattern(SIZE))
    same(kept.read_bytes(), pattern(SIZE))
    same(cut.read_bytes(), pattern(SIZE)[:10])


@case
def equal_files_written_side_by_side(path: Path) -> None:
    with ExitStack() as stack:
        fds = [stack.enter_context(opened(path / f"{index}", CREATE)) for index in range(4)]
        for offset in range(0, 1 * MIB, 64 * 1024):
            for fd in fds:
                os.write(fd, pattern(64 * 1024, seed=offset))
    settle()
    os.truncate(path / "0", 1)
    with opened(path / "1", os.O_WRONLY) as fd:
        os.pwrite(fd, b"x", 0)
    same((path / "2").read_bytes(), (path / "3").read_bytes())
    same((path / "1").read_bytes(), b"x" + (path / "2").read_bytes()[1:])
    assert (path / "2").stat().st_size == 1 * MIB


@case
def copy_on_write_keeps_the_untouched_blocks(path: Path) -> None:
    # Three blocks of 4 MiB: the middle one changes, from one of two equal files, in small steps.
    data = pattern(12 * MIB)
    for name in ("one", "two"):
        (path / name).write_bytes(data)
        rest(path / name)
    with opened(path / "one", os.O_RDWR) as fd:
        for step in range(8):
            os.pwrite(fd, b"%04d" % step, 5 * MIB + step * 1000)
            assert os.pread(fd, 4, 5 * MIB + step * 1000) == b"%04d" % step
    changed = bytearray(data)
    for step in range(8):
        changed[5 * MIB + step * 1000 : 5 * MIB + step * 1000 + 4] = b"%04d" % step
    same((path / "one").read_bytes(), bytes(changed))
    same((path / "two").read_bytes(), data)


@case
def inherited_descriptor_writes_after_the_parent_closed(path: Path) -> None:
    file = path / "file"
    with gates(1) as (closed,):
        fd = os.open(file, CREATE)

        def write_late() -> None:
            closed.wait()
            os.write(fd, b" late")

        os.write(fd, b"early")
        child = Child(write_late)
        os.close(fd)
        settle()
        closed.open()
        child.finish()
    assert file.read_bytes() == b"early late"


@case
def size_is_true_for_others_while_written(path: Path) -> None:
    file = path / "file"
    with opened(file, CREATE) as fd:
        for size in (1, 5000, 1_000_000):
            os.ftruncate(fd, 0)
            os.pwrite(fd, bytes(size), 0)
            assert file.stat().st_size == size

            def look(expected: int = size) -> None:
                assert file.stat().st_size == expected
                assert len(file.read_bytes()) == expected

            in_child(look)
