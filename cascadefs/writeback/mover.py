"""Moves contents behind the applications: seals what was closed, flushes what is dirty, evicts what is clean, gives space back.

Owns: the tasks, the open extent, the order "data, sync, index, sync, then drop or punch". Decides nothing: decisions.py,
the policy and the lease do. Invariants:
(1) One flush at a time: the open extent has one writer.
(2) A copy in memory becomes clean only after the commit that locates its blocks was synced.
(3) Records are punched, extents deleted, only after the commit that forgot them was synced.
(4) Work per round is bounded (settings.batch_size; ROUNDS_AT_ONCE times that while everything is flushed), so that fsync of
    one file waits for one round at most before its own.
"""

import errno
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from cascadefs.contents.files import Files
from cascadefs.crash import point
from cascadefs.errors import CorruptRecord, UnreadableCopy, os_error
from cascadefs.ext import hashing
from cascadefs.formats.record import record_bytes
from cascadefs.locks import take
from cascadefs.media.descriptors import ROUND, share
from cascadefs.metadata.manifests import Journal, Taken, encoded
from cascadefs.placement import decisions
from cascadefs.tiers.extents import Piece, parts_of
from cascadefs.types import Location, Object
from cascadefs.writeback.extent_log import OpenExtent
from cascadefs.writeback.fsync import Fsyncs
from cascadefs.writeback.patches import Patches
from cascadefs.writeback.sealing import Outcome, Sealer
from cascadefs.writeback.single_pass import Straight

log = logging.getLogger(__name__)
# Eviction keeps head room for writers the kernel does not announce: 50 ms of 20 GB/s is 1 GB. While nothing grows and nothing
# was opened or closed for a second it looks less often: whoever then begins to write is seen 4 GB later.
LOOK_S, LOOK_AT_REST_S, RESTS_AFTER_S = 0.05, 0.2, 1.0
BACKOFF_S, BACKOFF_MAX_S = 0.25, 8.0  # after an error; space that returns is used within the latter
OBJECTS_PER_ROUND = 2048
HURRY_BYTES = 32 << 20  # less is written in one round after all is sealed: a sync more would cost what the overlap gains
ROUNDS_AT_ONCE = 4  # while somebody waits for everything: between two rounds (sync, commit, first packing) a disk waits 5 ms


class Mover:
    """Background work of one store. `run()` in a nursery; the other methods may be awaited by anybody."""

    def __init__(self, files: Files, sealer: Sealer, look_at_memory: Callable[[], None]) -> None:
        """`look_at_memory`: called often; notices when somebody empties the memory tier."""
        self.files, self.sealer = files, sealer
        self.index, self.residency, self.cold = files.index, files.residency, files.residency.cold
        self.health, self.bulk = files.database.health, files.bulk
        self.journal = Journal(files.database, files.index)
        self.last_error: OSError | None = None
        self.unflushable: set[int] = set()  # objects whose only copy is damaged or gone: reported, not tried again
        self._last_round, self._flushes = 0.0, 0  # calls of flush_all() under way
        self._is_hurried = False  # somebody waits for everything, and it is much
        self._put_off_until: dict[int, float] = {}  # objects whose copy cannot be read: when to try again
        self.extent = OpenExtent(files)
        self.fsyncs = Fsyncs(files, sealer, self.journal, self.extent, self.sync_index)
        self.patches = Patches(files)
        self.straight = Straight(files, sealer, self.extent)
        self._sync_lock = trio.Lock()
        self._synced = -1  # rows that had changed in this process when the index was synced the last time
        self._untold = False  # whether something went straight to the extent and no manifest has been written since
        self._look_at_memory = look_at_memory

    async def run(self) -> None:
        """Work until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._forever, self.seal_round)
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
                await trio.sleep(decisions.QUIET_S / 3)
            else:
                with trio.move_on_after(1):
                    await self.files.work.wait()

    def _remember(self, e: Exception) -> None:
        """An error of a medium is one line when it begins; anything else is a fault of ours and logged in full."""
        if isinstance(e, OSError):
            if str(e) != str(self.last_error):
                log.error("%s", e)
            self.last_error = e
        else:
            log.exception("background work failed")
            self.last_error = os_error(errno.EIO, repr(e))

    async def seal_round(self) -> bool:
        """Seal some of what is due; whether there was something."""
        return await self.sealer.seal_due(self._straight_round) > 0

    async def _straight_round(self, inos: Sequence[int], outcome: Outcome) -> None:
        """While the disk takes nothing files are sealed all the same: equal ones need the memory of one."""
        if self.health.troubles or not inos:
            return
        try:
            await self.straight.run(inos, self.files.settings.batch_size, outcome)
        except OSError as e:
            self._remember(e)
        self._untold = self._untold or bool(outcome.sealed)

    async def _flush_round(self) -> bool:
        now = time.monotonic()
        quiet, waited = self.files.quiet_s(now), now - self._last_round
        pressed = self._is_hurried or self.residency.under_pressure()
        if not decisions.background_may_run(quiet, waited, pressed):
            await trio.sleep(decisions.QUIET_S)
            return True
        done = await self.flush_batch(())
        for bid in self.residency.healer.take_healable():
            await self.heal(bid)
        self._last_round = time.monotonic()
        await self.patches.remove_stale(self._synced, self.journal.has_news_of)
        if done:
            self.last_error = None
        elif self._untold or self.journal.wants_snapshot():
            self._untold = False
            await self.tell()
        return done > 0

    async def _keep_room(self) -> None:
        rests = False
        while True:
            try:
                self._look_at_memory()
                rests = self.files.quiet_s(time.monotonic()) > RESTS_AFTER_S
                self.residency.make_room()
                self.files.gaps.look_again()
                self.residency.tidy_later()
                self.files.owners.tidy()
                if self.residency.under_pressure():
                    self.files.work.ring()  # what would wait to be asked for is sealed now
                self.files.database.tend()
            except Exception:
                log.exception("eviction or a checkpoint failed")
                await trio.sleep(BACKOFF_S)
            await trio.sleep(LOOK_AT_REST_S if rests else LOOK_S)

    # --- dirty -> durable

    async def flush_batch(self, first: Sequence[int]) -> int:
        """One round: make some dirty objects durable, those of `first` before others. Returns how many were looked at. Nothing
        is done when the round before has served all of `first`."""
        async with self.extent.lock:
            await self._regain_reserve()
            chosen = self._choose(first)
            if first and chosen and chosen[0].oid not in first:
                return 0
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
            self.files.delete_leftover()
            if chosen or self.files.dead:
                await self._give_back()
        return len(chosen)

    async def _regain_reserve(self) -> None:
        """On a full disk what is dead goes before new data come: those are refused until the reserve is whole."""
        if not self.files.database.reserve.fill() or self.health.troubles:
            self.files.delete_leftover()
            await self._give_back()

    def _choose(self, first: Sequence[int]) -> list[Object]:
        wanted = [found for oid in first if (found := self.index.find_oid(oid)) and not found.durable]
        chosen, total, now = list[Object](), 0, time.monotonic()
        for found in [*wanted, *self.index.dirty(share(OBJECTS_PER_ROUND, ROUND))]:
            late = self._put_off_until.get(found.oid, 0.0) > now and found not in wanted
            if late or found.oid in self.unflushable or any(found.oid == c.oid for c in chosen[: len(wanted)]):
                continue
            if chosen and total + found.size_bytes > self._round_bytes():
                break
            chosen.append(found)
            total += found.size_bytes
        return chosen

    def _round_bytes(self) -> int:
        """No more than the disk has room for: what does not fit is tried alone, and fails alone."""
        return min(self.files.settings.batch_size * (ROUNDS_AT_ONCE if self._flushes else 1), self.cold.room_bytes())

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
        blocks_of = self.bulk.blocks_of([found.oid for found in objects])
        for found in objects:
            blocks = blocks_of[found.oid]
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
            manifest = await encoded(taken.manifest, self._is_waited_for)
            parts = list(parts_of(pieces, self._round_bytes())) or [[]]
            for part in parts:
                number, position = await self.extent.tail(for_data=bool(part))
                tail = manifest if part is parts[-1] else None
                placed, end = await trio.to_thread.run_sync(partial(self.cold.append, number, position, part, tail))
                point("appended")
                with self.files.database.transaction():
                    self.files.dead += self.bulk.place(placed, number, end)
                    if tail is not None:
                        at = Location(number, end - record_bytes(len(tail)), len(tail))
                        fingerprint = hashing.fingerprint(tail, self.files.database.identity.secret)
                        self.files.dead += self.journal.written(taken, at, fingerprint)
                point("placed")
                await self.extent.seal_if_full(number, end)
        except BaseException:
            self.journal.not_written(taken)
            raise

    async def heal(self, bid: int) -> bool:
        """Write a good copy of a block whose record is damaged to the open extent. False: there is none, or it is no more."""
        async with self.extent.lock:
            block = self.index.block(bid)
            if block is None or block.location is None:
                return False
            piece = await trio.to_thread.run_sync(self.residency.healer.good_piece, block)
            if piece is None:
                return False
            try:
                number, position = await self.extent.tail()
                placed, end = await trio.to_thread.run_sync(partial(self.cold.append, number, position, [piece]))
            finally:
                os.close(piece.fd)
            if self.index.block(bid) == block:
                self.files.dead += self.bulk.relocate(bid, placed[0][1], end)
            await self._give_back()
            self.residency.healer.is_healed(block)
        return True

    async def tell(self) -> None:
        """Write what the extents do not tell yet of names and attributes; everything, when it is time for a snapshot."""
        async with self.extent.lock:
            await self.files.database.reserve.lend_to(self._tell)
            await self._give_back()

    async def _tell(self) -> None:
        if self.journal.wants_snapshot():
            await self._append((), await self.journal.everything(self._is_waited_for))
        elif self.journal.has_news():
            await self._append((), await self.journal.changes(()))

    def _is_waited_for(self) -> bool:
        """Whether somebody needs the open extent, or everything to be durable, before the holder of its lock is done."""
        return self.is_awaited or self.extent.lock.statistics().tasks_waiting > 0

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
        with self.files.database.transaction():
            whole = self.bulk.placed_whole([found.oid for found in objects])
            self.files.dead += self.bulk.mark_durable(sorted(whole))
        for found in objects:
            if found.oid in whole:
                self._put_off_until.pop(found.oid, None)
                self.extent.placed[found.digest] = None
            elif self.index.find_oid(found.oid) and self.residency.holder(found.digest) is None:
                log.error("object %s is dirty and has no copy", found.digest.hex())
                self.unflushable.add(found.oid)
        point("durable")
        if not self.extent.placed:
            return
        await self.sync_index()
        synced, self.extent.placed = list(self.extent.placed), {}
        for digest, is_durable in self.index.states(synced).items():
            if is_durable:
                self.residency.mark_clean(digest)
        self.residency.tidy(synced)

    async def sync_index(self) -> None:
        """Every transaction so far survives a loss of power afterwards. Whoever comes meanwhile shares the next sync."""
        database = self.files.database
        asked = database.connection.total_changes
        await take(self._sync_lock)
        try:
            if self._synced < asked:
                database.renew()
                changes = database.connection.total_changes
                await trio.to_thread.run_sync(database.sync)
                self._synced = changes
        finally:
            self._sync_lock.release()

    async def _give_back(self) -> None:
        """Punch dead records, delete dead extents; after a sync of the commits that forgot them, and when the extents have been
        told what took their place: else a rebuild of the index would find neither."""
        await self.files.database.reserve.lend_to(self._give_back_now)

    async def _give_back_now(self) -> None:
        if self.files.dead and self.journal.has_news():
            await self._append((), await self.journal.changes(()))
        count, gone = len(self.files.dead), self.index.dead_extents()
        if not count and not gone:
            return
        await self.sync_index()
        point("forgotten")
        for number in gone:
            self.cold.remove(number)  # before it is forgotten: else an error would leave it for ever
            self.index.forget_extent(number)
        dead, self.files.dead[:count] = self.files.dead[:count], []
        await self._punch([at for at in dead if at.extent not in gone])

    async def _punch(self, dead: Sequence[Location]) -> None:
        """Others may append meanwhile: what is dead lies before the end, and a hole takes the disk up to a millisecond."""
        self.extent.lock.release()
        try:
            await trio.to_thread.run_sync(self.cold.punch, dead)
        finally:
            with trio.CancelScope(shield=True):
                await self.extent.lock.acquire()

    # --- waiting for durability

    async def make_durable(self, oid: int) -> None:
        """Return when the object is durable and synced. EIO when its only copy is damaged."""
        while (found := self.index.find_oid(oid)) is not None and not found.durable:
            if oid in self.unflushable:
                raise os_error(errno.EIO, "the only copy of this content is damaged")
            await self.flush_batch((oid,))

    async def fsync(self, ino: int) -> None:
        """Data and name of one file are durable afterwards."""
        if await self.patches.fsync(ino, self._fsync_whole):
            await self._tell_of(ino)
            await self.sync_index()

    async def _fsync_whole(self, ino: int) -> None:
        while (inode := self.files.namespace.get(ino)).home and inode.nlink and not await self.sealer.seal(ino):
            if self.files.attributes(ino).size > self.files.settings.batch_size:
                await self._fsync_copy(ino)
                break
            if await self.fsyncs.make_durable(ino):
                return
        else:
            if (now := self.files.namespace.find(ino)) is not None and now.oid is not None:
                await self.make_durable(now.oid)
        await self._tell_of(ino)
        await self.sync_index()

    async def fsync_folder(self, ino: int) -> None:
        """The names in a folder, and of it, are durable afterwards."""
        if self.journal.incomplete:
            await self.tell()  # names that went before a crash are told by a snapshot only
        await self._tell_of(ino)
        await self.sync_index()

    async def _tell_of(self, ino: int) -> None:
        """An inode whose content is durable: its names, its attributes, the folders above it."""
        if self.journal.has_news_of(ino):
            async with self.extent.lock:
                if self.journal.has_news_of(ino):
                    await self._append((), await self.journal.changes((), synced=(ino,)))

    async def _fsync_copy(self, ino: int) -> None:  # a large file that has writers: it would be too long for one append
        holder = await self.sealer.snapshot(ino)
        if holder is None:
            return
        held = self.files.namespace.get(holder)
        try:
            if held.oid is not None:
                await self.make_durable(held.oid)
            self.sealer.settle(ino, holder)
        finally:
            self.files.forget_if_gone(holder)

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for everything to be durable: what is not needed for that can wait."""
        return self._flushes > 0

    async def flush_all(self) -> None:
        """Everything closed before the call is durable afterwards; files with writers as fsync() has it."""
        self._flushes += 1
        try:
            await self._flush_all()
        finally:
            self._flushes -= 1

    async def _flush_all(self) -> None:
        async with self.extent.lock:
            await self._regain_reserve()
        busy = await self._seal_all()
        last = self.index.newest_object()
        self._put_off_until.clear()
        while self._has_dirty(last) or self.extent.placed:
            await self.flush_batch(())
        for ino in busy:
            try:
                await self.fsync(ino)
            except OSError:
                if self.files.namespace.find(ino) is not None:
                    raise  # else it went meanwhile, and nothing of it has to be durable
        await self.tell()
        await self.sync_index()
        await self.patches.remove_stale(self._synced, self.journal.has_news_of)
        if left := len(self.unflushable | self._put_off_until.keys()):
            raise os_error(errno.EIO, f"{left} objects whose only copy is damaged or unreadable could not be flushed")

    async def _seal_all(self) -> list[int]:
        """Seal what is staged, most of it straight into the extent; what has writers is returned. What has to be sealed by
        itself the background flushes meanwhile, if it is enough for a round."""
        outcome = Outcome()
        closed = {ino: place for place, ino in enumerate(self.files.to_seal)}  # their order is what readers follow
        staged = sorted(self.index.staged_inodes(), key=lambda ino: closed.get(ino, len(closed)))
        await self.straight.run(staged, self._round_bytes(), outcome)
        outcome.sealed_bytes = 0
        try:
            for batch in self.sealer.batches([ino for ino in staged if ino not in outcome.sealed]):
                await self.sealer.seal_batch(batch, outcome)
                self._is_hurried = outcome.sealed_bytes >= HURRY_BYTES
        finally:
            self._is_hurried = False
        if outcome.error is not None:
            raise outcome.error
        return list(outcome.busy)

    def _has_dirty(self, last: int) -> bool:
        left = self.unflushable | self._put_off_until.keys()
        return any(found.oid <= last and found.oid not in left for found in self.index.dirty(len(left) + 1))
