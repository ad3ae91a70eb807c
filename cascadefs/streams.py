"""Reads of what has no backing file for the kernel: large cold objects, served block by block from the extents.

Owns: a small cache of verified blocks. Invariants: (1) A read is short only at the end of the content. (2) Bytes are
served only after their block was verified; a damaged block is EIO. (3) At most CACHED_BLOCKS blocks are held.
"""

import errno
import os
from collections import OrderedDict
from functools import partial

import trio

from cascadefs.doors import open_private
from cascadefs.errors import os_error
from cascadefs.files import Files
from cascadefs.types import Block

CACHED_BLOCKS = 8  # a sequential reader needs one, a request at a block boundary two; eight serve a few readers at once


class Streams:
    """Reads by inode, whatever state the inode is in."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    async def read(self, ino: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, fewer only at the end of the file."""
        inode = self.files.namespace.get(ino)
        if inode.home:
            return await self._read_file(self.files.staged_path(inode), offset, size)
        if inode.oid is None:
            return b""
        return await self.read_object(inode.oid, offset, min(size, max(0, inode.size - offset)))

    async def read_object(self, oid: int, offset: int, size: int) -> bytes:
        """`size` bytes of an object, from a whole copy or from the extents."""
        digest = self.files.index.object(oid).digest
        holder = self.files.residency.holder(digest)
        if holder is not None:
            return await self._read_file(holder.object_path(digest), offset, size)
        step, parts = self.files.index.block_bytes, []
        while size > 0:
            seq, start = divmod(offset, step)
            block = self.files.index.block_at(oid, seq)
            if block is None:
                break
            part = (await self._block(block))[start : start + size]
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)

    async def _read_file(self, path: str, offset: int, size: int) -> bytes:
        fd = open_private(path, os.O_RDONLY)
        try:
            return await trio.to_thread.run_sync(_read_fully, fd, offset, size)
        finally:
            os.close(fd)

    async def _block(self, block: Block) -> bytes:
        data = self._blocks.pop(block.bid, None)
        if data is None:
            if block.location is None:
                raise os_error(errno.EIO, "a block has neither a copy in memory nor a place in the cold tier")
            data = await trio.to_thread.run_sync(partial(self._verified, block))
            self.files.residency.cold_reads += 1
        self._blocks[block.bid] = data
        while len(self._blocks) > CACHED_BLOCKS:
            self._blocks.popitem(last=False)
        return data

    def _verified(self, block: Block) -> bytes:
        assert block.location is not None
        buffer, payload = self.files.residency.cold.read(block.location, block.fingerprint)
        try:
            return bytes(payload)
        finally:
            payload.release()
            buffer.close()


def _read_fully(fd: int, offset: int, size: int) -> bytes:
    data = os.pread(fd, size, offset)
    while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data
