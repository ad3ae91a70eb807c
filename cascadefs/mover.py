"""Moves contents behind the applications: seals what was closed, flushes what is dirty, evicts what is clean, gives space back.

Owns: the tasks, the open extent, the order "data, sync, index, sync, then drop or punch". Decides nothing: scheduler.py,
the policy and the lease do. Invariants:
(1) One flush at a time: the open extent has one writer.
(2) A copy in memory becomes clean only after the commit that locates its blocks was synced.
(3) Records are punched, extents deleted, only after the commit that forgot them was synced.
(4) Work per round is bounded (settings.batch_size; ROUNDS_AT_ONCE times that while everything is flushed), so that fsync of
    one file waits for one round at most before its own.
"""

import contextlib
import errno
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial

import trio

from cascadefs import scheduler
from cascadefs.crash import point
from cascadefs.errors import CorruptRecord, UnreadableCopy, os_error
from cascadefs.ext import hashing
from cascadefs.files import Files
from cascadefs.journal import Journal, Taken
from cascadefs.manifest import encode
from cascadefs.record import record_bytes
from cascadefs.sealing import Sealer
from cascadefs.tiers.cold import Piece
from cascadefs.types import Location, Object

log = logging.getLogger(__name__)
IDLE_S = 0.05  # eviction keeps head room for writers the kernel does not announce: 50 ms of 20 GB/s is 1 GB
BACKOFF_S, BACKOFF_MAX_S = 0.25, 8.0  # after an error; space that returns is used within the latter
OBJECTS_PER_ROUND = 2048
HURRY_BYTES = 32 << 20  # less is written in one round after all is sealed: a sync more would cost what the overlap gains
ROUNDS_AT_ONCE = 4  # while somebody waits for everything: between two rounds (sync, commit, first packing) a disk waits 5 ms
INLINE_INODES = 16  # a manifest of so many is written down in 50 us; handing it to a thread would cost the control thread more


class Mover:
    """Background work of one store. `run()` in a nursery; the other methods may be awaited by anybody."""

    def __init__(self, files: Files, sealer: Sealer) -> None:
        self.files, self.sealer = files, sealer
        self.index, self.residency, self.cold = files.index, files.residency, files.residency.cold
        self.health = files.database.health
        self.journal = Journal(files.database, files.index)
        self.last_error: OSError | None = None
        self.unflushable: set[int] = set()  # objects whose only copy is damaged or gone: reported, not tried again
        self._last_round = 0.0
        self._flushing_all = 0  # how many wait for everything
        self._is_hurried = False  # somebody waits for everything, and it is much
        self._put_off_until: dict[int, float] = {}  # objects whose copy cannot be read: when to try again
        self._placed: dict[bytes, None] = {}  # digests of objects that are durable once the index is synced
        self._lock = trio.Lock()
        self._event = trio.Event()
        files.wake = self._wake

    def _wake(self) -> None:
        self._event.set()

    async def run(self) -> None:
        """Work until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._forever, self._seal_round)
            nursery.start_soon(self._forever, self._flush_round)
            nursery.start_soon(self._keep_room)

    async def _forever(self, work: Callable[[], Awaitable[bool]]) -> None:
        """Rounds while there is work; else sleep until woken, or a little. Errors are tried again, later and later."""
        pause = BACKOFF_S
        while True:
            try:
                busy = await work()
                pause = BACKOFF_S
            except Exception as e:  # background work must not end the mount; the next round starts afresh
                self._remember(e)
                await trio.sleep(pause)
                pause = min(2 * pause, BACKOFF_MAX_S)
                continue
            if busy:
                await trio.lowlevel.checkpoint()
            elif self.files.to_seal and self.sealer.unasked:
                await trio.sleep(scheduler.QUIET_S / 3)
            else:
                with trio.move_on_after(1):
                    await self._event.wait()
                self._event = trio.Event()

    def _remember(self, e: Exception) -> None:
        """An error of a medium is one line when it begins; anything else is a fault of ours and logged in full."""
        if isinstance(e, OSError):
            if str(e) != str(self.last_error):
                log.error("%s", e)
            self.last_error = e
        else:
            log.exception("background work failed")
            self.last_error = os_error(errno.EIO, repr(e))

    async def _seal_round(self) -> bool:
        return await self.sealer.seal_due() > 0

    async def _flush_round(self) -> bool:
        now = time.monotonic()
        quiet, waited = now - self.files.last_use, now - self._last_round
        pressed = self._is_hurried or self.residency.under_pressure()
        if not scheduler.background_may_run(quiet, waited, pressed):
            await trio.sleep(scheduler.QUIET_S)
            return True
        done = await self.flush_batch(())
        for bid in self.residency.healer.take_healable():
            await self.heal(bid)
        self._last_round = time.monotonic()
        if done:
            self.last_error = None
        elif self.journal.wants_snapshot():
            await self.tell()
        return done > 0

    async def _keep_room(self) -> None:
        while True:
            try:
                self.residency.make_room()
                self.residency.tidy_later()
                if self.residency.under_pressure():
                    self._wake()  # what would wait to be asked for is sealed now
                self.files.database.tend()
            except Exception:
                log.exception("eviction or a checkpoint failed")
                await trio.sleep(BACKOFF_S)
            await trio.sleep(IDLE_S)

    # --- dirty -> durable

    async def flush_batch(self, first: Sequence[int]) -> int:
        """One round: make some dirty objects durable, those of `first` before others. Returns how many were looked at."""
        async with self._lock:
            chosen = self._choose(first)
            fds = list[int]()
            try:
                pieces = self._pieces(chosen, fds)
                if chosen:
                    await self._append(pieces, await self.journal.changes(chosen))
                    self.health.worked("cold tier")
            except UnreadableCopy as e:
                self._put_off(chosen, first, e)
            except CorruptRecord as e:
                await self._set_aside(chosen, e)
            except OSError as e:
                self.health.failed("cold tier", e)
                raise
            finally:
                for fd in fds:
                    os.close(fd)
            await self._commit(chosen)
            if chosen or self.files.dead:
                await self._give_back()
            self.files.delete_leftover()
            self.files.database.reserve.fill()
        return len(chosen)

    def _choose(self, first: Sequence[int]) -> list[Object]:
        wanted = [found for oid in first if (found := self.index.find_oid(oid)) and not found.durable]
        chosen, total, now = list[Object](), 0, time.monotonic()
        for found in [*wanted, *self.index.dirty(OBJECTS_PER_ROUND)]:
            late = self._put_off_until.get(found.oid, 0.0) > now and found not in wanted
            if late or found.oid in self.unflushable or any(found.oid == c.oid for c in chosen[: len(wanted)]):
                continue
            if chosen and total + found.size_bytes > self._round_bytes():
                break
            chosen.append(found)
            total += found.size_bytes
        return chosen

    def _round_bytes(self) -> int:
        return self.files.settings.batch_size * (ROUNDS_AT_ONCE if self._flushing_all else 1)

    def _put_off(self, chosen: Sequence[Object], first: Sequence[int], e: UnreadableCopy) -> None:
        """One copy that cannot be read must not keep the others from the cold tier. Whoever waits for it is told."""
        for found in chosen:
            if any(block.bid == e.bid for block in self.index.blocks(found.oid)):
                if found.oid not in self._put_off_until:
                    log.error("object %s cannot be flushed yet: %s", found.digest.hex(), e)
                self._put_off_until[found.oid] = time.monotonic() + BACKOFF_MAX_S
        self.last_error = e
        if any(oid in self._put_off_until for oid in first):
            raise e

    def _pieces(self, objects: Sequence[Object], fds: list[int]) -> list[Piece]:
        """Blocks that have no place yet, each once, in the copies of the objects; `fds` gets the descriptors to close."""
        pieces, seen = list[Piece](), set[int]()
        for found in objects:
            blocks = self.index.blocks(found.oid)
            if all(block.location is not None or block.bid in seen for block in blocks):
                continue
            tier = self.residency.holder(found.digest)
            if tier is None:
                continue
            try:
                fds.append(tier.open_object(found.digest))
            except OSError as e:
                raise UnreadableCopy(e, blocks[0].bid) from e
            offset = 0
            for block in blocks:
                if block.location is None and block.bid not in seen:
                    seen.add(block.bid)
                    pieces.append(Piece(block.bid, block.fingerprint, fds[-1], offset, block.length))
                offset += block.length
        return pieces

    async def _append(self, pieces: Sequence[Piece], taken: Taken) -> None:
        """Write pieces, and a manifest behind them, to the open extent (the next when it is full); commit where they lie."""
        try:
            small = len(taken.manifest.inodes) <= INLINE_INODES
            manifest = encode(taken.manifest) if small else await trio.to_thread.run_sync(encode, taken.manifest)
            parts = list(_parts(pieces, self._round_bytes())) or [[]]
            for part in parts:
                number, position = await self._open_extent()
                tail = manifest if part is parts[-1] else None
                placed, end = await trio.to_thread.run_sync(partial(self.cold.append, number, position, part, tail))
                point("appended")
                with self.files.database.transaction():
                    self.files.dead += self.index.place(placed, number, end)
                    if tail is not None:
                        at = Location(number, end - record_bytes(len(tail)), len(tail))
                        fingerprint = hashing.fingerprint(tail, self.files.database.identity.secret)
                        self.files.dead += self.journal.written(taken, at, fingerprint)
                point("placed")
                if end >= self.files.settings.extent_size:
                    await self._seal_extent(number, end)
        except BaseException:
            self.journal.not_written(taken)
            raise

    async def heal(self, bid: int) -> bool:
        """Write a good copy of a block whose record is damaged to the open extent. False: there is none, or it is no more."""
        async with self._lock:
            block = self.index.block(bid)
            if block is None or block.location is None:
                return False
            piece = await trio.to_thread.run_sync(self.residency.healer.good_piece, block)
            if piece is None:
                return False
            try:
                number, position = await self._open_extent()
                placed, end = await trio.to_thread.run_sync(partial(self.cold.append, number, position, [piece]))
            finally:
                os.close(piece.fd)
            if self.index.block(bid) == block:
                self.files.dead += self.index.relocate(bid, placed[0][1], end)
            await self._give_back()
            self.residency.healer.is_healed(block)
        return True

    async def tell(self) -> None:
        """Write what the extents do not tell yet of names and attributes; everything, when it is time for a snapshot."""
        async with self._lock:
            if self.journal.wants_snapshot():
                await self._append((), await self.journal.everything())
            elif self.journal.has_news():
                await self._append((), await self.journal.changes(()))
            await self._give_back()

    async def _open_extent(self) -> tuple[int, int]:
        found = self.index.open_extent()
        if found is None:
            number = self.index.next_extent()
            size = await trio.to_thread.run_sync(self.cold.create, number)
            self.index.place((), number, size)
            return number, size
        return found

    async def _seal_extent(self, number: int, end: int) -> None:
        records = self.index.extent_records(number)
        size = await trio.to_thread.run_sync(partial(self.cold.seal, number, end, records))
        point("extent sealed")
        self.index.seal_extent(number, size)

    async def _set_aside(self, objects: Sequence[Object], why: CorruptRecord) -> None:
        """Some copy did not match its fingerprint. One that was opened for writing meanwhile is no object any more;
        one whose copy is really damaged is set aside, so that it stops nobody else."""
        for found in objects:
            now = self.index.find_oid(found.oid)
            tier = self.residency.holder(found.digest)
            if now is None or tier is None:
                continue
            fd = tier.open_object(found.digest)
            try:
                content = await trio.to_thread.run_sync(self.sealer.matches, fd, self.index.blocks(found.oid))
            finally:
                os.close(fd)
            if not content and self.index.find_oid(found.oid) is not None:
                log.error("object %s is damaged in memory and cannot be flushed: %s", found.digest.hex(), why)
                self.unflushable.add(found.oid)

    async def _commit(self, objects: Sequence[Object]) -> None:
        """Objects whose blocks all have a place are durable; after the sync their copies are clean."""
        ready = []
        with self.files.database.transaction():
            for found in objects:
                now = self.index.find_oid(found.oid)
                if now is None:
                    continue
                if all(block.location is not None for block in self.index.blocks(found.oid)):
                    self.files.dead += self.index.mark_durable(found.oid)
                    self._put_off_until.pop(found.oid, None)
                    ready.append(found.digest)
                elif self.residency.holder(found.digest) is None:
                    log.error("object %s is dirty and has no copy", found.digest.hex())
                    self.unflushable.add(found.oid)
        point("durable")
        self._placed |= dict.fromkeys(ready)
        if not self._placed:
            return
        await self.sync_index()
        synced, self._placed = list(self._placed), {}
        for digest in synced:
            if (durable := self.index.find(digest)) is not None and durable.durable:
                self.residency.mark_clean(digest)
        self.residency.tidy(synced)

    async def sync_index(self) -> None:
        """Every transaction so far survives a loss of power afterwards."""
        self.files.database.renew()
        await trio.to_thread.run_sync(self.files.database.sync)

    async def _give_back(self) -> None:
        """Punch dead records, delete dead extents; after a sync of the commits that forgot them."""
        count, gone = len(self.files.dead), self.index.dead_extents()
        if not count and not gone:
            return
        await self.sync_index()
        point("forgotten")
        dead, self.files.dead[:count] = self.files.dead[:count], []
        await trio.to_thread.run_sync(self._punch, dead)
        for number in gone:
            self.cold.remove(number)  # before it is forgotten: else an error would leave it for ever
            self.index.forget_extent(number)

    def _punch(self, dead: Sequence[Location]) -> None:
        for location in dead:
            with contextlib.suppress(OSError):  # the space stays with a dead record: a leak until the extent dies, no loss
                self.cold.punch(location)

    # --- waiting for durability

    async def make_durable(self, oid: int) -> None:
        """Return when the object is durable and synced. EIO when its only copy is damaged; the medium's error otherwise."""
        while (found := self.index.find_oid(oid)) is not None and not found.durable:
            if oid in self.unflushable:
                raise os_error(errno.EIO, "the only copy of this content is damaged")
            await self.flush_batch((oid,))

    async def fsync(self, ino: int) -> None:
        """Data and name of one file are durable afterwards."""
        inode = self.files.namespace.get(ino)
        if inode.home and inode.nlink and not await self.sealer.seal(ino):
            holder = await self.sealer.snapshot(ino)
            if holder is not None:
                held = self.files.namespace.get(holder)
                try:
                    if held.oid is not None:
                        await self.make_durable(held.oid)
                    self.sealer.settle(ino, holder)
                finally:
                    self.files.forget_if_gone(holder)
        elif (now := self.files.namespace.find(ino)) is not None and now.oid is not None:
            await self.make_durable(now.oid)
        await self.sync_index()

    async def flush_all(self) -> None:
        """Everything closed before the call is durable afterwards; files with writers as fsync() has it."""
        self._flushing_all += 1
        try:
            await self._flush_all()
        finally:
            self._flushing_all -= 1

    async def _flush_all(self) -> None:
        busy = await self._seal_all()
        last = self.index.newest_object()
        self._put_off_until.clear()
        while self._has_dirty(last):
            await self.flush_batch(())
        for ino in busy:
            if self.files.namespace.find(ino) is not None:
                await self.fsync(ino)
        await self.tell()
        await self.sync_index()
        if left := len(self.unflushable | self._put_off_until.keys()):
            raise os_error(errno.EIO, f"{left} objects whose only copy is damaged or unreadable could not be flushed")

    async def _seal_all(self) -> list[int]:
        """Seal what is staged; what has writers is returned. The background flushes meanwhile what is enough for a round."""
        busy, sealed_bytes = list[int](), 0
        closed = {ino: place for place, ino in enumerate(self.files.to_seal)}  # their order is what readers follow
        try:
            for ino in sorted(self.index.staged_inodes(), key=lambda ino: closed.get(ino, len(closed))):
                if not await self.sealer.seal(ino):
                    busy.append(ino)
                elif (inode := self.files.namespace.find(ino)) is not None:
                    sealed_bytes += inode.size
                    self._is_hurried = sealed_bytes >= HURRY_BYTES
        finally:
            self._is_hurried = False
        return busy

    def _has_dirty(self, last: int) -> bool:
        left = self.unflushable | self._put_off_until.keys()
        return any(found.oid <= last and found.oid not in left for found in self.index.dirty(len(left) + 1))


def _parts(pieces: Sequence[Piece], limit_bytes: int) -> Iterator[list[Piece]]:
    """Groups of at most `limit_bytes`, or of one piece."""
    part, total = list[Piece](), 0
    for piece in pieces:
        if part and total + piece.length > limit_bytes:
            yield part
            part, total = [], 0
        part.append(piece)
        total += piece.length
    if part:
        yield part
