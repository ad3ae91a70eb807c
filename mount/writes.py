"""Writes that are more than bytes: without space, to be durable before they are answered, or taking privileges from a file.

Owns: what is done about each, as the transport has marked it (served_io.pxd). All others are answered there, or in the kernel.
Invariants: (1) Privileges go before the first byte is written, unless the bytes do not fit the socket, as those of an ordinary
user's mount may (which is nosuid). (2) A write that must be durable is answered when it is, or with the error.
"""

import errno
import os
import struct

import pyfuse3
import trio

from cascadefs.errors import os_error
from cascadefs.ext.fuse_transport import (
    WRITE_IS_DONE,
    WRITE_IS_SYNCED,
    WRITE_TAKES_PRIVILEGES,
    WRITER_MAY_NOT_KEEP_SETID,
)
from cascadefs.mount import privileges
from cascadefs.mount.answered import Answered
from cascadefs.mount.handles import Handles, Opened
from cascadefs.store import Store

MARKS = WRITE_IS_DONE | WRITE_IS_SYNCED | WRITE_TAKES_PRIVILEGES | WRITER_MAY_NOT_KEEP_SETID
ALLOCATION = b"/fallocate"  # the attribute that stands for a FALLOCATE
_ALLOCATION = struct.Struct("<QQQII")  # struct fuse_fallocate_in
_COUNT = struct.Struct("<I")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Writes:
    """Those of one mount."""

    def __init__(self, store: Store, handles: Handles, answered: Answered) -> None:
        self.store, self.handles, self.answered = store, handles, answered

    async def write(self, fh: int, offset: int, data: bytes) -> int:
        """A WRITE whose handle carries the transport's marks; how many bytes were written."""
        opened, marks = self._opened(fh & ~MARKS), fh & MARKS
        if marks & WRITE_TAKES_PRIVILEGES:
            may_keep = not marks & WRITER_MAY_NOT_KEEP_SETID
            self.take_privileges(opened.handle.ino, may_keep_set_id=may_keep, outside=opened.outside)
            if not privileges.are_held(self.store.namespace, opened.handle.ino):
                self.handles.privileges_changed(opened.handle.ino)
        if marks & WRITE_IS_DONE:
            written = int(_COUNT.unpack(data)[0])
        else:
            await self._put(opened, data, offset)
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
        try:
            await trio.to_thread.run_sync(_write_fully, opened.fd, data, offset)
        except OSError as e:
            if e.errno not in _FULL:
                raise
            await self._make_room_and_put(opened, data, offset)

    async def _make_room_and_put(self, opened: Opened, data: bytes, offset: int) -> None:
        for may_wait in (True, False):
            self.store.residency.make_room(len(data))
            try:
                await trio.to_thread.run_sync(_write_fully, opened.fd, data, offset)
                return
            except OSError as e:
                if e.errno not in _FULL or not may_wait:
                    raise
            await self.store.flush()  # what others have closed becomes clean, and can go

    async def allocate(self, asked: bytes) -> None:
        """A FALLOCATE of a file that has privileges. The kernel does not tell who asks: whoever opened it, we say."""
        fh, offset, length, mode, _ = _ALLOCATION.unpack(asked)
        opened = self._opened(fh)
        self.take_privileges(opened.handle.ino, may_keep_set_id=opened.is_root, outside=opened.outside)
        await trio.to_thread.run_sync(self.handles.transport.allocate, opened.fd, mode, offset, length)

    def take_privileges(self, ino: int, *, may_keep_set_id: bool, outside: bool, tell_kernel: bool = True) -> None:
        """Somebody changes the content of a file. `tell_kernel`: the answer to this request has no attributes."""
        names = self.store.namespace
        if not privileges.take_from(names, ino, may_keep_set_id, outside):
            return
        self.answered.grants.renew(ino, names.find(ino))
        self.handles.privileges_changed(ino)
        if tell_kernel:
            pyfuse3.invalidate_inode(pyfuse3.InodeT(ino), attr_only=True)


def _write_fully(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
