"""A staged file that outgrows memory while somebody writes to it goes on on the disk.

Owns: the move. Does not know who writes, nor by what. Invariants:
(1) Nobody writes to the file meanwhile: whoever calls sees to that, and writes where the file is afterwards. So not while the
    kernel writes by itself (passthrough), or a mapping of the very file does.
(2) Who reads by the inode's source keeps its descriptor: that number leads to the new file afterwards, with the same bytes.
(3) The bytes are on the disk before the row says so, and leave memory after: a crash leaves one file too many.
"""

import os

import trio

from cascadefs.contents.files import Files
from cascadefs.media import file_io
from cascadefs.types import Home


class Outgrown:
    """Of one store."""

    def __init__(self, files: Files) -> None:
        self._files = files

    async def move(self, ino: int) -> bool:
        """Whether the file of an inode lies on the disk now and did not before. Holds the lock of the inode."""
        files, residency = self._files, self._files.residency
        inode, source = files.namespace.get(ino), files.sources.of(ino)
        if inode.home != Home.MEMORY or ino in files.adrift or (source is not None and source.backing_id):
            return False
        files.unchanged.discard(ino)
        fd, path = files.open_staged(inode), residency.parking.staged_path(ino)
        try:
            await trio.to_thread.run_sync(residency.parking.copy_in, fd, path)
            state = os.fstat(fd)
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
            files.namespace.update(ino, home=Home.COLD)
        except BaseException:
            residency.parking.drop_staged(ino)
            raise
        finally:
            os.close(fd)
        if source is not None:
            follow(path, source.fd, os.O_RDONLY)
        residency.memory.drop_staged(ino)
        files.gaps.forget(ino)
        if files.of(ino).directs:
            files.watcher.left_stream(ino)
        return True


def follow(path: str, fd: int, flags: int) -> None:
    """The open descriptor `fd` leads to the file at `path` from now on; whoever is just using it ends with the old one."""
    opened = file_io.open_file(path, flags)
    os.dup2(opened, fd, inheritable=False)
    os.close(opened)
