"""Files that were made for the kernel and are not in the index yet: a ring of records in the memory tier, which outlives
all processes.

Owns: the layout, reading it, and saying what is done with. Its writer is the transport (cython_ext/create_ring.pxd), which
answers CREATE by itself; without a mount nobody writes. Knows no index. Invariants:
(1) A record counts from when `put` says so until `done` does. It is settled after the commit that enters it, so a crash may
    show it again: whoever enters it looks first whether its inode exists.
(2) Nothing in the file is trusted: a ring that makes no sense is begun anew, with a line in the log.
"""

import contextlib
import logging
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from cascadefs.config import NAME_MAX
from cascadefs.doors import open_private, private_folder

log = logging.getLogger(__name__)
PLACE = ("creates", "ring")  # folder and file, in the folder of the memory tier
RECORDS = 1 << 10
_HEAD = struct.Struct("<8sQQ40x")  # magic with the version of this layout, put, done
_RECORD = struct.Struct("<4Qq3IiI4x256s")
_COUNT = struct.Struct("<Q")
MAGIC = b"CFCR\x01\0\0\0"
RING_BYTES = _HEAD.size + RECORDS * _RECORD.size


@dataclass(frozen=True, slots=True)
class Created:
    """An empty regular file. `request`: the unique number of the CREATE; `fh`, `backing_id`: as the kernel was told."""

    request: int
    folder: int
    ino: int
    fh: int
    time_ns: int
    mode: int
    uid: int
    gid: int
    backing_id: int
    name: bytes


def pending_inodes(folder: Path) -> list[int]:
    """Inodes of a ring that nobody uses, read without changing anything; none when there is no ring or it makes no sense."""
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
    return [_RECORD.unpack_from(memory, _HEAD.size + number % RECORDS * _RECORD.size)[2] for number in range(done, put)]


def makes_sense(memory: bytes | mmap.mmap) -> bool:
    """Whether the head of a ring is one."""
    magic, put, done = _HEAD.unpack_from(memory)
    return bool(magic == MAGIC and put - RECORDS <= done <= put)


class Creates:
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
            self.memory = mmap.mmap(fd, RING_BYTES)
        finally:
            os.close(fd)
        if not makes_sense(self.memory):
            if not fresh:
                log.warning("the ring of created files makes no sense and is begun anew")
            self.memory[: _HEAD.size] = _HEAD.pack(MAGIC, 0, 0)

    def pending(self, put: int) -> list[Created]:
        """What is not settled of the first `put`, in the order it was made."""
        done = _HEAD.unpack_from(self.memory)[2]
        if put == done:
            return []
        records = (self._record(number % RECORDS) for number in range(done, put))
        return [record for record in records if record is not None]

    def _record(self, place: int) -> Created | None:
        found = _RECORD.unpack_from(self.memory, _HEAD.size + place * _RECORD.size)
        request, folder, ino, fh, time_ns, mode, uid, gid, backing_id, name_bytes, name = found
        created = Created(request, folder, ino, fh, time_ns, mode, uid, gid, backing_id, name[:name_bytes])
        if not 0 < name_bytes <= NAME_MAX or not stat.S_ISREG(created.mode) or b"/" in created.name:
            log.error("a record of a created file makes no sense: %s", created)
            return None
        return created

    @property
    def put(self) -> int:
        """How many records there have been."""
        return int(_HEAD.unpack_from(self.memory)[1])

    def close(self) -> None:
        """The store is closed: a ring with nothing in it goes, and is made anew by the next opening."""
        if not self.pending(self.put):
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()

    def settle(self, put: int) -> None:
        """The first `put` records have had their effect."""
        _COUNT.pack_into(self.memory, 16, put)
