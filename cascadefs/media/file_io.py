"""The seam to the media: every call that changes or syncs a file of the store, or reads one of its extents, is made here.

Owns: complete transfers, and what a sync covers. Knows no format, no index, no tier. SQLite does its own I/O inside libsqlite3:
of index.db only opening and syncing pass here. All functions block: call them in a thread where a disk may answer slowly.
Invariants:
(1) A read is short only at the end of the file; a write is whole or raises OSError with the errno of the medium.
(2) Offsets stay multiples of ALIGN after a short transfer, so that a descriptor with O_DIRECT can go on.
(3) A name is durable only after sync_folder() of the folder that holds it; sync_file() does not stand in for that.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from cascadefs.errors import GONE
from cascadefs.ext.hashing import zero_runs
from cascadefs.media.private_files import open_private, private_folder, truncate_private

# Zeros that are left out: each hole costs the disk one more write. Where most is zeros, shorter ones pay.
HOLE_BYTES, SHORT_HOLE_BYTES = 64 << 10, 16 << 10
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE = 1, 2
MAPPED_BYTES, MAP_POPULATE = 16 << 20, 0x8000  # of a file that is copied, at once: mmap() holds the GIL for some 10 us
ALIGN = 4096  # O_DIRECT needs the logical block size of the device; 4096 suits every disk and Lustre
PADDING_MAX = 1 << 40
MODE = 0o600
Buffer = memoryview | mmap.mmap | bytes
_libc = ctypes.CDLL(None, use_errno=True)

# --- descriptors and bytes


def open_file(path: Path | str, flags: int) -> int:
    """A descriptor that the caller closes; a new file is for its owner only. What is no regular file of ours is EPERM or ELOOP
    (private_files.py), except for a folder that is asked for as one."""
    if flags & os.O_DIRECTORY:
        return os.open(path, flags | os.O_CLOEXEC)
    return open_private(path, flags, MODE)


def open_direct(path: Path | str, flags: int) -> int:
    """As open_file() with O_DIRECT; without it where the filesystem refuses it (tmpfs of old kernels)."""
    try:
        return open_file(path, flags | os.O_DIRECT)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        return open_file(path, flags)


def read_fully(fd: int, buffer: Buffer, position: int) -> int:
    """Fill a writable buffer from `position`; the number of bytes, smaller only when the file ends before."""
    with memoryview(buffer) as view:
        done = 0
        while done < len(view):
            at = done - done % ALIGN
            with view[at:] as rest:
                got = os.preadv(fd, [rest], position + at)
            if at + got <= done:
                return done
            done = at + got
        return done


def write_fully(fd: int, data: Buffer, position: int) -> None:
    """Write all of `data` at `position`."""
    with memoryview(data) as view:
        done = 0
        while done < len(view):
            at = done - done % ALIGN
            with view[at:] as rest:
                put = os.pwrite(fd, rest, position + at)
            if at + put <= done:
                raise OSError(errno.EIO, "the medium takes no more bytes and gives no reason")
            done = at + put


def write_with_holes(fd: int, data: Buffer, position: int) -> None:
    """As write_fully(), behind the end of a file and in whole pages: long runs of zeros are left out, so that they
    read as zeros and take no space. The last page is written: the file must reach it."""
    with memoryview(data) as view:
        with view[: max(0, len(view) - ALIGN)] as seen:
            holes = zero_runs(seen, SHORT_HOLE_BYTES)
        if sum(end - begin for begin, end in holes) < len(view) / 2:
            holes = [(begin, end) for begin, end in holes if end - begin >= HOLE_BYTES]
        write_between(fd, view, position, holes)


def write_between(fd: int, data: Buffer, position: int, holes: Iterable[tuple[int, int]]) -> None:
    """As write_fully(), without the (begin, end) parts of `data`, which ascend."""
    done = 0
    with memoryview(data) as view:
        for begin, end in [*holes, (len(view), len(view))]:
            if begin > done:
                with view[done:begin] as part:
                    write_fully(fd, part, position + done)
            done = end


def read_whole(fd: int, buffers: Iterable[Buffer]) -> int:
    """Fill writable buffers of bytes, one behind the other, from the beginning; how many bytes there were."""
    done = 0
    for buffer in buffers:
        got = read_fully(fd, buffer, done)
        done += got
        if got < len(memoryview(buffer)):
            break
    return done


def write_whole(path: str, parts: Iterable[Buffer]) -> None:
    """Write buffers of bytes, one behind the other, into a file that is there and empty."""
    fd, done = open_file(path, os.O_RDWR), 0
    try:
        for part in parts:
            write_fully(fd, part, done)
            done += len(memoryview(part))
    finally:
        os.close(fd)


def truncate(file: int | Path | str, size_bytes: int, by_handle: bool = True) -> None:
    """Cut or extend a file, by descriptor or by path; as ftruncate(2) or as truncate(2) does, which differ in the times of a
    file that has that size already."""
    if isinstance(file, int):
        os.truncate(file, size_bytes)
    else:
        truncate_private(str(file), size_bytes, by_handle)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """fallocate(PUNCH_HOLE | KEEP_SIZE); a filesystem without it keeps the space."""
    mode = FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE
    if _libc.fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        code = ctypes.get_errno()
        if code != errno.EOPNOTSUPP:
            raise OSError(code, os.strerror(code))


def allocate(fd: int, size_bytes: int, offset: int = 0) -> None:
    """Give a file blocks for that many bytes."""
    os.posix_fallocate(fd, offset, size_bytes)


def copy_file(source_fd: int, path: str) -> None:
    """Copy the bytes of an open file into a new file at `path`; holes stay holes."""
    remove(path)
    fd = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        size = os.fstat(source_fd).st_size
        truncate(fd, size)
        for start, end in data_ranges(source_fd, size):
            for at in range(start, end, MAPPED_BYTES):
                _copy_range(source_fd, fd, at, min(end, at + MAPPED_BYTES))
    finally:
        os.close(fd)


def make_own(path: Path) -> None:
    """A file that has another name, too (a copy of the store by hard links), is replaced by a copy: what is written to it must
    not reach the other. Durable on return."""
    try:
        if os.lstat(path).st_nlink < 2:
            return
    except FileNotFoundError:
        return
    partial = path.with_name(f"{path.name}.own")
    source_fd = open_file(path, os.O_RDONLY)
    try:
        copy_file(source_fd, str(partial))
    finally:
        os.close(source_fd)
    fd = open_file(partial, os.O_RDWR)
    try:
        sync_file(fd)
    finally:
        os.close(fd)
    rename(partial, path)
    sync_folder(path.parent)


def _copy_range(source_fd: int, fd: int, start: int, end: int) -> None:
    """From a mapping: 10 MiB in memory take 1.0 ms so, 1.5 by sendfile. What is missing because the file shrank meanwhile reads
    as zeros."""
    with contextlib.suppress(OSError, ValueError):  # it has shrunk, or cannot be mapped: below it is seen what there is
        flags = mmap.MAP_SHARED | MAP_POPULATE
        with mmap.mmap(source_fd, end - start, flags, mmap.PROT_READ, offset=start) as area, memoryview(area) as view:
            while start < end:
                start += os.pwrite(fd, view[len(view) - (end - start) :], start)
    os.lseek(fd, start, os.SEEK_SET)
    while start < end and (sent := os.sendfile(fd, source_fd, start, end - start)):
        start += sent


def cut_padding(path: str, state: os.stat_result) -> None:
    """Give back what is allocated behind the end of a file that nobody writes to; its times stay."""
    end = -(-state.st_size // ALIGN) * ALIGN
    if state.st_blocks * 512 <= end:
        return
    fd = open_file(path, os.O_RDWR)
    try:
        punch_hole(fd, end, PADDING_MAX)
        os.utime(fd, ns=(state.st_atime_ns, state.st_mtime_ns))
    finally:
        os.close(fd)


def has_gaps(state: os.stat_result) -> bool:
    """Whether a file has holes of a page or more."""
    return state.st_size - state.st_blocks * 512 >= ALIGN


def data_ranges(fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the parts of a file that are not holes; what it loses meanwhile is one."""
    at = 0
    while at < size_bytes:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return
            raise
        yield start, at


# --- names


def make_folder(path: Path) -> bool:
    """A folder for its owner only; whether it is new. StoreError when it cannot be one (private_files.py)."""
    is_new = True
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        is_new = False
    private_folder(path)
    return is_new


def remove(path: Path | str) -> None:
    """Unlink a file; no error when there is none."""
    with contextlib.suppress(*GONE):
        os.unlink(path)


def rename(old: Path | str, new: Path | str) -> None:
    """rename(2)."""
    os.rename(old, new)


def link(old: Path | str, new: Path | str) -> None:
    """A second name; what had the new name before loses it."""
    try:
        os.link(old, new)
    except FileExistsError:
        remove(new)
        os.link(old, new)


# --- durability


def sync_data(fd: int) -> None:
    """fdatasync: the bytes, and the size that is needed to read them."""
    os.fdatasync(fd)


def sync_file(fd: int) -> None:
    """fsync."""
    os.fsync(fd)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = open_file(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- what the filesystem says


def filesystem_magic(folder: Path) -> int:
    """f_type of statfs(2): tells Lustre from the rest. Python's statvfs does not carry it."""
    buffer = (ctypes.c_long * 32)()
    return buffer[0] if _libc.statfs(os.fsencode(folder), buffer) == 0 else 0


def is_full(folder: Path) -> bool:
    """Whether the filesystem has no block left for us."""
    return os.statvfs(folder).f_bavail == 0


def is_only_opener(read_only_fd: int) -> bool:
    """Whether no other open file and no mapping of it exists: then, and only then, the kernel grants a write lease."""
    return _lease(read_only_fd, fcntl.F_WRLCK)


def lease_is_free(read_only_fd: int) -> bool:
    """Whether no writable descriptor and no writable mapping of the file exists: the sealing rule."""
    return _lease(read_only_fd, fcntl.F_RDLCK)


def _lease(read_only_fd: int, kind: int) -> bool:
    """Whether the kernel grants a lease; it is given back at once."""
    try:
        fcntl.fcntl(read_only_fd, fcntl.F_SETLEASE, kind)
    except OSError as e:
        if e.errno == errno.EAGAIN:
            return False
        raise
    fcntl.fcntl(read_only_fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True
