"""Names that were made, moved and removed for the kernel and are not in the index yet: a ring of records in the memory tier,
which outlives all processes.

Owns: the layout, reading it, and saying what is done with. Its writer is the transport (transport/name_ring.pxd), which
answers CREATE, RENAME and UNLINK by itself; without a mount nobody writes. Knows no index. Invariants:
(1) A record counts from when `put` says so until `done` does. It is settled after the commit that enters it, so a crash may
    show it again. Before that commit it gets the number of its operation: the folder's row tells whether it was entered
    (namespace.py `is_done`). A number of 0: nobody has begun.
(2) Nothing in the file is trusted: a ring that makes no sense is begun anew, with a line in the log.
(3) Records are in the order of the changes: a name may be removed and made again. A move has two, which come and go together.
"""

import contextlib
import ctypes
import logging
import mmap
import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from cascadefs.config import NAME_MAX
from cascadefs.errors import GONE, StoreError, os_error
from cascadefs.media.private_files import open_private, private_folder

MAP_FIXED = 0x10
_libc = ctypes.CDLL(None, use_errno=True)
log = logging.getLogger(__name__)
PLACE = ("names", "ring")  # folder and file, in the folder of the memory tier
RECORDS = 1 << 11
_HEAD = struct.Struct("<8sQQ40x")  # magic with the version of this layout, put, done
_RECORD = struct.Struct("<4QqQ4IiI256s")
_NUMBER_AT = 40  # in a record
_CREATE, _UNLINK, _RENAME = 35, 10, 12  # opcodes of FUSE
_FOR_BOTH = 1 << 16  # beside that of CREATE
_MOVED_TO = 1 << 17  # the second record of a RENAME
_COUNT = struct.Struct("<Q")
MAGIC = b"CFNR\x01\0\0\0"
RING_BYTES = _HEAD.size + RECORDS * _RECORD.size


@dataclass(frozen=True, slots=True)
class Created:
    """An empty regular file. `at`: its place among all records; `request`: the unique number of the CREATE; `fh`, `backing_id`:
    as the kernel was told. `for_both`: the file was opened for reading and writing."""

    at: int
    request: int
    number: int
    folder: int
    ino: int
    fh: int
    time_ns: int
    mode: int
    uid: int
    gid: int
    backing_id: int
    name: bytes
    for_both: bool = False


@dataclass(frozen=True, slots=True)
class Removed:
    """A name of something that is no folder is gone. `request`: the unique number of the UNLINK."""

    at: int
    request: int
    number: int
    folder: int
    time_ns: int
    name: bytes


@dataclass(frozen=True, slots=True)
class Moved:
    """A file has another name, which was absent. `request`: the unique number of the RENAME."""

    at: int
    request: int
    number: int
    folder: int
    ino: int
    time_ns: int
    name: bytes
    new_folder: int
    new_name: bytes


Change: TypeAlias = Created | Moved | Removed


def pending_changes(folder: Path) -> list[Change]:
    """What is not settled in a ring that nobody uses, read without changing anything; nothing when there is no ring or it makes
    no sense."""
    try:
        fd = open_private(folder.joinpath(*PLACE), os.O_RDONLY)
    except OSError:
        return []
    try:
        memory = os.pread(fd, RING_BYTES, 0)
    finally:
        os.close(fd)
    if len(memory) != RING_BYTES or not makes_sense(memory):
        return []
    _, put, done = _HEAD.unpack_from(memory)
    return _changes(memory, done, put)


def _changes(memory: bytes | mmap.mmap, done: int, put: int) -> list[Change]:
    found, at = [], done
    while at < put:
        if (change := _change(memory, at, put)) is not None:
            found.append(change)
        at += 2 if isinstance(change, Moved) else 1
    return found


def _change(memory: bytes | mmap.mmap, at: int, put: int) -> Change | None:
    found = _RECORD.unpack_from(memory, _place(at))
    request, folder, ino, fh, time_ns, number, kind, mode, uid, gid, backing_id, name_bytes, name = found
    name = name[:name_bytes]
    if 0 < name_bytes <= NAME_MAX and b"/" not in name:
        if kind == _UNLINK:
            return Removed(at, request, number, folder, time_ns, name)
        if kind == _RENAME and (there := _moved_to(memory, at + 1, put)):
            return Moved(at, request, number, folder, ino, time_ns, name, *there)
        if kind & ~_FOR_BOTH == _CREATE and stat.S_ISREG(mode):
            both = bool(kind & _FOR_BOTH)
            return Created(at, request, number, folder, ino, fh, time_ns, mode, uid, gid, backing_id, name, both)
    log.error("a record of the ring of names makes no sense: %s", found)
    return None


def _moved_to(memory: bytes | mmap.mmap, at: int, put: int) -> tuple[int, bytes] | None:
    """(folder, name) of the second record of a move."""
    _, folder, *_, kind, _, _, _, _, name_bytes, name = _RECORD.unpack_from(memory, _place(at))
    if at < put and kind == _MOVED_TO and 0 < name_bytes <= NAME_MAX and b"/" not in name[:name_bytes]:
        return folder, name[:name_bytes]
    return None


def _place(at: int) -> int:
    return _HEAD.size + at % RECORDS * _RECORD.size


def makes_sense(memory: bytes | mmap.mmap) -> bool:
    """Whether the head of a ring is one."""
    magic, put, done = _HEAD.unpack_from(memory)
    return bool(magic == MAGIC and put - RECORDS <= done <= put)


def _take_space(fd: int, folder: Path) -> None:
    """Writing to a mapping in a full tmpfs would end the process."""
    try:
        os.posix_fallocate(fd, 0, RING_BYTES)
    except OSError as e:
        raise StoreError(f"the memory tier {folder} has no space ({e.strerror}); free some or give another shm_dir") from e


class NameRing:
    """The ring of one memory tier, mapped."""

    def __init__(self, folder: Path) -> None:
        """Open or make the file. Raises StoreError."""
        private_folder(folder / PLACE[0])
        self._path = folder.joinpath(*PLACE)
        fd = open_private(self._path, os.O_RDWR | os.O_CREAT)
        try:
            fresh = os.fstat(fd).st_size != RING_BYTES
            if fresh:
                os.ftruncate(fd, RING_BYTES)
            _take_space(fd, folder)
            self.memory = mmap.mmap(fd, RING_BYTES)
            self._file = os.fstat(fd)
        finally:
            os.close(fd)
        if not makes_sense(self.memory):
            if not fresh:
                log.warning("the ring of names makes no sense and is begun anew")
            self.memory[: _HEAD.size] = _HEAD.pack(MAGIC, 0, 0)

    def is_there(self) -> bool:
        """Whether the file still has its name."""
        try:
            return os.path.samestat(self._file, os.lstat(self._path))
        except OSError:
            return False

    def renew(self, folder: Path) -> None:
        """Its file was taken away: another one takes its place under the same addresses: the transport need not know."""
        private_folder(folder / PLACE[0])
        self._path = folder.joinpath(*PLACE)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        fd = open_private(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            os.ftruncate(fd, RING_BYTES)
            _take_space(fd, folder)
            before = mmap.mmap(-1, RING_BYTES)
            before[:] = self.memory[:]
            os.pwrite(fd, before, 0)
            self._map_over(fd)
            self._file = os.fstat(fd)
            before.close()
        finally:
            os.close(fd)

    def _map_over(self, fd: int) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        flags = mmap.MAP_SHARED | MAP_FIXED
        _libc.mmap.restype = ctypes.c_void_p
        _libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        if _libc.mmap(address, RING_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0) != address:
            raise os_error(ctypes.get_errno(), str(self._path))

    def pending(self, put: int) -> list[Change]:
        """What is not settled of the first `put`, in the order it happened."""
        done = _HEAD.unpack_from(self.memory)[2]
        return _changes(self.memory, done, put)

    def begin(self, changes: Iterable[Change], numbers: Iterable[int]) -> None:
        """These are about to be entered, by operations of these numbers; 0: they were not."""
        for change, number in zip(changes, numbers, strict=True):
            _COUNT.pack_into(self.memory, _place(change.at) + _NUMBER_AT, number)

    @property
    def put(self) -> int:
        """How many records there have been."""
        return int(_HEAD.unpack_from(self.memory)[1])

    def close(self) -> None:
        """The store is closed: a ring with nothing in it goes, and is made anew by the next opening."""
        if not self.pending(self.put):
            with contextlib.suppress(*GONE):
                self._path.unlink()

    def settle(self, put: int) -> None:
        """The first `put` records have had their effect."""
        _COUNT.pack_into(self.memory, 16, put)
