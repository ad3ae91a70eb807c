"""Raw references: one plain file for each block, on a tmpfs, on one with huge pages, on disk with and without fsync.

Owns: the way in which files are written and read; the mount of cascadefs is driven by the same code. Knows no medium.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cascadefs.bench.compare.adapter import (
    Pair,
    Room,
    Safety,
    Service,
    Shape,
    StorageAdapter,
    folder_service,
    register,
    sync_files,
)
from cascadefs.bench.compare.own_files import OnTmpfs
from cascadefs.bench.targets import LeftOut

NEW = os.O_CREAT | os.O_EXCL | os.O_WRONLY


def write_all(fd: int, views: list[memoryview]) -> None:
    """Vectored write; what a short one left is written after it."""
    done = os.writev(fd, views)
    for view in views:
        skipped = min(done, len(view))
        done -= skipped
        rest = view[skipped:]
        while rest:
            rest = rest[os.write(fd, rest) :]


def read_all(fd: int, views: list[memoryview]) -> bool:
    """Vectored read into all of `views`; False when the file ends before."""
    done = os.readv(fd, views)
    if done == sum(map(len, views)):
        return True
    for view in views:
        filled = min(done, len(view))
        done -= filled
        rest = view[filled:]
        while rest:
            if not (more := os.readv(fd, [rest])):
                return False
            rest = rest[more:]
    return True


class FilePerBlock(StorageAdapter):
    """open, writev, close; open, readv, close."""

    sync = False
    reference = True

    def initialize(self, address: str, rank: int, shape: Shape) -> None:
        self.folder, self.mine = address, list[str]()

    def path(self, block_id: str) -> str:
        """Where a block lies."""
        return f"{self.folder}/{block_id}"

    def put(self, block_id: str, key: memoryview, value: memoryview) -> None:
        fd = os.open(self.path(block_id), NEW, 0o600)
        try:
            write_all(fd, [key, value])
            if self.sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        self.mine.append(block_id)

    def get(self, block_id: str, sink: Pair) -> Pair | None:
        try:
            fd = os.open(self.path(block_id), os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return sink if read_all(fd, list(sink)) else None
        finally:
            os.close(fd)

    def contains(self, block_id: str) -> bool:
        return os.path.exists(self.path(block_id))

    def clear(self) -> None:
        for block_id in self.mine:
            os.unlink(self.path(block_id))
        self.mine.clear()


@register
class TmpfsFile(OnTmpfs, FilePerBlock):
    name, title = "raw-tmpfs", "raw tmpfs file"


@register
class HugeTmpfsFile(TmpfsFile):
    name, title = "raw-huge", "raw huge tmpfs file"

    @classmethod
    @contextmanager
    def serve(cls, room: Room, shape: Shape) -> Iterator[Service]:
        if room.huge is None:
            raise LeftOut("mounting a tmpfs needs root")
        yield folder_service(room.huge / cls.name, has_medium=False)


@register
class DiskFile(FilePerBlock):
    name, title, durable, safety = "raw-disk", "raw disk file", "page cache", Safety.KERNEL

    def flush(self) -> None:
        sync_files(Path(self.path(block_id)) for block_id in self.mine)


@register
class SyncedDiskFile(FilePerBlock):
    name, title, durable, safety = "raw-disk-fsync", "raw disk file, fsync", "disk, fsynced", Safety.SYNCED
    sync = True
