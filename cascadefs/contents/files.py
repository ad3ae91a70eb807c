"""The life of a file's bytes while it is used: open, copy on write, truncate, release, delete.

Owns: live inodes and the transition object -> staged (sealing.py owns the way back); owners.py says whose file is whose. Knows
no names beyond inodes and no FUSE. Invariants:
(1) Transitions of one inode happen under its lock; after each await inside, what was read before is read again.
(2) The file gets its new name before the transaction, and loses the old one after: a crash leaves one name too many, never
    one too few; recovery removes the one that the index does not know.
(3) An object's bytes are never written: a writer gets a staged file first.
"""

import contextlib
import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import trio

from cascadefs.config import FILE_BYTES_MAX, Settings
from cascadefs.contents.adrift import Adrift
from cascadefs.contents.gaps import Gaps
from cascadefs.contents.open_files import Handle, Live
from cascadefs.contents.watcher import Watcher
from cascadefs.contents.written import Kept
from cascadefs.crash import point
from cascadefs.errors import GONE, os_error
from cascadefs.locks import Bell
from cascadefs.media import file_io
from cascadefs.media.descriptors import keep_reserve
from cascadefs.metadata.bulk import Bulk, Waiting
from cascadefs.metadata.namespace import Namespace
from cascadefs.metadata.sqlite import Database
from cascadefs.placement.owners import Owners
from cascadefs.placement.read_ahead import ReadAhead
from cascadefs.placement.residency import NO_ROOM_OR_GONE, Residency
from cascadefs.placement.sources import Source, Sources
from cascadefs.types import Home, Inode, Location, Object

FEW = 256  # orphans may be many when files are removed: so many inodes are asked about one by one before all orphans are read
DELETED_AT_ONCE = 64  # a commit of so many takes a few milliseconds
LISTED_BYTES = 64 << 30  # 16,000 rows: some 30 ms of everybody's time
TIME_LIMIT = (1 << 63) - 1  # nanoseconds that an SQLite integer holds


class Files:
    """Contents of all inodes of one store. All methods run in the trio thread; bytes move in worker threads."""

    def __init__(
        self, settings: Settings, database: Database, residency: Residency, watcher: Watcher, first_ino: int = 0
    ) -> None:
        self.settings, self.database, self.residency, self.watcher = settings, database, residency, watcher
        self.namespace, self.index = Namespace(database, os.getuid(), os.getgid(), first_ino), residency.index
        self.bulk = Bulk(database, residency.index)
        self.sources: Sources = residency.sources
        self.owners = Owners(residency)
        self.read_ahead = ReadAhead(residency, settings.promote_limit)
        self.adrift = Adrift(residency, self.namespace, self.seal_soon)
        self.gaps = Gaps(residency.memory, residency.memory.pages)
        self.live: dict[int, Live] = {}
        self.lookups = Counter[int]()  # ino -> how often the kernel was told of it and has not forgotten
        self.to_seal: dict[int, float] = {}  # ino -> time.monotonic() from which it may be sealed
        self.work = Bell()  # rung when there is something to seal or to flush
        self.unchanged: set[int] = set()  # staged inodes that single_pass.py reads: whoever may change one takes it out
        self.last_use = 0.0  # time.monotonic() of the last open or close; see quiet_s()
        self._memory_used = 0
        self.dead: list[Location] = []  # records to punch once the index is synced
        self.leftover: set[int] = set()  # inodes without name and user that are not deleted yet
        database.undo.append(self._keep_dead)

    def of(self, ino: int) -> Live:
        """The running state of an inode, made when missing."""
        found = self.live.get(ino)
        if found is None:
            found = self.live[ino] = Live(ino)
        return found

    def staged_path(self, inode: Inode) -> str:
        """The file that holds the staged bytes of an inode."""
        return self.residency.tier_of(inode.home).staged_path(inode.ino)

    def open_staged(self, inode: Inode) -> int:
        """A read-only descriptor of the staged bytes of an inode, which the caller closes."""
        fd = self.adrift.open(inode.ino)
        return file_io.open_file(self.staged_path(inode), os.O_RDONLY) if fd is None else fd

    def _truncate_staged(self, inode: Inode, size_bytes: int, by_handle: bool = True) -> None:
        if (adrift := self.adrift.path(inode.ino)) is not None:
            os.truncate(adrift, size_bytes)
        else:
            file_io.truncate(self.staged_path(inode), size_bytes, by_handle)
        self.watcher.lose_written(inode.ino)

    def _cut_padding(self, inode: Inode) -> None:
        path = self.staged_path(inode)
        with contextlib.suppress(*GONE):  # it lies elsewhere since the memory tier went
            file_io.cut_padding(path, os.lstat(path))

    def quiet_s(self, now: float) -> float:
        """Seconds since the last open or close, or since a look found more memory used: writers that the kernel serves say
        nothing between the two."""
        before, self._memory_used = self._memory_used, self.residency.memory.used_bytes()
        if self._memory_used > before:
            self.last_use = now
        return now - self.last_use

    # --- open and release

    async def open(self, ino: int, writable: bool, truncate: bool = False) -> Handle:
        """Open for reading or writing."""
        live = self.of(ino)
        self.last_use = time.monotonic()
        await live.acquire()
        try:
            if writable or truncate:
                self.unchanged.discard(ino)
            inode = self.namespace.get(ino)
            is_durable = not inode.home and inode.oid == inode.durable_oid
            if not inode.home and (writable or truncate):
                await self._stage(live, inode, 0 if truncate else None)
                inode = self.namespace.get(ino)
            elif truncate:
                self._truncate_staged(inode, 0)
            source = await self._new_source_for(inode)
            by_us = writable and not truncate and not live.handles and self.watcher.is_updated(ino, source)
            handle = live.enter(source, writable, True if by_us else None)
            if writable:
                self._look_for_gaps(ino)
            if writable and is_durable and not truncate and inode.durable_oid and self.watcher.sees_writes(ino):
                live.kept = Kept(inode.durable_oid, inode.size, inode.mtime_ns, is_seen=True)
            return handle
        finally:
            live.lock.release()
            self.forget_if_gone(ino)

    def inherit(self, ino: int, writable: bool, direct: bool) -> Handle:
        """A handle that an earlier process opened and the kernel still has. The row tells which file is behind it."""
        inode = self.namespace.get(ino)
        if writable and inode.home == Home.MEMORY:
            self.gaps.look(ino)
        source = self._open_source(inode, partial(self.owners.inherit, is_certain=not direct))
        return self.of(ino).enter(source, writable, direct)

    def create_content(self, inode: Inode) -> Handle:
        """The handle of the creator: an empty staged file in the home that the row says. No await: nobody else knows it."""
        point("created")
        if inode.home == Home.COLD and not self.database.reserve.fill():
            raise os_error(errno.ENOSPC, "parking")
        fd, home = self._create_staged(inode.ino, Home(inode.home))
        try:
            keep_reserve(fd)
        except OSError:
            os.close(fd)
            self.residency.tier_of(home).drop_staged(inode.ino)
            raise
        if home != inode.home:
            try:
                self.namespace.update(inode.ino, home=home)
            except BaseException:
                os.close(fd)
                raise
        return self.of(inode.ino).enter(self.sources.take(inode.ino, lambda: fd), True)

    def create(self, make: Callable[[], Inode]) -> tuple[Inode, Handle]:
        """A new inode, which `make` inserts, with its empty staged file and the creator's handle: all of it or nothing."""
        handle = None
        try:
            with self.database.transaction():
                inode = make()
                handle = self.create_content(inode)
        except BaseException:
            if handle is not None and handle.source is not None:
                del self.live[handle.ino]
                self.sources.release(handle.source)
                for tier in (self.residency.memory, self.residency.parking):
                    with contextlib.suppress(OSError):  # recovery removes what the index does not know
                        tier.drop_staged(handle.ino)
            raise
        return inode, handle

    def release(self, handle: Handle) -> None:
        """The last close of a handle."""
        live = self.live[handle.ino]
        live.leave(handle)
        self.last_use = time.monotonic()
        if handle.source is not None:
            self.sources.release(handle.source)
            self.owners.left(handle.ino)
        if handle.writable and not live.writers:
            self.gaps.forget(handle.ino)
            self.watcher.end_written(handle.ino)
            live.kept = None
            self.seal_soon(handle.ino)
        self.forget_if_gone(handle.ino)

    def seal_soon(self, ino: int) -> None:
        """Nobody writes to it any more, as far as we know."""
        self.to_seal[ino] = time.monotonic() + self.settings.seal_delay
        self.work.ring()

    def forget_if_gone(self, ino: int) -> None:
        """Drop the running state; drop the inode, too, when it has no name any more."""
        if self._is_unused(ino):
            self._leave_if_orphan(ino)

    def forget_all_gone(self, inos: set[int]) -> bool:
        """The same of many that are not among `lookups`; whether some have a name yet. The kernel forgets a hundred thousand at
        once: nothing is done for each, and one question tells the few without a name."""
        unused = inos - {ino for ino in self.live.keys() & inos if not self._is_unused(ino)}
        orphans = unused & set(self.namespace.orphans()) if len(unused) > FEW else unused
        left = [ino for ino in orphans if self._leave_if_orphan(ino)]
        return len(left) < len(unused)

    def _is_unused(self, ino: int) -> bool:
        """Whether neither a handle nor the kernel's memory holds the inode; then its running state goes."""
        live = self.live.get(ino)
        if live is not None:
            if live.handles or live.is_locked:
                return False
            del self.live[ino]
        return ino not in self.lookups

    def _leave_if_orphan(self, ino: int) -> bool:
        inode = self.namespace.find(ino)
        if inode is not None and inode.nlink == 0:
            self.leftover.add(ino)
            if not self.database.connection.in_transaction:
                self._delete_now([inode])
        return inode is None or inode.nlink == 0

    def delete_leftover(self) -> None:
        """Delete what has neither name nor user; what the medium refuses now is tried again by the mover."""
        waiting = list(self.leftover)
        for at in range(0, len(waiting), DELETED_AT_ONCE):
            found = [self.namespace.find(ino) for ino in waiting[at : at + DELETED_AT_ONCE]]
            if not self._delete_now([inode for inode in found if inode is not None]):
                return
            self.leftover.difference_update(waiting[at : at + DELETED_AT_ONCE])

    def _delete_now(self, inodes: Sequence[Inode]) -> bool:
        """Whether the medium let us; it has told health if not."""
        if not inodes:
            return True
        try:
            self.database.reserve.lend(partial(self.delete, inodes))
        except OSError:
            return False
        self.leftover.difference_update(inode.ino for inode in inodes)
        return True

    def _keep_dead(self) -> Callable[[], None]:
        """Records that a transaction freed are not free when it is rolled back."""
        before = len(self.dead)
        return lambda: self.dead.__delitem__(slice(before, None))

    def delete(self, inodes: Sequence[Inode]) -> None:
        """Inodes without name and user go, and what only they referred to: all of them in one commit, or none."""
        point("unlinked")
        for inode in inodes:
            self.watcher.deleting(inode.ino)
        oids = {oid for inode in inodes for oid in (inode.oid, inode.durable_oid) if oid}
        digests = {oid: self.index.object(oid).digest for oid in oids}
        with self.database.transaction():
            for inode in inodes:
                self.dead += self.index.set_content(inode.ino, Home.NONE, None, 0)
                self.dead += self.index.set_fallback(inode.ino, None)
                self.namespace.delete_inode(inode.ino)
        point("deleted")
        for inode in inodes:
            self.to_seal.pop(inode.ino, None)
            if inode.home:
                self.residency.tier_of(inode.home).drop_staged(inode.ino)
            self.owners.gone(inode.ino, digests.get(inode.oid) if inode.oid else None)
        self.residency.tidy(list(digests.values()))

    def read_without_us(self, ino: int, source: Source) -> None:
        """Somebody has opened an inode for reading, by a source that is open; we only hear of it."""
        self.last_use = time.monotonic()
        if source.digest is not None:
            self.residency.hits += 1
            self.residency.policy.touched(source.digest)

    async def _new_source_for(self, inode: Inode) -> Source | None:
        """The same for a program; ENFILE when only our own work may open one more."""
        source = await self._source_for(inode)
        if source is not None and source.users == 1:
            try:
                keep_reserve(source.fd)
            except OSError:
                self.sources.release(source)
                self.owners.left(inode.ino)
                raise
        return source

    async def _source_for(self, inode: Inode) -> Source | None:
        """The backing file that serves this inode now, with one more user; None: stream."""
        source = self._open_source(inode, self.owners.open)
        if inode.oid is None:
            return source
        found = self.index.object(inode.oid)
        if self.residency.holder(found.digest) is not None or source is not None:
            self.residency.hits += 1
            if self.read_ahead.opened(found.digest):
                self.read_ahead.asked(found)
        else:
            self.residency.misses += 1
        if source is not None or self._is_large(inode, found):
            return source
        if self.residency.holder(found.digest) is None:
            self.read_ahead.asked(found)
            if not await self.residency.promote(found):
                return None
            self.read_ahead.opened(found.digest)
            source = self._open_source(inode, self.owners.open)
        return source or await self.owners.copy(inode.ino, found)

    def _is_large(self, inode: Inode, found: Object) -> bool:
        """Whether it is not brought to memory before open() answers. Blocks of zeros, which are not read, do not count, unless
        they are so many that listing them takes long."""
        limit = self.settings.promote_limit
        if found.size_bytes <= limit or inode.blocks * 512 > limit or found.size_bytes > LISTED_BYTES:
            return found.size_bytes > limit
        return self.residency.needed_bytes(found) > limit

    def _open_source(self, inode: Inode, of_object: Callable[[int, Object], Source | None]) -> Source | None:
        """The same from what is here: an open source, the staged file, a file of the object; None when there is none."""
        if (source := self.sources.of(inode.ino)) is not None:
            return self.sources.share(source)
        if inode.home:
            return self.sources.take(inode.ino, partial(self.open_staged, inode))
        return of_object(inode.ino, self.index.object(inode.oid)) if inode.oid is not None else None

    # --- object -> staged: a writer comes

    async def _stage(self, live: Live, inode: Inode, cut_at: int | None) -> None:
        """Give an inode a staged file with its bytes (the first `cut_at` of them). Holds the lock of the inode."""
        found = self.index.object(inode.oid) if inode.oid is not None else None
        taken = await self.owners.hand_over(inode.ino, found, cut_at != 0) if found is not None else None
        if taken is not None:
            home = self.residency.home_of(taken)
        elif found is None or cut_at == 0:
            home = self.residency.home_for_new()
            fd, home = self._create_staged(inode.ino, home)
            os.close(fd)
        else:
            home = await self._stage_copy(inode, found)
        try:
            path = self.residency.tier_of(home).staged_path(inode.ino)
            if cut_at is None:
                now = self.namespace.get(inode.ino)  # utimens does not wait for the lock
                os.utime(path, ns=(now.atime_ns, now.mtime_ns), follow_symlinks=False)
            point("staged")
            show = partial(self.index.set_content, inode.ino, home, None, inode.size)
            self.dead += self.database.reserve.lend(show) if cut_at == 0 else show()
        except BaseException:
            with contextlib.suppress(OSError):  # the name stays, and nothing reads it: the next _stage() replaces it
                self.residency.tier_of(home).drop_staged(inode.ino)
            raise
        if found is not None:
            self.owners.handed_over(inode.ino, found, taken)
            self.residency.tidy([found.digest])
        if cut_at is not None:  # not before the row says so: until then these bytes may be the only copy of the object
            file_io.truncate(path, cut_at)
        self.adrift.look(inode.ino)  # a source of a copy whose name is gone goes on as the inode's file
        if live.directs:
            self.watcher.left_stream(inode.ino)

    def _create_staged(self, ino: int, home: Home) -> tuple[int, Home]:
        """An empty staged file in that home, on the disk when memory refuses it: (read-only descriptor, where it is)."""
        try:
            return self.residency.tier_of(home).create_staged(ino), home
        except OSError as e:
            if home == Home.COLD or e.errno not in NO_ROOM_OR_GONE:
                raise
        return self.residency.parking.create_staged(ino), Home.COLD

    async def _stage_copy(self, inode: Inode, found: Object) -> Home:
        """A fresh staged file, filled from the best copy; once more when the owner of that began to write to it meanwhile."""
        while (holder := self.residency.holder(found.digest)) is not None:
            fd = holder.open_object(found.digest)
            try:
                home = await self.fill_staged(inode.ino, partial(self.residency.memory.copy_in, fd))
                if holder.is_copy(fd, found.digest):
                    return home
                self.residency.tier_of(home).drop_staged(inode.ino)  # the next may find room elsewhere
            finally:
                os.close(fd)
        self.residency.make_room(self.residency.needed_bytes(found))
        return await self.fill_staged(inode.ino, partial(self.residency.materialize, self.index.blocks(found.oid)))

    async def fill_staged(self, ino: int, fill: Callable[[str], None]) -> Home:
        """A staged file that `fill` makes at the path that it is given, in a thread; on the disk when memory refuses it."""
        home = self.residency.home_for_new()
        while True:
            tier = self.residency.tier_of(home)
            try:
                await trio.to_thread.run_sync(fill, tier.staged_path(ino))
            except OSError as e:
                with contextlib.suppress(OSError):
                    tier.drop_staged(ino)
                if home == Home.COLD or e.errno not in NO_ROOM_OR_GONE:
                    raise
                home = Home.COLD
            else:
                return home

    async def truncate(self, ino: int, size_bytes: int, by_handle: bool = False) -> None:
        """truncate(2), by path or by handle. EFBIG beyond FILE_BYTES_MAX.

        As on tmpfs: by path and to the same size it moves the times of a file that has blocks, by handle those of any."""
        if size_bytes > FILE_BYTES_MAX:
            raise os_error(errno.EFBIG, f"inode {ino}")
        live = self.of(ino)
        try:
            async with live.lock:
                self.unchanged.discard(ino)
                inode = self.attributes(ino)
                if inode.home:
                    if self.watcher.pads() and size_bytes > inode.size:  # what was allocated ahead would be in the way of gaps
                        self._cut_padding(inode)
                    self._truncate_staged(inode, size_bytes, by_handle)
                elif inode.size == size_bytes and not by_handle:
                    self._touch(inode)
                else:
                    await self._stage(live, inode, size_bytes)
                if live.writers:
                    self._look_for_gaps(ino)
        finally:
            if not live.writers:
                self.seal_soon(ino)
            self.forget_if_gone(ino)

    def found_gaps(self, ino: int) -> None:
        """Somebody has seen that a file is written with gaps, a moment ago."""
        if (live := self.live.get(ino)) is not None and live.writers:
            self._look_for_gaps(ino)

    def _look_for_gaps(self, ino: int) -> None:
        if self.namespace.get(ino).home == Home.MEMORY:
            self.gaps.look(ino)

    # --- attributes

    def _touch(self, inode: Inode) -> None:
        if inode.blocks:
            self.namespace.update(inode.ino, mtime_ns=(now := time.time_ns()), ctime_ns=now)

    def attributes(self, ino: int) -> Inode:
        """The inode, with size, blocks and times of its staged file."""
        return self.with_staged(self.namespace.get(ino))

    def with_staged(self, inode: Inode) -> Inode:
        """As attributes(), for a row that was just read."""
        if not inode.home:
            return inode
        try:
            found = os.lstat(self.staged_path(inode))
        except GONE:  # a creation that failed half-way, and whose name could not be taken back
            if not self.adrift.look(inode.ino):
                return inode
            found = os.stat(self.adrift.path(inode.ino) or "")
        changed = changed_ns(inode, found.st_mtime_ns)
        size, blocks, modified = found.st_size, found.st_blocks, found.st_mtime_ns
        if self.watcher.pads():
            blocks = min(blocks, -(-size // 4096) * 8)
        return replace(inode, size=size, blocks=blocks, mtime_ns=modified, ctime_ns=changed)

    def set_times(self, ino: int, atime_ns: int | None, mtime_ns: int | None) -> None:
        """utimensat(2); None leaves one as it is. Beyond the years 1677 to 2262 they are clamped, as other filesystems do."""
        inode = self.attributes(ino)
        atime = inode.atime_ns if atime_ns is None else atime_ns
        mtime = inode.mtime_ns if mtime_ns is None else mtime_ns
        atime, mtime = (max(-TIME_LIMIT, min(TIME_LIMIT, t)) for t in (atime, mtime))
        if inode.home:
            adrift = self.adrift.path(ino)
            os.utime(adrift or self.staged_path(inode), ns=(atime, mtime), follow_symlinks=adrift is not None)
        self.namespace.update(ino, atime_ns=atime, mtime_ns=mtime, ctime_ns=time.time_ns())


def changed_ns(inode: Inode | Waiting, mtime_ns: int) -> int:
    """ctime of an inode whose staged file was modified at `mtime_ns`: a write moves it along, a time that was set does not."""
    return inode.ctime_ns if mtime_ns == inode.mtime_ns else max(inode.ctime_ns, mtime_ns)
