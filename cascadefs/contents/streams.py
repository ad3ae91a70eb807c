"""Reads of what has no backing file for the kernel: large cold objects, served block by block from the extents.

Owns: a small cache of verified blocks, the block that is read ahead. Invariants: (1) A read is short only at the end of the
content. (2) Bytes are served only after their block was verified; a damaged block is EIO. (3) At most CACHED_BYTES are
held. (4) Nobody reads a block that is on its way; one at a time is read ahead, and its errors are for whoever asks for it.
(5) Blocks of zeros are not read at all.
"""

import contextlib
import errno
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import trio

from cascadefs.config import MIB
from cascadefs.contents.files import Files
from cascadefs.errors import os_error
from cascadefs.metadata.holes import Content, Holes
from cascadefs.types import Block

T = TypeVar("T")
log = logging.getLogger(__name__)
CACHED_BYTES = 32 * MIB  # a reader needs the block it is in and the next one, at their boundary both; this serves a few readers
CACHED_BLOCKS = 1024  # of blocks that are mostly zeros more fit
NOWHERE = -1  # there is no data, or no file, at or behind a place
READERS = 64  # of so many objects it is remembered which block was read last


class Streams:
    """Reads by inode, whatever state the inode is in."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self._blocks: OrderedDict[int, Content] = OrderedDict()
        self._under_way: dict[int, trio.Event] = {}
        self._last: OrderedDict[int, int] = OrderedDict()  # oid -> place of the block that was read last
        self._holes = Holes(files.index, files.residency.cold.secret, self._block)
        self._ahead, self._queue = trio.open_memory_channel[Block](1)

    async def run(self) -> None:
        """Read ahead until cancelled."""
        async for block in self._queue:
            try:
                await self._block(block, ahead=True)
            except OSError as e:
                log.debug("block %d was not read ahead: %s", block.bid, e)

    async def read(self, ino: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, fewer only at the end of the file."""
        while True:
            inode = self.files.namespace.get(ino)
            if inode.home:
                return await self._read_file(self.files.open_staged(inode), offset, size)
            wanted = min(size, max(0, inode.size - offset)) if inode.oid is not None else 0
            data = await self.read_object(inode.oid, offset, wanted) if inode.oid is not None else b""
            if len(data) == wanted or self.files.namespace.get(ino).oid == inode.oid:
                return data  # else a writer came and the object went

    async def read_object(self, oid: int, offset: int, size: int) -> bytes:
        """`size` bytes of an object, from a whole copy or from the extents."""
        whole = await self._from_copy(self.files.index.object(oid).digest, lambda fd: _read_fully(fd, offset, size))
        if whole is not None:
            return whole
        step, parts = self.files.index.step(oid), []
        while size > 0:
            seq, start = divmod(offset, step)
            block = self.files.index.block_at(oid, seq)
            if block is None:
                break
            self._follow(oid, seq)
            if self._holes.is_one(block):
                part = bytes(min(size, block.length - start))
            else:
                part = (await self._block(block)).read(start, size)
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)

    async def seek(self, ino: int, offset: int, whence: int) -> int:
        """SEEK_DATA or SEEK_HOLE; ENXIO behind the end, or where no data follow."""
        while True:
            inode = self.files.namespace.get(ino)
            if inode.home:
                fd = self.files.open_staged(inode)
                try:
                    found = await trio.to_thread.run_sync(_sought, fd, offset, whence)
                finally:
                    os.close(fd)
            else:
                found = await self._seek_object(inode.oid, offset, whence) if inode.oid is not None else NOWHERE
            now = self.files.namespace.get(ino)
            if (now.home, now.oid) == (inode.home, inode.oid):
                if found == NOWHERE:
                    raise os_error(errno.ENXIO)
                return found

    async def _seek_object(self, oid: int, offset: int, whence: int) -> int:
        """The same in an object, from a whole copy or from the extents, or NOWHERE."""
        found = self.files.index.object(oid)
        if offset >= found.size_bytes:
            return NOWHERE
        at = await self._from_copy(found.digest, lambda fd: _sought(fd, offset, whence))
        if at is not None:
            return at
        if whence == os.SEEK_HOLE:
            return await self._holes.hole(found, offset)
        data = await self._holes.data(found, offset)
        return NOWHERE if data is None else data

    async def _from_copy(self, digest: bytes, ask: Callable[[int], T]) -> T | None:
        """What a whole copy of an object answers; None: there is none."""
        while (holder := self.files.residency.holder(digest)) is not None:
            fd = holder.open_object(digest)
            try:
                answer = await trio.to_thread.run_sync(ask, fd)
                if holder.is_copy(fd, digest):
                    return answer
            finally:
                os.close(fd)
            # Its owner has begun to write to it.
        return None

    async def _read_file(self, fd: int, offset: int, size: int) -> bytes:
        try:
            return await trio.to_thread.run_sync(_read_fully, fd, offset, size)
        finally:
            os.close(fd)

    def _follow(self, oid: int, seq: int) -> None:
        """A block is about to be read. If the one before it was the last, the one after it is next."""
        last = self._last.pop(oid, None)
        self._last[oid] = seq
        if len(self._last) > READERS:
            self._last.popitem(last=False)
        if last != seq - 1 or (following := self.files.index.block_at(oid, seq + 1)) is None:
            return
        if not self._holes.is_one(following):
            with contextlib.suppress(trio.WouldBlock):  # one is waiting already
                self._ahead.send_nowait(following)

    async def _block(self, block: Block, ahead: bool = False) -> Content:
        while (ended := self._under_way.get(block.bid)) is not None:
            await ended.wait()
        if (known := self._blocks.get(block.bid)) is not None:
            self._blocks.move_to_end(block.bid)
            return known
        if block.location is None:
            raise os_error(errno.EIO, "a block has neither a copy in memory nor a place in the cold tier")
        ended = self._under_way[block.bid] = trio.Event()
        try:
            content = await trio.to_thread.run_sync(partial(self._verified, block, ahead))
        finally:
            del self._under_way[block.bid]
            ended.set()
        self.files.residency.cold_reads += 1
        self._keep(block.bid, content)
        return content

    def _keep(self, bid: int, content: Content) -> None:
        self._blocks[bid] = content
        kept_bytes = sum(each.kept_bytes for each in self._blocks.values())
        while kept_bytes > CACHED_BYTES or len(self._blocks) > CACHED_BLOCKS:
            kept_bytes -= self._blocks.popitem(last=False)[1].kept_bytes

    def _verified(self, block: Block, ahead: bool) -> Content:
        assert block.location is not None
        residency = self.files.residency
        read = (
            partial(residency.cold.read, block.location, block.fingerprint) if ahead else partial(residency.healer.read, block)
        )
        buffer, payload = read()
        try:
            return Content.of(payload)
        finally:
            payload.release()
            buffer.close()


def _sought(fd: int, offset: int, whence: int) -> int:
    try:
        return os.lseek(fd, offset, whence)
    except OSError as e:
        if e.errno == errno.ENXIO:
            return NOWHERE
        raise


def _read_fully(fd: int, offset: int, size: int) -> bytes:
    data = os.pread(fd, size, offset)
    while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data
