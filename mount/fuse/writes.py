"""Writes that are more than bytes: without space, to be durable before they are answered, or taking privileges from a file.

Owns: what is done about each, as the transport has marked it (served_io.pxd). All others are answered there, or in the kernel.
Invariants: (1) Privileges go before the first byte is written. (2) A write that must be durable is answered when it is, or with
the error. (3) What is written here is written under the lock of the inode: nobody moves its file meanwhile.
"""

import errno
import os
import struct
from collections.abc import Callable
from functools import partial

import pyfuse3
import trio

from cascadefs.contents.outgrown import follow
from cascadefs.errors import os_error
from cascadefs.ext.fuse_transport import (
    WRITE_IS_DONE,
    WRITE_IS_KEPT,
    WRITE_IS_SYNCED,
    WRITE_TAKES_PRIVILEGES,
    WRITER_MAY_NOT_KEEP_SETID,
)
from cascadefs.mount.fuse import privileges
from cascadefs.mount.fuse.catch_up import Answered
from cascadefs.mount.fuse.handles import Handles, Opened
from cascadefs.store import Store

MARKS = WRITE_IS_DONE | WRITE_IS_KEPT | WRITE_IS_SYNCED | WRITE_TAKES_PRIVILEGES | WRITER_MAY_NOT_KEEP_SETID
ALLOCATION = b"/fallocate"  # the attribute that stands for a FALLOCATE
_ALLOCATION = struct.Struct("<QQQII")  # struct fuse_fallocate_in
_COUNT, _NUMBER = struct.Struct("<I"), struct.Struct("<Q")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Writes:
    """Those of one mount."""

    def __init__(self, store: Store, handles: Handles, answered: Answered) -> None:
        self.store, self.handles, self.answered = store, handles, answered

    async def write(self, fh: int, offset: int, data: bytes) -> int:
        """A WRITE whose handle carries the transport's marks; how many bytes were written."""
        marks = fh & MARKS
        if marks & WRITE_IS_KEPT:
            data = self.handles.transport.take_write(_NUMBER.unpack(data)[0])
        opened = self._opened(fh & ~MARKS)
        if marks & WRITE_TAKES_PRIVILEGES:
            may_keep = not marks & WRITER_MAY_NOT_KEEP_SETID
            self.take_privileges(opened.handle.ino, may_keep_set_id=may_keep, outside=opened.outside)
            if not privileges.are_held(self.store.namespace, opened.handle.ino):
                self.handles.privileges_changed(opened.handle.ino)
        if marks & WRITE_IS_DONE:
            written = int(_COUNT.unpack(data)[0])
        else:
            try:
                await self._put(opened, data, offset)
            finally:
                self.handles.transport.note_written(opened.handle.ino, offset, len(data))
            written = len(data)
        if marks & WRITE_IS_SYNCED:
            self.answered.catch_up()
            await self.store.mover.fsync(opened.handle.ino)
        return written

    def _opened(self, fh: int) -> Opened:
        opened = self.handles.get(fh)
        if opened is None:
            raise os_error(errno.EBADF)
        return opened

    async def _put(self, opened: Opened, data: bytes, offset: int) -> None:
        await self._with_room(opened, len(data), partial(_write_fully, opened.fd, data, offset))

    async def _with_room(self, opened: Opened, size_bytes: int, work: Callable[[], None]) -> None:
        """Work that may need so much room, in a thread: where the file is, else on the disk, else when what others have closed
        has become clean and can go."""
        ino, make_room = opened.handle.ino, partial(self.store.residency.make_room, size_bytes)
        async with self.store.files.of(ino).lock:
            if await _fits(work):
                return
            make_room()
            if await _fits(work) or (await self._moved(ino) and await _fits(work)):
                return
        await self.store.flush()
        async with self.store.files.of(ino).lock:
            make_room()
            await trio.to_thread.run_sync(work)

    async def _moved(self, ino: int) -> bool:
        """Whether the file lies on the disk now, and did not before. Holds the lock of the inode."""
        if self.handles.passthrough:
            return False
        with self.handles.held(ino):
            try:
                if not await self.store.outgrown.move(ino):
                    return False
            except OSError as e:
                if e.errno not in _FULL:
                    raise
                return False
            path = self.store.files.staged_path(self.store.namespace.get(ino))
            for fd in self.handles.writers_of(ino):
                follow(path, fd, os.O_RDWR)
        return True

    async def allocate(self, asked: bytes, is_root: bool) -> None:
        """A FALLOCATE of a file that has privileges, or that found no room. `is_root`: the caller may keep set-id bits; its
        groups are not told: those of whoever opened the file count."""
        fh, offset, length, mode, _ = _ALLOCATION.unpack(asked)
        opened = self._opened(fh)
        self.take_privileges(opened.handle.ino, may_keep_set_id=is_root, outside=opened.outside)
        allocate = partial(self.handles.transport.allocate, opened.fd, mode, offset, length)
        try:
            await self._with_room(opened, length, allocate)
        finally:
            self.handles.transport.note_written(opened.handle.ino, offset, length)

    def take_privileges(self, ino: int, *, may_keep_set_id: bool, outside: bool, tell_kernel: bool = True) -> None:
        """Somebody changes the content of a file. `tell_kernel`: the answer to this request has no attributes."""
        names = self.store.namespace
        if not privileges.take_from(names, ino, may_keep_set_id, outside):
            return
        self.answered.grants.renew(ino, names.find(ino))
        self.handles.privileges_changed(ino)
        if tell_kernel:
            pyfuse3.invalidate_inode(pyfuse3.InodeT(ino), attr_only=True)


async def _fits(work: Callable[[], None]) -> bool:
    try:
        await trio.to_thread.run_sync(work)
    except OSError as e:
        if e.errno not in _FULL:
            raise
        return False
    return True


def _write_fully(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
