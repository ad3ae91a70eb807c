"""fsync of files that are synced again and again while they are open: only what changed is written, to a log of the file's own.

Owns: which syncs may go that way, and the logs that are written to. The first syncs of an open file keep all of it (fsync.py):
its base. Later ones add a patch to a log in STORE/patches, in one write and one fdatasync, and change no row; recovery.py puts
both together when memory is lost. Invariants:
(1) What was written before a call to fsync() is durable when it returns: what is taken from the watcher is taken after the call
    and read after that; where writes are not seen, all pages are compared with their fingerprints, which are those of bytes
    that are durable, never of bytes that were only looked at.
(2) A base is believed as long as the row names it with the same log. Whatever goes wrong with a patch: the whole way is gone.
(3) Syncs of one inode take turns.
(4) A log is not longer than its file, or LOG_BYTES: then the file gets a new base.
"""

import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from mmap import mmap

import trio

from cascadefs.config import KIB, MIB
from cascadefs.contents.files import Files, changed_ns
from cascadefs.contents.open_files import Live
from cascadefs.contents.written import Kept, Range
from cascadefs.ext import hashing
from cascadefs.formats.record import PATCH_HEADER_BYTES, RANGE_BYTES, LogHeader, PatchHeader, patch_bytes
from cascadefs.media import file_io
from cascadefs.tiers.patch_log import FOLDER, PatchLog, path_of
from cascadefs.types import Home, Inode

log = logging.getLogger(__name__)
FROM_BYTES = 64 * KIB  # what is shorter is written whole as fast
LOG_BYTES = 16 * MIB
PATCH_BYTES = 16 * MIB  # of one patch: more is better kept in blocks, which sealing finds again
AGAIN = 1  # syncs before the one that takes the pages' fingerprints: most files are synced once
TOGETHER_BYTES = 8 * MIB  # to hash so much takes a millisecond, to begin a thread a tenth
PAGE = 4096


@dataclass(frozen=True, slots=True)
class _Task:
    """A patch of what is in `fd` up to a size. `ranges`: None: what differs from the pages that are known."""

    kept: Kept
    target: PatchLog
    fd: int
    size_bytes: int
    ranges: list[Range] | None
    inode: Inode


@dataclass(frozen=True, slots=True)
class _Done:
    """A patch that is durable, or nothing that had to be written; `pages`: the fingerprints of all pages, if they are kept."""

    is_written: bool
    size_bytes: int
    mtime_ns: int
    pages: bytearray | None


class Patches:
    """Of one store."""

    def __init__(self, files: Files) -> None:
        self._files, self._index = files, files.index
        self._secret, self._store_id = files.database.identity.secret, bytes.fromhex(files.database.identity.store_id)
        self._folder = files.settings.store / FOLDER
        self._buffers = files.residency.cold.buffers

    async def fsync(self, ino: int, whole: Callable[[int], Awaitable[None]]) -> bool:
        """Make an inode's bytes durable: by a patch (True; names and attributes are the caller's) or by `whole`."""
        live = self._files.live.get(ino)
        if live is None or not live.writers or not self._is_long(ino):
            await whole(ino)
            return False
        if live.kept is None:
            live.kept = Kept()
        kept = live.kept
        async with kept.lock:
            if await self._patch(ino, live, kept):
                return True
            kept.base, kept.log, kept.prints = None, None, None
            kept.is_seen = self._files.watcher.sees_writes(ino)
            kept.wants_prints = not kept.is_seen and live.syncs >= AGAIN
            await whole(ino)
            inode = self._files.namespace.find(ino)
            if inode is not None and live.kept is kept and (kept.is_seen or kept.prints is not None):
                self._trust(kept, inode)
            return False

    def _is_long(self, ino: int) -> bool:
        inode = self._files.namespace.find(ino)
        return inode is not None and bool(inode.home) and self._files.with_staged(inode).size >= FROM_BYTES

    def _trust(self, kept: Kept, inode: Inode) -> None:
        """What the inode falls back to is its content as it was when the sync began, or later."""
        if inode.home and inode.durable_oid:
            kept.base, kept.mtime_ns = inode.durable_oid, inode.mtime_ns
            kept.size_bytes = self._index.object(inode.durable_oid).size_bytes

    def _believed(self, ino: int, live: Live, kept: Kept) -> Inode | None:
        """The inode, if it still falls back to the base with this log."""
        inode = self._files.namespace.find(ino)
        if kept.base is None or live.kept is not kept or inode is None or not inode.home or not inode.nlink:
            return None
        number = kept.log.header.number if kept.log is not None else None
        return inode if inode.durable_oid == kept.base and self._index.logs.get(ino) == number else None

    async def _patch(self, ino: int, live: Live, kept: Kept) -> bool:
        """Whether the bytes are durable now."""
        inode = self._believed(ino, live, kept)
        if inode is None or (not kept.is_seen and inode.home != Home.MEMORY):
            return False
        target, fd = kept.log or self._new_log(inode, kept), self._files.open_staged(inode)
        try:
            task = self._task(inode, kept, target, fd)
            if task is None:
                return False
            done = await trio.to_thread.run_sync(self._write, task)
            if done is not None and self._believed(ino, live, kept) is not None:
                self._keep(ino, live, kept, target, done)
                return True
        except OSError as e:
            log.warning("inode %d: what changed could not be kept as a patch: %s", ino, e)
        except BaseException:
            kept.base = None  # what was taken from the watcher is in no patch
            raise
        finally:
            os.close(fd)
        if kept.log is None:
            self._index.drop_file(ino, target.header.number)
        return False

    def _new_log(self, inode: Inode, kept: Kept) -> PatchLog:
        assert kept.base is not None
        header = LogHeader(inode.ino, self._index.next_manifest(), self._index.object(kept.base).digest)
        return PatchLog(self._folder, header, self._secret)

    def _task(self, inode: Inode, kept: Kept, target: PatchLog, fd: int) -> _Task | None:
        """None: nobody knows what was written. The end is that of what is taken: bytes that come later are not in the patch."""
        size, ranges = os.fstat(fd).st_size, None
        if kept.is_seen:
            taken = self._files.watcher.take_written(inode.ino)
            if taken is None:
                return None
            ranges = merged(taken)
            size = min(os.fstat(fd).st_size, max(size, *(at + length for at, length in ranges[-1:]), 0))
            ranges = cut(ranges, size)
        return _Task(kept, target, fd, size, ranges, inode)

    def _keep(self, ino: int, live: Live, kept: Kept, target: PatchLog, done: _Done) -> None:
        """A new log counts once the row that names it is synced, which the caller does; a patch in it from then on at once."""
        if done.is_written and kept.log is None:
            self._index.add_log(ino, target.header.number)
            kept.log = target
        kept.size_bytes, kept.mtime_ns, kept.prints = done.size_bytes, done.mtime_ns, done.pages
        live.syncs += 1

    async def remove_stale(self, synced: int, has_news_of: Callable[[int], bool]) -> None:
        """Logs that no row names any more, in an index that was synced when it had so many changes, and no manifest."""
        gone = self._index.take_stale_logs(synced, has_news_of)
        if gone:
            await trio.to_thread.run_sync(self._remove, gone)

    # --- in a thread

    def _remove(self, gone: Iterable[tuple[int, int]]) -> None:
        for one in gone:
            with suppress(OSError):  # the next opening does it
                file_io.remove(path_of(self._folder, *one))

    def _write(self, task: _Task) -> _Done | None:
        """Append what changed; None when it is too much, or cannot be told."""
        kept, target, state = task.kept, task.target, os.fstat(task.fd)
        ranges = task.ranges
        if ranges is None:
            if state.st_blocks * 512 < task.size_bytes or kept.prints is None:
                return None  # a mapping would fill its holes
            ranges = self._changed(task.fd, task.size_bytes, kept.prints)
        mtime_ns = state.st_mtime_ns
        if not ranges and (task.size_bytes, mtime_ns) == (kept.size_bytes, kept.mtime_ns):
            return _Done(False, task.size_bytes, mtime_ns, kept.prints)
        used = patch_bytes(sum(length for _, length in ranges) + RANGE_BYTES * len(ranges))
        if used > PATCH_BYTES or target.end + used > max(LOG_BYTES, task.size_bytes):
            return None
        times = mtime_ns, changed_ns(task.inode, mtime_ns)
        buffer = self._buffers.take(max(MIB, used))
        try:
            target.pack(buffer, PatchHeader(b"", 0, 0, task.size_bytes, *times, 0, 0), ranges, task.fd)
            pages = self._pages(kept.prints, task.size_bytes, ranges, buffer) if kept.prints is not None else None
            if kept.log is None:
                target.create(self._store_id)
            target.append(buffer, used)
        finally:
            self._buffers.give(buffer)
        return _Done(True, task.size_bytes, mtime_ns, pages)

    def _changed(self, fd: int, size_bytes: int, prints: bytearray) -> list[Range]:
        """Pages that are not as they were. A second processor takes half of what is much."""
        half = size_bytes // (2 * PAGE)
        if size_bytes < TOGETHER_BYTES:
            return hashing.changed_pages(fd, 0, size_bytes, prints, self._secret)
        with ThreadPoolExecutor(1, "cascadefs-hash") as thread, memoryview(prints) as view:
            at = half * PAGE
            rest = thread.submit(hashing.changed_pages, fd, at, size_bytes - at, view[16 * half :], self._secret)
            first = hashing.changed_pages(fd, 0, at, view[: 16 * half], self._secret)
            return merged(first + rest.result())

    def _pages(self, prints: bytearray, size_bytes: int, ranges: Sequence[Range], buffer: mmap) -> bytearray:
        """The fingerprints of all pages: new ones of what is in the patch."""
        pages = prints[: -(-size_bytes // PAGE) * 16]
        pages += bytes(-(-size_bytes // PAGE) * 16 - len(pages))
        at = PATCH_HEADER_BYTES + RANGE_BYTES * len(ranges)
        with memoryview(buffer) as view:
            for offset, length in ranges:
                with view[at : at + length] as part:
                    found = hashing.page_prints(part, self._secret)
                pages[offset // PAGE * 16 : offset // PAGE * 16 + len(found)] = found
                at += length
        return pages


def merged(ranges: Iterable[Range]) -> list[Range]:
    """In ascending order, without those that touch or overlap."""
    result = list[Range]()
    for offset, length in sorted(ranges):
        last, end = (result[-1][0], sum(result[-1])) if result else (0, -1)
        if offset <= end:
            result[-1] = last, max(end, offset + length) - last
        else:
            result.append((offset, length))
    return result


def cut(ranges: Iterable[Range], size_bytes: int) -> list[Range]:
    """What of them lies in a file of that size."""
    return [(offset, min(length, size_bytes - offset)) for offset, length in ranges if offset < size_bytes]
