"""open(2): every flag that an application of this file system uses, and what a descriptor then may do."""

import errno
import fcntl
import mmap
import os
import stat
from pathlib import Path

from .support import KIB, MIB, PAGE, case, opened, pattern, refused, same

CREATE = os.O_CREAT | os.O_RDWR


def aligned(data: bytes) -> mmap.mmap:
    """O_DIRECT wants page-aligned memory; an anonymous mapping is."""
    buffer = mmap.mmap(-1, max(len(data), 1))
    buffer[: len(data)] = data
    return buffer


@case
def creat_excl_wins_once(path: Path) -> None:
    with opened(path / "file", CREATE | os.O_EXCL) as fd:
        os.write(fd, b"first")
    refused(errno.EEXIST, os.open, path / "file", CREATE | os.O_EXCL)
    assert (path / "file").read_bytes() == b"first"


@case
def creat_excl_refuses_a_dangling_symlink(path: Path) -> None:
    os.symlink("target", path / "link")
    refused(errno.EEXIST, os.open, path / "link", CREATE | os.O_EXCL)
    assert not (path / "target").exists()


@case
def creat_makes_the_target_of_a_symlink(path: Path) -> None:
    os.symlink("target", path / "link")
    with opened(path / "link", CREATE) as fd:
        os.write(fd, b"through")
    assert (path / "target").read_bytes() == b"through"
    assert (path / "link").is_symlink()


@case
def creat_of_an_existing_file_keeps_it(path: Path) -> None:
    (path / "file").write_bytes(b"kept")
    os.chmod(path / "file", 0o600)
    with opened(path / "file", CREATE, 0o777) as fd:
        assert os.read(fd, 10) == b"kept"
    assert stat.S_IMODE(os.stat(path / "file").st_mode) == 0o600


@case
def trunc_empties_and_keeps_the_inode(path: Path) -> None:
    file = path / "file"
    file.write_bytes(pattern(100 * KIB))
    inode = file.stat().st_ino
    with opened(file, os.O_WRONLY | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == 0
        assert file.stat().st_size == 0
        os.write(fd, b"new")
    assert file.stat().st_ino == inode
    assert file.read_bytes() == b"new"


@case
def append_ignores_the_offset(path: Path) -> None:
    (path / "log").write_bytes(b"one,")
    with opened(path / "log", os.O_RDWR | os.O_APPEND) as fd:
        os.write(fd, b"two,")
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"three,")
        assert os.lseek(fd, 0, os.SEEK_CUR) == 14
        # Linux appends even in pwrite; see BUGS in pwrite(2).
        os.pwrite(fd, b"four", 0)
        assert os.pread(fd, 100, 0) == b"one,two,three,four"


@case
def append_can_be_switched_on_later(path: Path) -> None:
    with opened(path / "log", CREATE) as fd:
        os.write(fd, b"head")
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"tail")
    assert (path / "log").read_bytes() == b"headtail"


@case
def append_sees_the_end_moved_by_others(path: Path) -> None:
    with opened(path / "log", CREATE | os.O_APPEND) as fd, opened(path / "log", os.O_WRONLY | os.O_APPEND) as other:
        for index in range(20):
            os.write(other if index % 2 else fd, b"%02d" % index)
    assert (path / "log").read_bytes() == b"".join(b"%02d" % index for index in range(20))


@case
def directory_flag_wants_a_directory(path: Path) -> None:
    (path / "file").touch()
    os.symlink(".", path / "link")
    refused(errno.ENOTDIR, os.open, path / "file", os.O_RDONLY | os.O_DIRECTORY)
    with opened(path / "link", os.O_RDONLY | os.O_DIRECTORY) as fd:
        assert os.path.sameopenfile(fd, fd)
        assert os.fstat(fd).st_ino == path.stat().st_ino


@case
def nofollow_refuses_a_symlink(path: Path) -> None:
    (path / "file").write_bytes(b"x")
    os.symlink("file", path / "link")
    refused(errno.ELOOP, os.open, path / "link", os.O_RDONLY | os.O_NOFOLLOW)
    refused(errno.ELOOP, os.open, path / "link", CREATE | os.O_NOFOLLOW)
    with opened(path / "file", os.O_RDONLY | os.O_NOFOLLOW) as fd:
        assert os.read(fd, 1) == b"x"


@case
def path_descriptor_names_but_does_not_read(path: Path) -> None:
    (path / "file").write_bytes(b"bytes")
    with opened(path / "file", os.O_PATH) as fd:
        assert os.fstat(fd).st_size == 5
        refused(errno.EBADF, os.read, fd, 1)
        os.rename(path / "file", path / "moved")
        with opened(f"/proc/self/fd/{fd}") as readable:
            assert os.read(readable, 10) == b"bytes"


@case
def access_mode_is_kept(path: Path) -> None:
    (path / "file").write_bytes(b"x")
    with opened(path / "file") as fd:
        refused(errno.EBADF, os.write, fd, b"y")
        refused({errno.EBADF, errno.EINVAL}, os.ftruncate, fd, 0)
    with opened(path / "file", os.O_WRONLY) as fd:
        refused(errno.EBADF, os.read, fd, 1)
    assert (path / "file").read_bytes() == b"x"


@case
def direct_aligned_blocks(path: Path) -> None:
    data = pattern(1 * MIB)
    with aligned(data) as buffer, opened(path / "file", CREATE | os.O_DIRECT) as fd:
        assert os.pwritev(fd, [buffer], 0) == len(data)
        assert os.pwritev(fd, [buffer], len(data)) == len(data)
        buffer[:] = bytes(len(data))
        assert os.preadv(fd, [buffer], len(data)) == len(data)
        same(buffer[:], data)
    same((path / "file").read_bytes(), data * 2)


@case
def direct_read_of_an_odd_tail(path: Path) -> None:
    data = pattern(2 * PAGE + 777)
    (path / "file").write_bytes(data)
    with aligned(bytes(3 * PAGE)) as buffer, opened(path / "file", os.O_RDONLY | os.O_DIRECT) as fd:
        assert os.preadv(fd, [buffer], 0) == len(data)
        same(buffer[: len(data)], data)
        assert os.preadv(fd, [buffer], 2 * PAGE) == 777
        same(buffer[:777], data[2 * PAGE :])
        assert os.preadv(fd, [buffer], 3 * PAGE) == 0


@case
def direct_write_then_cut_to_an_odd_size(path: Path) -> None:
    data = pattern(4 * PAGE)
    with aligned(data) as buffer, opened(path / "file", CREATE | os.O_DIRECT) as fd:
        assert os.pwritev(fd, [buffer], 0) == len(data)
        os.ftruncate(fd, 3 * PAGE + 99)
    same((path / "file").read_bytes(), data[: 3 * PAGE + 99])


@case
def direct_write_of_an_odd_length(path: Path) -> None:
    # tmpfs takes any length and offset; a disk file system may say EINVAL.
    data = pattern(2 * PAGE + 777)
    with opened(path / "file", CREATE | os.O_DIRECT) as fd:
        assert os.pwrite(fd, data, 0) == len(data)
        assert os.pwrite(fd, b"patch", 4001) == 5
        same(os.pread(fd, 3 * PAGE, 0), data[:4001] + b"patch" + data[4006:])


@case
def direct_and_buffered_see_each_other(path: Path) -> None:
    (path / "file").write_bytes(pattern(4 * PAGE))
    fresh = pattern(PAGE, seed=1)
    with (
        aligned(fresh) as buffer,
        opened(path / "file", os.O_RDWR) as plain,
        opened(path / "file", os.O_RDWR | os.O_DIRECT) as direct,
    ):
        same(os.pread(plain, PAGE, PAGE), pattern(4 * PAGE)[PAGE : 2 * PAGE])
        os.pwritev(direct, [buffer], PAGE)
        same(os.pread(plain, PAGE, PAGE), fresh)
        os.pwrite(plain, b"buffered", 2 * PAGE)
        os.preadv(direct, [buffer], 2 * PAGE)
        assert buffer[:8] == b"buffered"


@case
def synchronous_writes(path: Path) -> None:
    for name, flag in (("sync", os.O_SYNC), ("dsync", os.O_DSYNC)):
        with opened(path / name, CREATE | flag) as fd:
            os.write(fd, pattern(10000))
            os.write(fd, b"end")
            assert fcntl.fcntl(fd, fcntl.F_GETFL) & flag == flag
        same((path / name).read_bytes(), pattern(10000) + b"end")


def nameless(path: Path, flags: int = os.O_RDWR, mode: int = 0o640) -> int:
    return os.open(path, os.O_TMPFILE | flags, mode)


def give_name(fd: int, folder: Path, name: str) -> None:
    """Only linkat with AT_SYMLINK_FOLLOW does; Python takes that way when a dir_fd is given."""
    with opened(folder) as at:
        os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=at, dst_dir_fd=at, follow_symlinks=True)


@case
def tmpfile_has_no_name_until_it_is_given_one(path: Path) -> None:
    for name, flags in (("plain", os.O_RDWR), ("synced", os.O_WRONLY | os.O_SYNC), ("direct", os.O_RDWR | os.O_DIRECT)):
        fd = nameless(path, flags)
        try:
            os.writev(fd, [aligned(b"n" * PAGE)])
            about = os.fstat(fd)
            assert (about.st_nlink, about.st_size, stat.S_IMODE(about.st_mode)) == (0, PAGE, 0o640)
            assert name not in os.listdir(path)
            give_name(fd, path, name)
            give_name(fd, path, name + "-too")
            assert os.fstat(fd).st_nlink == 2
        finally:
            os.close(fd)
        assert (path / name).read_bytes() == (path / (name + "-too")).read_bytes() == b"n" * PAGE
        assert (path / name).stat().st_ino == about.st_ino


@case
def tmpfile_with_excl_never_gets_a_name(path: Path) -> None:
    fd = nameless(path, os.O_RDWR | os.O_EXCL)
    try:
        os.write(fd, b"nameless")
        refused(errno.ENOENT, give_name, fd, path, "named")
        same(os.pread(fd, 100, 0), b"nameless")
    finally:
        os.close(fd)
    assert os.listdir(path) == []


@case
def tmpfile_is_one_more_file(path: Path) -> None:
    os.chown(path, 0, 4321)
    os.chmod(path, 0o2755)
    refused({errno.EINVAL, errno.EISDIR}, nameless, path, os.O_RDONLY)
    fds = [nameless(path, os.O_RDWR, 0o666) for _ in range(3)]
    for number, fd in enumerate(fds):
        os.write(fd, b"%d" % number)
        assert os.fstat(fd).st_gid == 4321
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o644
    assert len({os.fstat(fd).st_ino for fd in fds}) == 3
    os.fsync(fds[0])
    give_name(fds[0], path, "zero")
    refused(errno.EEXIST, give_name, fds[1], path, "zero")
    with mmap.mmap(fds[2], 1) as mapped:
        mapped[:1] = b"m"
    assert os.pread(fds[2], 1, 0) == b"m"
    for fd in fds:
        os.close(fd)
    assert os.listdir(path) == ["zero"]
    assert (path / "zero").read_bytes() == b"0"
    os.chmod(path, 0o755)


@case
def relative_to_a_folder_descriptor(path: Path) -> None:
    (path / "sub").mkdir()
    with opened(path / "sub", os.O_RDONLY | os.O_DIRECTORY) as folder:
        os.rename(path / "sub", path / "moved")
        os.close(os.open("file", CREATE, 0o600, dir_fd=folder))
        os.mkdir("inner", dir_fd=folder)
        assert sorted(os.listdir(folder)) == ["file", "inner"]
        assert os.stat("file", dir_fd=folder).st_ino == (path / "moved" / "file").stat().st_ino
        os.unlink("file", dir_fd=folder)
    assert os.listdir(path / "moved") == ["inner"]


@case
def duplicate_shares_the_offset_and_outlives(path: Path) -> None:
    fd = os.open(path / "file", CREATE)
    copy = os.dup(fd)
    try:
        os.write(fd, b"one")
        os.write(copy, b"two")
        assert os.lseek(fd, 0, os.SEEK_CUR) == 6
    finally:
        os.close(fd)
    try:
        os.write(copy, b"three")
        assert os.pread(copy, 100, 0) == b"onetwothree"
    finally:
        os.close(copy)
    assert (path / "file").read_bytes() == b"onetwothree"


@case
def five_hundred_files_open(path: Path) -> None:
    fds: list[int] = []
    try:
        for index in range(500):
            fds.append(os.open(path / f"{index}", CREATE | os.O_EXCL))
            os.write(fds[-1], b"number %d" % index)
        assert all(os.pread(fd, 100, 0) == b"number %d" % index for index, fd in enumerate(fds))
    finally:
        for fd in fds:
            os.close(fd)
    assert all((path / f"{index}").read_bytes() == b"number %d" % index for index in range(0, 500, 50))


@case
def one_file_open_a_hundred_times(path: Path) -> None:
    (path / "file").write_bytes(b"0" * 100)
    flags = (os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND, os.O_RDONLY | os.O_DIRECT)
    fds = [os.open(path / "file", flags[index % 4]) for index in range(100)]
    try:
        os.pwrite(fds[1], b"fresh", 50)
        for index, fd in enumerate(fds):
            if index % 4 != 3:
                assert os.pread(fd, 5, 50) == b"fresh"
    finally:
        for fd in fds:
            os.close(fd)
    assert (path / "file").read_bytes() == b"0" * 50 + b"fresh" + b"0" * 45
