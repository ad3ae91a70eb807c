"""Holes: sparse sizes up to 1 TiB, fallocate in its forms, punched holes, SEEK_DATA and SEEK_HOLE."""

import errno
import os
from pathlib import Path

from .support import (
    BLOCK,
    FALLOC_COLLAPSE_RANGE,
    FALLOC_INSERT_RANGE,
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    FALLOC_ZERO_RANGE,
    GIB,
    MIB,
    PAGE,
    TIB,
    case,
    fallocate,
    opened,
    pattern,
    refused,
    rest,
    run,
    same,
    zeros,
)

CREATE = os.O_CREAT | os.O_RDWR
# A huge page of 2 MiB may stand behind one written byte; a few of them are still small.
FEW_BLOCKS = 16 * MIB // BLOCK


@case
def truncate_up_to_1_tib(path: Path) -> None:
    with opened(path / "file", CREATE) as fd:
        os.ftruncate(fd, TIB)
        about = os.fstat(fd)
        assert about.st_size == TIB
        assert about.st_blocks < FEW_BLOCKS
        for offset in (0, 5 * GIB + 1, TIB - 5000):
            zeros(os.pread(fd, 5000, offset), 5000)
        os.ftruncate(fd, 10)
        zeros(os.pread(fd, 100, 0), 10)


@case
def data_in_the_middle_of_1_tib(path: Path) -> None:
    with opened(path / "file", CREATE) as fd:
        os.ftruncate(fd, TIB)
        os.pwrite(fd, b"island", 600 * GIB + 7)
        os.pwrite(fd, b"end", TIB - 3)
        assert os.pread(fd, 8, 600 * GIB + 6) == b"\0island\0"
        assert os.pread(fd, 10, TIB - 4) == b"\0end"
        assert os.fstat(fd).st_blocks < FEW_BLOCKS
        os.ftruncate(fd, 1000)
        zeros(os.pread(fd, 2000, 0), 1000)
        assert os.fstat(fd).st_blocks < FEW_BLOCKS


@case
def hole_of_1_gib_survives_close_and_rest(path: Path) -> None:
    file = path / "file"
    with opened(file, CREATE) as fd:
        os.write(fd, b"head")
        os.pwrite(fd, b"tail", GIB)
    rest(file)
    assert file.stat().st_size == GIB + 4
    assert file.stat().st_blocks < FEW_BLOCKS
    with opened(file, os.O_RDWR) as fd:
        assert os.pread(fd, 6, 0) == b"head\0\0"
        assert os.pread(fd, 100, GIB - 2) == b"\0\0tail"
        zeros(os.pread(fd, 1 * MIB, 500 * MIB), 1 * MIB)
        os.pwrite(fd, b"middle", 500 * MIB)
        assert os.pread(fd, 8, 500 * MIB - 1) == b"\0middle\0"


@case
def cut_and_regrown_bytes_are_zeros(path: Path) -> None:
    with opened(path / "file", CREATE) as fd:
        os.write(fd, b"\xff" * (3 * PAGE))
        os.ftruncate(fd, 100)
        os.ftruncate(fd, 3 * PAGE)
        zeros(os.pread(fd, 3 * PAGE, 100), 3 * PAGE - 100)


@case
def truncating_a_hole_counts_as_size_only(path: Path) -> None:
    file = path / "file"
    file.touch()
    os.truncate(file, 100 * MIB)
    assert (file.stat().st_size, file.stat().st_blocks) == (100 * MIB, 0)
    rest(file)
    assert file.stat().st_size == 100 * MIB
    assert file.stat().st_blocks < FEW_BLOCKS


@case
def posix_fallocate_really_allocates(path: Path) -> None:
    with opened(path / "file", CREATE) as fd:
        os.posix_fallocate(fd, 0, 8 * MIB)
        about = os.fstat(fd)
        assert about.st_size == 8 * MIB
        assert about.st_blocks >= 8 * MIB // BLOCK
        zeros(os.pread(fd, 8 * MIB, 0), 8 * MIB)


@case
def posix_fallocate_keeps_the_bytes(path: Path) -> None:
    file = path / "file"
    file.write_bytes(pattern(100_000))
    rest(file)
    with opened(file, os.O_RDWR) as fd:
        os.posix_fallocate(fd, 50_000, 10_000)
        assert os.fstat(fd).st_size == 100_000
        os.posix_fallocate(fd, 90_000, 110_000)
        assert os.fstat(fd).st_size == 200_000
        same(os.pread(fd, 300_000, 0), pattern(100_000) + bytes(100_000))


@case
def fallocate_keep_size(path: Path) -> None:
    with opened(path / "file", CREATE) as fd:
        os.write(fd, b"small")
        fallocate(fd, FALLOC_KEEP_SIZE, 0, 4 * MIB)
        about = os.fstat(fd)
        assert about.st_size == 5
        assert about.st_blocks >= 4 * MIB // BLOCK
        assert os.pread(fd, 100, 0) == b"small"
        os.pwrite(fd, b"later", 1 * MIB)
        assert os.fstat(fd).st_size == 1 * MIB + 5
        zeros(os.pread(fd, 1 * MIB - 5, 5), 1 * MIB - 5)


@case
def punch_hole_frees_and_zeroes(path: Path) -> None:
    data = pattern(12 * MIB)
    with opened(path / "file", CREATE) as fd:
        os.write(fd, data)
        os.fsync(fd)
        before = os.fstat(fd).st_blocks
        fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 2 * MIB, 8 * MIB)
        about = os.fstat(fd)
        assert about.st_size == 12 * MIB
        assert about.st_blocks <= before - 8 * MIB // BLOCK
        same(os.pread(fd, 2 * MIB, 0), data[: 2 * MIB])
        zeros(os.pread(fd, 8 * MIB, 2 * MIB), 8 * MIB)
        same(os.pread(fd, 4 * MIB, 10 * MIB), data[10 * MIB :])


@case
def punch_hole_at_odd_offsets_of_a_resting_file(path: Path) -> None:
    file = path / "file"
    data = bytearray(pattern(5 * MIB))
    for name in ("file", "twin"):
        (path / name).write_bytes(data)
        rest(path / name)
    with opened(file, os.O_RDWR) as fd:
        fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 1001, 2 * MIB + 3)
        data[1001 : 1001 + 2 * MIB + 3] = bytes(2 * MIB + 3)
        same(os.pread(fd, 5 * MIB, 0), bytes(data))
        os.pwrite(fd, b"refilled", 5000)
        assert os.pread(fd, 10, 4999) == b"\0refilled\0"
    same((path / "twin").read_bytes(), pattern(5 * MIB))


@case
def punch_hole_past_the_end_keeps_the_size(path: Path) -> None:
    with opened(path / "file", CREATE) as fd:
        os.write(fd, b"x" * 5000)
        fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 4000, 1 * MIB)
        assert os.fstat(fd).st_size == 5000
        assert os.pread(fd, 9000, 0) == b"x" * 4000 + bytes(1000)


@case
def fallocate_refuses_nonsense(path: Path) -> None:
    (path / "file").write_bytes(b"kept")
    with opened(path / "file", os.O_RDWR) as fd:
        refused(errno.EINVAL, fallocate, fd, 0, 0, 0)
        refused(errno.EINVAL, fallocate, fd, 0, -1, 100)
        refused(errno.EINVAL, fallocate, fd, 0, 0, -1)
        refused(errno.EFBIG, fallocate, fd, 0, 2**63 - 4096, 8192)
        # A hole without KEEP_SIZE is not defined.
        refused(errno.EOPNOTSUPP, fallocate, fd, FALLOC_PUNCH_HOLE, 0, 100)
        assert os.fstat(fd).st_size == 4
    with opened(path / "file") as fd:
        refused(errno.EBADF, fallocate, fd, 0, 0, 100)
    assert (path / "file").read_bytes() == b"kept"


@case
def seek_data_and_hole_tell_the_truth(path: Path) -> None:
    with opened(path / "file", CREATE) as fd:
        os.ftruncate(fd, 32 * MIB)
        os.pwrite(fd, pattern(1 * MIB), 16 * MIB)
        first = os.lseek(fd, 0, os.SEEK_DATA)
        assert 0 <= first <= 16 * MIB
        after = os.lseek(fd, 16 * MIB, os.SEEK_HOLE)
        assert 17 * MIB <= after <= 32 * MIB
        zeros(os.pread(fd, 16 * MIB, 0)[:first], first)
        zeros(os.pread(fd, 32 * MIB, after), 32 * MIB - after)
        assert os.lseek(fd, 16 * MIB + 5, os.SEEK_DATA) == 16 * MIB + 5
        refused(errno.ENXIO, os.lseek, fd, 32 * MIB, os.SEEK_DATA)
        refused(errno.ENXIO, os.lseek, fd, 32 * MIB + 1, os.SEEK_HOLE)


@case
def seek_data_skips_a_large_hole(path: Path) -> None:
    with opened(path / "file", CREATE) as fd:
        os.pwrite(fd, b"x", 64 * MIB)
        assert 62 * MIB <= os.lseek(fd, 0, os.SEEK_DATA) <= 64 * MIB
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 0


@case
def seek_hole_of_a_full_file_is_its_end(path: Path) -> None:
    file = path / "file"
    file.write_bytes(pattern(100_001))
    with opened(file) as fd:
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 100_001
        assert os.lseek(fd, 50_000, os.SEEK_HOLE) == 100_001
    (path / "empty").touch()
    with opened(path / "empty") as fd:
        refused(errno.ENXIO, os.lseek, fd, 0, os.SEEK_DATA)


@case
def sparse_copy_has_equal_bytes(path: Path) -> None:
    with opened(path / "file", CREATE) as fd:
        os.ftruncate(fd, 200 * MIB)
        os.pwrite(fd, pattern(5000), 100 * MIB + 1)
    run("cp", "--sparse=always", str(path / "file"), str(path / "copy"))
    run("cmp", str(path / "file"), str(path / "copy"))
    assert (path / "copy").stat().st_blocks < FEW_BLOCKS


@case
def zero_range_works_or_is_unsupported(path: Path) -> None:
    data = pattern(100_000)
    with opened(path / "file", CREATE) as fd:
        os.write(fd, data)
        try:
            fallocate(fd, FALLOC_ZERO_RANGE, 10_001, 30_000)
        except OSError as error:  # as tmpfs
            assert error.errno == errno.EOPNOTSUPP
            return
        same(os.pread(fd, 200_000, 0), data[:10_001] + bytes(30_000) + data[40_001:])
        fallocate(fd, FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE, 90_000, 60_000)
        assert os.fstat(fd).st_size == 100_000
        fallocate(fd, FALLOC_ZERO_RANGE, 95_000, 25_000)
        assert os.fstat(fd).st_size == 120_000
        zeros(os.pread(fd, 200_000, 90_000), 30_000)
    with opened(path / "file") as fd:
        refused(errno.EBADF, fallocate, fd, FALLOC_ZERO_RANGE, 0, 10)


@case
def ranges_are_not_moved_where_that_is_unsupported(path: Path) -> None:
    (path / "file").write_bytes(pattern(3 * PAGE))
    with opened(path / "file", os.O_RDWR) as fd:
        for mode in (FALLOC_COLLAPSE_RANGE, FALLOC_INSERT_RANGE):
            try:
                fallocate(fd, mode, 0, PAGE)
            except OSError as error:
                assert error.errno in (errno.EOPNOTSUPP, errno.EINVAL)
                same(os.pread(fd, 4 * PAGE, 0), pattern(3 * PAGE))
