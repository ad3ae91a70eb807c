"""System calls that Python's os module lacks, and readers of a file's bytes and attributes.

Owns: ctypes signatures. Knows one folder only, not that there are two. Every function raises OSError as the call does.
"""

import ctypes
import errno
import mmap
import os
import stat
import time

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_COLLAPSE = 1, 2, 8
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
AT_FDCWD, AT_SYMLINK_NOFOLLOW = -100, 0x100
DAY_NS = 86_400 * 10**9
PAGE = 4096
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p


class Timespec(ctypes.Structure):
    """struct timespec."""

    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class Area:
    """A shared mapping by mmap(2) itself: Python's own keeps a descriptor open, and the file's last close would never come."""

    def __init__(self, fd: int, size: int, writable: bool) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        address = _libc.mmap(None, ctypes.c_size_t(size), protection, mmap.MAP_SHARED, fd, ctypes.c_long(0))
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._address, self.size = address, size

    def read(self, start: int, end: int) -> bytes:
        """Only inside the file: beyond its end the kernel sends SIGBUS."""
        return ctypes.string_at(self._address + start, end - start)

    def write(self, start: int, data: bytes) -> None:
        """As read()."""
        ctypes.memmove(self._address + start, data, len(data))

    def sync(self) -> None:
        """msync(2)."""
        _check(_libc.msync(ctypes.c_void_p(self._address), ctypes.c_size_t(self.size), 4))

    def close(self) -> None:
        """munmap(2)."""
        _check(_libc.munmap(ctypes.c_void_p(self._address), ctypes.c_size_t(self.size)))


def renameat2(old: str, new: str, flags: int) -> None:
    """rename(2) with flags."""
    _check(_libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags)))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2): glibc's posix_fallocate() would hide a refusal."""
    _check(_libc.fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


def utimensat(path: str, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """utimensat(2) on the name itself; (seconds, nanoseconds), where UTIME_NOW and UTIME_OMIT stand for nanoseconds."""
    pair = (Timespec * 2)(Timespec(*atime), Timespec(*mtime))
    _check(_libc.utimensat(AT_FDCWD, os.fsencode(path), pair, AT_SYMLINK_NOFOLLOW))


def age(time_ns: int) -> int | str:
    """A time that was set, as it is; one that the clock made as "recent", because two folders are never changed at once."""
    return "recent" if abs(time_ns - time.time_ns()) < DAY_NS else time_ns


def attributes(found: os.stat_result) -> dict[str, object]:
    """What must be equal on both sides. Not: inode and device numbers, blocks, the size of a folder, ctime."""
    folder = stat.S_ISDIR(found.st_mode)
    return {
        "mode": oct(found.st_mode),
        "nlink": found.st_nlink,
        "owner": (found.st_uid, found.st_gid),
        "size": None if folder else found.st_size,
        "rdev": found.st_rdev,
        "atime": age(found.st_atime_ns),
        "mtime": age(found.st_mtime_ns),
    }


def pread_direct(fd: int, size: int, offset: int) -> bytes:
    """pread into page-aligned memory, as O_DIRECT wants it; all of it, as pread_fully()."""
    with mmap.mmap(-1, max(size, 1)) as buffer, memoryview(buffer) as view:
        done = 0
        while done < size and (got := os.preadv(fd, [view[done:size]], offset + done)):
            done += got
            if got % PAGE:
                break
        return bytes(view[:done])


def extended(path: str) -> dict[str, bytes]:
    """All extended attributes of a name itself; none where the kind of file has none."""
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as e:
        if e.errno == errno.EOPNOTSUPP:
            return {}
        raise
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in sorted(names)}


def data_ranges(fd: int) -> list[tuple[int, int]]:
    """What SEEK_DATA and SEEK_HOLE tell. Two filesystems may differ here; neither may call data a hole."""
    size, at, found = os.fstat(fd).st_size, 0, []
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                break
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        assert at > start, f"SEEK_HOLE from {start} told {at}"
        found.append((start, at))
    return found


def read_all(path: str) -> bytes:
    """The bytes of a file, in one go."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return pread_fully(fd, os.fstat(fd).st_size + 1, 0)
    finally:
        os.close(fd)


def pread_fully(fd: int, size: int, offset: int) -> bytes:
    """pread(2); a short answer before the end of the file is a fault of its own."""
    data = os.pread(fd, size, offset)
    if len(data) < size:
        rest = os.pread(fd, size - len(data), offset + len(data))
        assert not rest, f"short read: {len(data)} of {size} at {offset}, {len(rest)} more on asking again"
    return data
