"""Bytes of one file: reading and writing at offsets, sizes, overwriting, unlinked files, kernel-side copies."""

import ctypes
import errno
import os
import random
import resource
from pathlib import Path

from .support import (
    KIB,
    MIB,
    PAGE,
    Child,
    case,
    gates,
    in_child,
    libc,
    opened,
    pattern,
    refused,
    rest,
    same,
    settle,
    zeros,
)

CREATE = os.O_CREAT | os.O_RDWR
AROUND_A_BLOCK = (0, 1, 511, PAGE - 1, PAGE, PAGE + 1, 4 * MIB - 1, 4 * MIB, 4 * MIB + 1, 5 * MIB + 123)


@case
def sizes_around_page_and_block(path: Path) -> None:
    for size in AROUND_A_BLOCK:
        data = pattern(size, seed=size)
        (path / f"{size}").write_bytes(data)
        same((path / f"{size}").read_bytes(), data)
        assert (path / f"{size}").stat().st_size == size


@case
def sizes_around_page_and_block_after_rest(path: Path) -> None:
    for size in AROUND_A_BLOCK:
        (path / f"{size}").write_bytes(pattern(size, seed=size))
        with opened(path / f"{size}") as fd:
            os.fsync(fd)
    settle()
    for size in AROUND_A_BLOCK:
        same((path / f"{size}").read_bytes(), pattern(size, seed=size))
        assert (path / f"{size}").stat().st_size == size


@case
def seek_read_and_write_move_one_offset(path: Path) -> None:
    with opened(path / "file", CREATE) as fd:
        assert os.write(fd, b"0123456789") == 10
        assert os.lseek(fd, -4, os.SEEK_END) == 6
        assert os.read(fd, 2) == b"67"
        assert os.write(fd, b"XY") == 2
        assert os.lseek(fd, -8, os.SEEK_CUR) == 2
        assert os.read(fd, 100) == b"234567XY"
        assert os.read(fd, 100) == b""


@case
def pread_and_pwrite_leave_the_offset(path: Path) -> None:
    with opened(path / "file", CREATE) as fd:
        os.write(fd, b"abcdef")
        assert os.pwrite(fd, b"ZZ", 1) == 2
        assert os.pread(fd, 3, 1) == b"ZZd"
        assert os.lseek(fd, 0, os.SEEK_CUR) == 6


@case
def vectors_are_one_read_and_one_write(path: Path) -> None:
    parts = [pattern(size, seed=size) for size in (1, 4095, 8192, 70001)]
    whole = b"".join(parts)
    with opened(path / "file", CREATE) as fd:
        assert os.writev(fd, parts) == len(whole)
        os.lseek(fd, 0, os.SEEK_SET)
        into = [bytearray(70001), bytearray(1), bytearray(20000)]
        assert os.readv(fd, into) == len(whole)
        same(b"".join(into)[: len(whole)], whole)
        assert os.pwritev(fd, [b"ab", b"cd"], 10) == 4
        assert os.preadv(fd, [bytearray(3), last := bytearray(1)], 10) == 4
        assert last == b"d"


@case
def read_at_and_past_the_end(path: Path) -> None:
    (path / "file").write_bytes(pattern(5000))
    with opened(path / "file") as fd:
        same(os.pread(fd, 10000, 4990), pattern(5000)[4990:])
        assert os.pread(fd, 10, 5000) == b""
        assert os.pread(fd, 10, 1 << 40) == b""


@case
def write_past_the_end_makes_zeros(path: Path) -> None:
    with opened(path / "file", CREATE) as fd:
        os.write(fd, b"head")
        os.pwrite(fd, b"tail", 3 * PAGE + 5)
        assert os.fstat(fd).st_size == 3 * PAGE + 9
    data = (path / "file").read_bytes()
    assert (data[:4], data[-4:]) == (b"head", b"tail")
    zeros(data[4:-4], 3 * PAGE + 1)


@case
def write_of_nothing_changes_nothing(path: Path) -> None:
    with opened(path / "file", CREATE) as fd:
        os.write(fd, b"x")
        assert os.pwrite(fd, b"", 1000) == 0
        assert os.fstat(fd).st_size == 1


@case
def one_write_of_16_mib_is_whole(path: Path) -> None:
    data = pattern(16 * MIB)
    with opened(path / "file", CREATE) as fd:
        assert os.write(fd, data) == len(data)
        assert os.lseek(fd, 0, os.SEEK_CUR) == len(data)
    assert (path / "file").stat().st_size == len(data)
    same((path / "file").read_bytes(), data)


@case
def one_read_of_16_mib_is_whole(path: Path) -> None:
    data = pattern(16 * MIB + 77)
    (path / "file").write_bytes(data)
    rest(path / "file")
    with opened(path / "file") as fd:
        same(os.pread(fd, 16 * MIB, 0), data[: 16 * MIB])
        same(os.pread(fd, 16 * MIB, 100), data[100:])


@case
def overwrite_in_place_without_trunc(path: Path) -> None:
    data = bytearray(pattern(9 * MIB))
    file = path / "file"
    file.write_bytes(data)
    for offset, at_rest in ((0, False), (4 * MIB - 3, True), (9 * MIB - 6, True)):
        if at_rest:
            rest(file)
        with opened(file, os.O_WRONLY) as fd:
            os.pwrite(fd, b"middle", offset)
        data[offset : offset + 6] = b"middle"
        same(file.read_bytes(), bytes(data))


@case
def overwrite_with_the_same_bytes(path: Path) -> None:
    file = path / "file"
    for _ in range(3):
        with opened(file, CREATE | os.O_TRUNC) as fd:
            os.write(fd, pattern(100_000))
        same(file.read_bytes(), pattern(100_000))


@case
def shorter_rewrite_leaves_no_stale_tail(path: Path) -> None:
    file = path / "file"
    file.write_bytes(pattern(5 * MIB))
    rest(file)
    file.write_bytes(b"short")
    assert file.stat().st_size == 5
    assert file.read_bytes() == b"short"
    os.truncate(file, 5 * MIB)
    zeros(file.read_bytes()[5:], 5 * MIB - 5)


@case
def truncate_both_ways_by_path(path: Path) -> None:
    file = path / "file"
    file.write_bytes(pattern(10_000))
    rest(file)
    os.truncate(file, 4000)
    same(file.read_bytes(), pattern(10_000)[:4000])
    os.truncate(file, 9000)
    same(file.read_bytes(), pattern(10_000)[:4000] + bytes(5000))
    os.truncate(file, 0)
    assert file.read_bytes() == b""


@case
def truncate_both_ways_by_descriptor(path: Path) -> None:
    with opened(path / "file", CREATE) as fd:
        os.write(fd, pattern(10_000))
        os.ftruncate(fd, 4097)
        assert os.fstat(fd).st_size == 4097
        os.ftruncate(fd, 20_000)
        same(os.pread(fd, 30_000, 0), pattern(10_000)[:4097] + bytes(20_000 - 4097))
        assert os.lseek(fd, 0, os.SEEK_CUR) == 10_000


@case
def random_writes_and_cuts_match_a_model(path: Path) -> None:
    chance = random.Random(7)
    model = bytearray()
    file = path / "file"
    for step in range(150):
        offset, length = chance.randrange(300 * KIB), chance.randrange(1, 40 * KIB)
        with opened(file, CREATE) as fd:
            if chance.random() < 0.2:
                os.ftruncate(fd, offset)
                model[offset:] = bytes(max(0, offset - len(model)))
            else:
                os.pwrite(fd, pattern(length, seed=step), offset)
                model.extend(bytes(max(0, offset - len(model))))
                model[offset : offset + length] = pattern(length, seed=step)
        if step % 10 == 0:
            same(file.read_bytes(), bytes(model))
    same(file.read_bytes(), bytes(model))


@case
def unlinked_open_file_lives_on(path: Path) -> None:
    file = path / "file"
    file.write_bytes(b"before")
    with opened(file, os.O_RDWR) as fd:
        file.unlink()
        assert os.listdir(path) == []
        assert os.fstat(fd).st_nlink == 0
        assert os.read(fd, 100) == b"before"
        os.write(fd, pattern(1 * MIB))
        os.ftruncate(fd, 500_000)
        os.fsync(fd)
        assert os.fstat(fd).st_size == 500_000
        same(os.pread(fd, 1 * MIB, 0), b"before" + pattern(1 * MIB)[: 500_000 - 6])
        os.fchmod(fd, 0o600)
        assert os.fstat(fd).st_mode & 0o777 == 0o600


@case
def unlinked_resting_file_can_still_be_read(path: Path) -> None:
    file = path / "file"
    file.write_bytes(pattern(6 * MIB))
    rest(file)
    with opened(file) as fd:
        file.unlink()
        settle()
        same(os.pread(fd, 6 * MIB, 0), pattern(6 * MIB))


@case
def new_file_under_an_unlinked_name_is_another(path: Path) -> None:
    file = path / "file"
    file.write_bytes(b"old")
    with opened(file, os.O_RDWR) as old:
        file.unlink()
        file.write_bytes(b"newer")
        assert os.fstat(old).st_ino != file.stat().st_ino
        os.pwrite(old, b"OLD", 0)
        assert os.pread(old, 10, 0) == b"OLD"
    assert file.read_bytes() == b"newer"


@case
def fsync_and_fdatasync_on_files(path: Path) -> None:
    with opened(path / "file", CREATE) as fd:
        for sync in (os.fsync, os.fdatasync):
            os.write(fd, b"part,")
            sync(fd)
            os.write(fd, b"rest,")
        assert os.pread(fd, 100, 0) == b"part,rest,part,rest,"
    with opened(path / "file") as fd:
        os.fsync(fd)
    assert (path / "file").read_bytes() == b"part,rest,part,rest,"


@case
def file_size_limit_is_efbig(path: Path) -> None:
    def write_beyond() -> None:
        # Python ignores SIGXFSZ, so that the limit shows itself as an errno.
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        with opened(path / "file", CREATE) as fd:
            assert os.pwrite(fd, pattern(8000), 4000) == 6000
            refused(errno.EFBIG, os.pwrite, fd, b"x", 10_000)
            refused(errno.EFBIG, os.ftruncate, fd, 10_001)

    in_child(write_beyond)
    same((path / "file").read_bytes(), bytes(4000) + pattern(8000)[:6000])


@case
def offset_near_the_end_of_numbers(path: Path) -> None:
    file = path / "file"
    file.write_bytes(b"kept")
    with opened(file, os.O_RDWR) as fd:
        refused({errno.EFBIG, errno.EINVAL}, os.pwrite, fd, b"xy", 2**63 - 2)
        try:
            os.pwrite(fd, b"x", 2**62)
        except OSError as error:
            assert error.errno == errno.EFBIG
            assert os.fstat(fd).st_size == 4
        else:
            assert os.fstat(fd).st_size == 2**62 + 1
            assert os.pread(fd, 10, 2**62) == b"x"
        os.ftruncate(fd, 4)
    assert file.read_bytes() == b"kept"


def libc_copy(source: int, source_at: int, target: int, target_at: int, length: int) -> int:
    """copy_file_range through the C library, because Python offers it only where it was built with it."""
    offsets = ctypes.c_int64(source_at), ctypes.c_int64(target_at)
    return int(
        libc.copy_file_range(
            source, ctypes.byref(offsets[0]), target, ctypes.byref(offsets[1]), ctypes.c_size_t(length), 0
        )
    )


@case
def copy_file_range_between_and_within(path: Path) -> None:
    data = pattern(3 * MIB)
    (path / "source").write_bytes(data)
    with opened(path / "source", os.O_RDWR) as source, opened(path / "target", CREATE) as target:
        done = 0
        while done < len(data):
            step = libc_copy(source, done, target, done + 10, len(data) - done)
            assert step > 0
            done += step
        assert libc_copy(source, 0, source, 2 * MIB, 1000) == 1000
        assert libc_copy(source, len(data), target, 0, 1000) == 0
        assert os.lseek(source, 0, os.SEEK_CUR) == 0
    same((path / "target").read_bytes(), bytes(10) + data)
    same((path / "source").read_bytes(), data[: 2 * MIB] + data[:1000] + data[2 * MIB + 1000 :])


@case
def sendfile_reads_and_writes_here(path: Path) -> None:
    data = pattern(2 * MIB + 5)
    (path / "source").write_bytes(data)
    with opened(path / "source") as source, opened(path / "target", CREATE) as target:
        done = 0
        while step := os.sendfile(target, source, done, len(data)):
            done += step
    same((path / "target").read_bytes(), data)


@case
def splice_through_a_pipe(path: Path) -> None:
    (path / "source").write_bytes(pattern(60_000))
    read_end, write_end = os.pipe()
    try:
        with opened(path / "source") as source, opened(path / "target", CREATE) as target:
            done = 0
            while done < 60_000:
                step = os.splice(source, write_end, 60_000 - done)
                assert step > 0
                left = step
                while left:
                    left -= os.splice(read_end, target, left)
                done += step
    finally:
        os.close(read_end)
        os.close(write_end)
    same((path / "target").read_bytes(), pattern(60_000))


@case
def killed_writer_leaves_what_it_wrote(path: Path) -> None:
    with gates(1) as (written,):

        def write_and_hang() -> None:
            with opened(path / "file", CREATE) as fd:
                os.write(fd, pattern(300_000))
                written.open()
                written_forever, _ = os.pipe()
                os.read(written_forever, 1)

        child = Child(write_and_hang)
        try:
            written.wait()
        finally:
            child.kill()
    same((path / "file").read_bytes(), pattern(300_000))
