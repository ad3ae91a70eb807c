"""fsync of files that have writers: their bytes go straight into the open extent, many callers in one append.

Owns: the queue of those who wait. The file stays staged; what is durable becomes what its inode falls back to. Invariants:
(1) What was written before a call to make_durable() is durable when it answers True: reading begins after the call.
(2) Order: records, fdatasync, one transaction, sync of the index. Nothing of a capture is known before that transaction; when
    the world has changed in between, so that it would be wrong, the capture is made again.
(3) What goes wrong with one file is told to its caller only.
(4) The manifest behind the bytes tells whose they are: names, attributes and content of each file, and what led to them.
"""

import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import trio

from cascadefs.contents.files import Files, changed_ns
from cascadefs.crash import point
from cascadefs.errors import UnreadableCopy
from cascadefs.ext import hashing
from cascadefs.formats.manifest import Listed, encode
from cascadefs.formats.record import record_bytes
from cascadefs.locks import take
from cascadefs.metadata.bulk import Captured, NewObject, Unplaced
from cascadefs.metadata.manifests import Journal, Taken
from cascadefs.metadata.objects import digest_of
from cascadefs.tiers.packer import PAGE, Capture, Subject
from cascadefs.types import Home, Inode, Location, Print
from cascadefs.writeback.extent_log import OpenExtent
from cascadefs.writeback.sealing import DOMAIN_BITS, Content, Sealer

FILES, BYTES = 64, 16 << 20  # of one append, unless a single file is longer: those who come later wait for it
# A large file that is synced again and again: blocks of its own length, so that little is written for little that changed.
# From the fourth sync on: the first with them writes all of it anew, as sealing does that gives it the usual ones. The more
# blocks, the more rows each sync changes.
PARTS, BLOCKS_MAX, SYNCS = 16, 1024, 3
DEAD_BYTES = 64 << 20  # of records that wait to be punched
INLINE_BYTES = 64 << 10  # read and hashed in 15 us, in which no thread would begin


@dataclass(eq=False, slots=True)
class _Request:
    ino: int
    is_done: bool = False
    is_durable: bool = False
    error: OSError | None = None


@dataclass(eq=False, slots=True)
class _Open:
    """A staged file that is being captured."""

    ino: int
    domain: int  # of deduplication
    is_near: bool  # in memory
    subject: Subject
    times: tuple[int, int]  # of modification and change, before it is read

    def listed(self) -> Listed:
        """What was read, as an object; its digest is another one only if an object of that digest has other bytes."""
        prints = [fingerprint for fingerprint, _ in self.subject.prints]
        size_bytes = self.subject.size_bytes
        return Listed(digest_of(size_bytes, prints, self.domain << DOMAIN_BITS), size_bytes, prints, self.subject.step)


class _Document:
    """The manifest of one append. It is called, once, when all has been read: in whatever thread."""

    def __init__(self, opened: Sequence[_Open], taken: Taken) -> None:
        self._opened, self._taken = opened, taken
        self.payload = b""
        self.told: dict[int, bytes] = {}  # digest that it tells of each inode

    def __call__(self) -> bytes:
        manifest, drafts = self._taken.manifest, self._taken.drafts
        inodes, objects = list(manifest.inodes), {found.digest: found for found in manifest.objects}
        for one in self._opened:
            found = one.listed()
            if one.subject.size_bytes:
                objects[found.digest] = found
            if one.ino in drafts:
                digest = found.digest if one.subject.size_bytes else None
                mtime_ns, ctime_ns = one.times
                inodes.append(replace(drafts[one.ino], digest=digest, mtime_ns=mtime_ns, ctime_ns=ctime_ns))
                self.told[one.ino] = found.digest
        self.payload = encode(replace(manifest, inodes=inodes, objects=list(objects.values())))
        return self.payload


class Fsyncs:
    """Of one store. `sync_index` as the mover has it."""

    def __init__(
        self, files: Files, sealer: Sealer, journal: Journal, extent: OpenExtent, sync_index: Callable[[], Awaitable[None]]
    ) -> None:
        self._files, self._sealer, self._journal, self._extent = files, sealer, journal, extent
        self._sync_index = sync_index
        self._waiting = list[_Request]()

    async def make_durable(self, ino: int) -> bool:
        """Whether the bytes of a staged file are durable now. False: it is not staged any more, nothing was done."""
        request = _Request(ino)
        self._waiting.append(request)
        try:
            await take(self._extent.lock)
            try:
                if not request.is_done:
                    await self._serve_next()
            finally:
                self._extent.lock.release()
        finally:
            if request in self._waiting:
                self._waiting.remove(request)
        if request.error is not None:
            raise request.error
        if request.is_durable:
            await self._sync_index()
        return request.is_durable

    async def _serve_next(self) -> None:
        batch = self._next_batch()
        try:
            await self._serve(batch)
        except BaseException:  # cancelled: the next in the queue has the lock soon
            self._waiting[:0] = [request for request in batch if not request.is_done]
            raise

    def _next_batch(self) -> list[_Request]:
        """The first of the queue, and others that fit with them. The lock is fair: the caller is one of them."""
        total, batch = 0, list[_Request]()
        for request in self._waiting:
            total += self._bytes_of(request.ino)
            if batch and (total > BYTES or len(batch) == FILES):
                break
            batch.append(request)
        del self._waiting[: len(batch)]
        return batch

    def _bytes_of(self, ino: int) -> int:
        inode = self._files.namespace.find(ino)
        return self._files.with_staged(inode).size if inode is not None else 0

    async def _serve(self, batch: Sequence[_Request]) -> None:
        """Everybody's answer. Where many fail together each is tried alone."""
        try:
            durable = await self._captured({request.ino for request in batch})
            for request in batch:
                request.is_durable = request.ino in durable
        except OSError as e:
            if len(batch) == 1:
                batch[0].error = e
            else:
                for request in batch:
                    await self._serve((request,))
        for request in batch:
            request.is_done = True

    async def _captured(self, inos: set[int]) -> set[int]:
        """Those that were staged until their bytes were durable. The index is not synced yet."""
        while True:
            taken = await self._journal.changes((), captured=inos)
            shared: dict[Print, Location] = {}
            opened = list[_Open]()
            try:
                for ino in sorted(inos):
                    opened += self._opened(ino, shared)
                durable = await self._write(opened, taken) if opened else None
            except BaseException:
                self._journal.not_written(taken)
                raise
            finally:
                for one in opened:
                    os.close(one.subject.fd)
            if durable is not None:
                return durable
            self._journal.not_written(taken)
            if not opened:
                return set()

    def _opened(self, ino: int, shared: dict[Print, Location]) -> list[_Open]:
        inode = self._files.namespace.find(ino)
        if inode is None or not inode.home:
            return []
        fd = self._files.open_staged(inode)
        domain = self._sealer.domain(inode)
        places = {} if domain else shared
        is_near = inode.home == Home.MEMORY
        found = os.fstat(fd)
        times = found.st_mtime_ns, changed_ns(inode, found.st_mtime_ns)
        step = self._step(inode, found.st_size)
        pages = self._room_for_pages(ino, found.st_size)
        is_whole = found.st_blocks * 512 >= found.st_size  # a mapping fills holes when it is read
        is_known = step > 0 and is_near and is_whole and pages is None
        return [_Open(ino, domain, is_near, Subject(fd, found.st_size, not domain, places, step, is_known, pages), times)]

    def _room_for_pages(self, ino: int, size_bytes: int) -> bytearray | None:
        """For the fingerprints of its pages, if the next sync is to compare with them."""
        live = self._files.live.get(ino)
        wanted = live is not None and live.kept is not None and live.kept.wants_prints
        return bytearray(-(-size_bytes // PAGE) * 16) if wanted else None

    def _step(self, inode: Inode, size_bytes: int) -> int:
        """Length of its blocks; 0: the usual one."""
        index = self._files.index
        small, live = index.block_bytes // PARTS, self._files.live.get(inode.ino)
        often = live is not None and live.syncs >= SYNCS
        shares = self._sealer.domain(inode) == 0  # else no two versions share a block
        return small if often and shares and index.block_bytes < size_bytes <= BLOCKS_MAX * small else 0

    async def _write(self, opened: Sequence[_Open], taken: Taken) -> set[int] | None:
        """None: the index is not any more as it was when it was asked what lacks a place."""
        number, position = await self._extent.tail()
        document = _Document(opened, taken)
        try:
            end = await self._append(opened, number, position, document)
        except UnreadableCopy:
            raise  # the extents are not to blame
        except OSError as e:
            self._files.database.health.failed("cold tier", e)
            raise
        self._files.database.health.worked("cold tier")
        point("appended")
        contents = list[tuple[_Open, Content]]()
        for one in opened:
            subject = one.subject
            contents.append((one, await self._sealer.content(subject.fd, subject.size_bytes, subject.prints, one.domain)))
        at = Location(number, end - record_bytes(len(document.payload)), len(document.payload))
        durable = self._commit(contents, taken, at, document)
        if durable is not None:
            point("durable")
            await self._extent.seal_if_full(number, end)
            self._leave_turn()
        return durable

    def _leave_turn(self) -> None:
        """Background work waits for a pause in the syncs, too, unless much is to be punched: it would hold the extent."""
        if sum(at.length for at in self._files.dead) < DEAD_BYTES:
            self._files.last_use = time.monotonic()
        self._files.work.ring()

    async def _append(self, opened: Sequence[_Open], number: int, position: int, document: _Document) -> int:
        files, subjects = self._files, [one.subject for one in opened]
        cold, step, lacking = files.residency.cold, files.index.block_bytes, files.bulk.lacking
        if all(one.is_near for one in opened) and sum(subject.size_bytes for subject in subjects) <= INLINE_BYTES:
            capture = Capture(cold, step, number, position, lacking)
            capture.pack(subjects, document)
            return await trio.to_thread.run_sync(capture.write)

        def lacking_from_thread(prints: Sequence[Print]) -> set[Print]:
            return trio.from_thread.run_sync(lacking, prints)

        capture = Capture(cold, step, number, position, lacking_from_thread)
        return await trio.to_thread.run_sync(capture.run, subjects, document)

    def _commit(
        self, contents: Sequence[tuple[_Open, Content]], taken: Taken, at: Location, document: _Document
    ) -> set[int] | None:
        """The transaction. What is not staged any more is left out: its writer has gone, it will be flushed as an object."""
        files, kept = self._files, list[Captured]()
        staged = files.bulk.staged([one.ino for one, _ in contents])
        for one, content in contents:
            if one.ino not in staged:
                continue
            if content.size_bytes and content.known != files.index.find(content.digest):
                return None
            new = NewObject(content.digest, content.size_bytes, content.prints, one.subject.shares)
            kept.append(Captured(one.ino, new, one.subject.places))
        written = {place for one, _ in contents for place in one.subject.places.values()}
        changed_since = files.database.changed & {one.ino for one, _ in contents}
        try:
            with files.database.transaction():
                files.dead += files.bulk.keep(kept, written, at.extent, at.offset + record_bytes(at.length))
                fingerprint = hashing.fingerprint(document.payload, files.database.identity.secret)
                files.dead += self._journal.written(taken, at, fingerprint)
                for captured in kept:
                    self._refresh(captured.ino)
        except Unplaced:
            return None
        self._keep_pages(contents)
        told = {one.ino for one in kept if document.told.get(one.ino) == one.content.digest}
        files.database.changed -= told - changed_since
        files.database.changed |= document.told.keys() - told
        files.database.unlisted.difference_update(files.bulk.numbers({document.told[ino] for ino in told}).values())
        self._extent.placed |= {content.digest: None for _, content in contents if content.known and not content.known.durable}
        return {captured.ino for captured in kept}

    def _keep_pages(self, contents: Sequence[tuple[_Open, Content]]) -> None:
        for one, _ in contents:
            if (live := self._files.live.get(one.ino)) is not None and live.kept is not None:
                live.kept.prints = one.subject.pages

    def _refresh(self, ino: int) -> None:
        """What the inode falls back to has the size and times that its file has now."""
        now = self._files.attributes(ino)
        self._files.namespace.update(ino, size=now.size, mtime_ns=now.mtime_ns, ctime_ns=now.ctime_ns)
        if (live := self._files.live.get(ino)) is not None:
            live.syncs = live.syncs + 1 if live.writers else 0
