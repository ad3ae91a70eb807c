"""Which contents have a whole copy where: the memory tier and the parking folder, promotion, eviction.

Owns: the two file tiers, the policy, the set of clean copies. Knows objects, not inodes. Invariants:
(1) `clean` holds exactly the copies in memory whose object is durable in the cold tier: only they may be evicted.
(2) A copy that somebody has open or mapped is not evicted: its memory would not come back, and the next open of its inode
    would find another file, which writes through the first do not reach.
(3) The bytes that promote() puts into memory were verified block by block.
(4) `under_way` has exactly the digests that are on their way to memory: nobody reads one twice.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, islice
from threading import Semaphore
from typing import Protocol

import trio

from cascadefs.crash import point
from cascadefs.errors import CorruptRecord
from cascadefs.ext import hashing
from cascadefs.formats.record import record_bytes
from cascadefs.media import file_io
from cascadefs.media.file_io import ALIGN
from cascadefs.media.transfers import AT_DISK, in_lanes
from cascadefs.metadata.holes import prints_of_zeros
from cascadefs.metadata.objects import Index
from cascadefs.placement import decisions
from cascadefs.placement.decisions import MemoryState
from cascadefs.placement.good_copies import Healer
from cascadefs.placement.policies import EvictionPolicy
from cascadefs.placement.sources import Sources
from cascadefs.tiers.extents import ColdTier
from cascadefs.tiers.folder import FileTier, is_used
from cascadefs.tiers.parking import Parking
from cascadefs.tiers.shm import ShmTier
from cascadefs.types import Block, Home, Object

EMPTY_SHARE = 1 / 4  # of a block in pages of zeros: then they are left out, which costs the block its huge pages
LOOKED_AT = 64  # of the copies that somebody has mapped, each time
LARGE_BYTES = 64 << 20
NO_ROOM = (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT)  # what a full memory tier answers
NO_ROOM_OR_GONE = (*NO_ROOM, errno.ENOENT, errno.ENOTDIR)  # somebody took the tier's folder away: loss.py


@dataclass(eq=False, slots=True)
class Promotion:
    """An object on its way to memory. `asked` is set when the disk has been asked for all of it: the next may begin, so that
    the disk does not wait for the last copying. `ended`, when it has ended, well or not."""

    asked: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)


class CopyListener(Protocol):
    """Hears of copies that go."""

    def copy_dropped(self, tier: FileTier, digest: bytes) -> None:
        """A tier has no copy of that object any more."""


class Residency:
    """Copies of objects in memory and in parking. Methods run in the trio thread; bytes move in worker threads."""

    def __init__(
        self,
        index: Index,
        memory: ShmTier,
        parking: Parking,
        cold: ColdTier,
        policy: EvictionPolicy,
        sources: Sources,
        paths_of: Callable[[int], list[str]],
    ) -> None:
        """`paths_of`: the files that have a block, for the log."""
        self.index, self.memory, self.parking, self.cold = index, memory, parking, cold
        self.policy, self.sources = policy, sources
        self.healer = Healer(index, (memory, parking), cold, paths_of)
        self.clean: dict[bytes, int] = {}
        self.clean_bytes = self.hits = self.misses = self.cold_reads = self.evicted = 0
        self._listeners = list[CopyListener]()
        self.under_way: dict[bytes, Promotion] = {}
        self._promotions = 0
        self._opened_before: set[bytes] = set()
        self._mapped: set[bytes] = set()  # copies in memory that could not be evicted: no handle, but somebody uses them

    def listen(self, listener: CopyListener) -> None:
        """Tell one more."""
        self._listeners.append(listener)

    def tier_of(self, home: int) -> FileTier:
        """Where staged bytes of that home lie."""
        return self.parking if home == Home.COLD else self.memory

    def home_of(self, tier: FileTier) -> Home:
        """The reverse of tier_of()."""
        return Home.COLD if tier is self.parking else Home.MEMORY

    def holder(self, digest: bytes) -> FileTier | None:
        """The tier with a whole copy of an object."""
        return next((tier for tier in (self.memory, self.parking) if digest in tier.objects), None)

    def memory_state(self) -> MemoryState:
        """What the scheduler decides on."""
        pinned = self.sources.open_objects() | self._mapped
        evictable = self.clean_bytes - sum(self.clean.get(digest, 0) for digest in pinned)
        return MemoryState(self.memory.capacity_bytes, self.memory.used_bytes(), self.clean, pinned, evictable)

    def home_for_new(self) -> Home:
        """Where the next staged file goes."""
        used = self.memory.used_bytes()
        fits = self.memory.is_roomy and decisions.stage_in_memory(self.memory.capacity_bytes, used)
        return Home.MEMORY if fits else Home.COLD

    def under_pressure(self) -> bool:
        """Whether memory is above the high watermark."""
        return self.memory.used_bytes() > self.memory.capacity_bytes * decisions.HIGH

    def make_room(self, wanted_bytes: int = 0) -> None:
        """Evict clean copies as the policy and the scheduler say."""
        if self.memory.used_bytes() + wanted_bytes <= self.memory.capacity_bytes * decisions.HIGH:
            return
        self.sources.holder.memory_is_short()
        while not self._evict(decisions.plan_eviction(self.memory_state(), self.policy.victims(), wanted_bytes)):
            pass  # some are mapped, which the next plan knows

    def _evict(self, digests: Sequence[bytes]) -> bool:
        """Whether all of them could go."""
        mapped = len(self._mapped)
        for digest in digests:
            if is_used(self.memory.object_path(digest)):
                self._mapped.add(digest)
                continue
            self.drop(self.memory, digest)
            self.evicted += 1
            point("evicted")
        return len(self._mapped) == mapped

    def mark_clean(self, digest: bytes) -> None:
        """The object of this digest is durable now."""
        if digest in self.memory.objects and digest not in self.clean:
            self.clean[digest] = self.memory.objects[digest]
            self.clean_bytes += self.clean[digest]

    def take_copies(self, durable: Mapping[bytes, int], dirty: Mapping[bytes, int], inherited: bool = False) -> None:
        """On opening: copies of known objects (digest -> bytes) stay; those of durable ones are clean, and in parking of no
        more use, unless `inherited`: then a kernel may have them open, which is seen later. Sizes are the index's (asking the
        filesystem for a hundred thousand costs a third of a second), but for large ones, which may have holes."""
        for digest in [d for d in self.memory.objects if d not in durable and d not in dirty]:
            self.drop(self.memory, digest)
        kept = self.parking.objects.keys() & durable.keys() if inherited else set[bytes]()
        self.parking.objects.update({digest: durable[digest] for digest in kept})
        self._opened_before |= kept
        for digest in [d for d in self.parking.objects if d not in dirty and d not in kept]:
            self.drop(self.parking, digest)
        self.clean = {digest: self._found_bytes(digest, durable[digest]) for digest in self.memory.objects if digest in durable}
        self.clean_bytes = sum(self.clean.values())
        self.memory.objects.update(self.clean)
        for tier in (self.memory, self.parking):
            tier.objects.update({digest: dirty[digest] for digest in tier.objects.keys() & dirty.keys()})
        self.policy.found(self.memory.objects)

    def _found_bytes(self, digest: bytes, size_bytes: int) -> int:
        return size_bytes if size_bytes < LARGE_BYTES else min(size_bytes, self.memory.allocated_bytes(digest))

    def drop(self, tier: FileTier, digest: bytes) -> None:
        """Remove one copy."""
        tier.drop(digest)
        for listener in self._listeners:
            listener.copy_dropped(tier, digest)
        if tier is self.memory:
            self._mapped.discard(digest)
            self.clean_bytes -= self.clean.pop(digest, 0)
            self.policy.forgotten(digest)

    def adopt(self, tier: FileTier, ino: int, digest: bytes, durable: bool) -> None:
        """The staged file of `ino` becomes a copy of the object. Nothing is copied."""
        tier.adopt(ino, digest)
        if tier is self.memory:
            self.policy.touched(digest)
            if durable:
                self.mark_clean(digest)

    def tidy_later(self) -> None:
        """tidy() for what has come since: deleted objects, and copies that somebody used the last time."""
        for digest in list(islice(self._mapped, LOOKED_AT)):
            if not is_used(self.memory.object_path(digest)):
                self._mapped.discard(digest)
        pending, self._opened_before = self.index.gone | self._opened_before, set()
        self.index.gone = set()
        if pending:
            self.tidy(list(pending))

    def drop_orphans(self, digest: bytes) -> None:
        """There is no object of this digest: a copy of one that is gone must not pass for the copy of a new one."""
        for tier in (self.memory, self.parking):
            if digest in tier.objects:
                self.drop(tier, digest)

    def tidy(self, digests: Sequence[bytes]) -> None:
        """Drop copies whose object is gone, and parked copies of durable objects, unless somebody uses them."""
        here = [digest for digest in digests if digest in self.memory.objects or digest in self.parking.objects]
        known = self.index.states(here)
        for tier in (self.memory, self.parking):
            for digest in here:
                if digest not in tier.objects or (digest in known and (tier is self.memory or not known[digest])):
                    continue
                if self.sources.of_object(digest) is not None or (digest in known and is_used(tier.object_path(digest))):
                    self._opened_before.add(digest)
                else:
                    self.drop(tier, digest)

    # --- cold -> memory

    def materialize(
        self, blocks: Sequence[Block], path: str, heal: bool = True, all_begun: Callable[[], None] | None = None
    ) -> None:
        """Write the verified bytes of blocks into a new file at `path`; zeros stay holes. In a thread. EIO when damaged: when
        there is no good copy, or at once where `heal` says not to look for one. `all_begun` is told when no block is left to
        begin, by any thread, perhaps more than once."""
        file_io.remove(path)
        fd = file_io.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            file_io.truncate(fd, sum(block.length for block in blocks))
            self._copy_blocks(blocks, fd, heal, all_begun)
        finally:
            os.close(fd)

    def _copy_blocks(self, blocks: Sequence[Block], fd: int, heal: bool, all_begun: Callable[[], None] | None) -> None:
        """Each block to its place, some at once; damaged ones, for which other threads may be asked, afterwards."""
        places = list(zip(accumulate((block.length for block in blocks), initial=0), blocks, strict=False))
        done = in_lanes(places, partial(self._copy_sound, fd, set[bytes](), Semaphore(AT_DISK)), all_begun)
        for offset, block in (place for place, sound in zip(places, done, strict=True) if not sound):
            if not heal:
                raise CorruptRecord(f"block {block.bid} is damaged")
            buffer, payload = self.healer.read(block)
            try:
                file_io.write_fully(fd, payload, offset)
            finally:
                payload.release()
                buffer.close()

    def _copy_sound(self, fd: int, holes: set[bytes], turn: Semaphore, place: tuple[int, Block]) -> bool:
        """Copy a block as it lies in its extent, many zeros as a hole; all zeros are read once. False: it is damaged."""
        offset, block = place
        if block.fingerprint in holes:
            return True
        if block.location is None:
            return False
        buffer = self.cold.buffers.take(record_bytes(block.length))
        try:
            with self.cold.read_into(buffer, block.location, block.fingerprint, turn=turn) as payload:
                gaps = hashing.zero_runs(payload, ALIGN)
                if not payload[0] and payload == bytes(len(payload)):
                    holes.add(block.fingerprint)
                elif sum(end - begin for begin, end in gaps) < len(payload) * EMPTY_SHARE:
                    file_io.write_fully(fd, payload, offset)
                else:
                    with self.memory.pages.small():
                        file_io.write_between(fd, payload, offset, gaps)
        except CorruptRecord:
            return False
        finally:
            self.cold.buffers.give(buffer)
        return True

    def needed_bytes(self, found: Object) -> int:
        """What materialize() takes for an object at most: blocks of zeros take nothing."""
        if found.size_bytes <= self.index.block_bytes:
            return found.size_bytes
        return self.index.bytes_besides(found.oid, prints_of_zeros(found, self.index.step(found.oid), self.cold.secret))

    async def promote(self, found: Object) -> bool:
        """Bring a durable object to memory; False when it does not fit. While it is on its way for somebody else, wait."""
        while (other := self.under_way.get(found.digest)) is not None:
            await other.ended.wait()
            if self.holder(found.digest) is not None:
                return True  # else the other one failed, who perhaps needed it less
        if not decisions.may_promote(self.memory_state(), found.size_bytes):  # who reads holes by a mapping fills them
            return False
        self.make_room(self.needed_bytes(found))
        return await self.bring(found, heal=True) or self.holder(found.digest) is not None

    async def disk_is_asked(self) -> None:
        """Return when the disk has been asked for everything that is on its way."""
        while (asked := next((each.asked for each in self.under_way.values() if not each.asked.is_set()), None)) is not None:
            await asked.wait()

    async def bring(self, found: Object, heal: bool) -> bool:
        """The copying of a promotion, and its end. False: memory has no room, the object is no more, has a copy by now, or is
        on its way already: two at once would each take away what the other's waiters wait for."""
        if found.digest in self.under_way:
            return False
        promotion = self.under_way[found.digest] = Promotion()
        all_begun = partial(trio.lowlevel.current_trio_token().run_sync_soon, promotion.asked.set, idempotent=True)
        self._promotions += 1
        path = f"{self.memory.object_path(found.digest)}.{self._promotions}"
        try:
            await trio.to_thread.run_sync(partial(self.materialize, self.index.blocks(found.oid), path, heal, all_begun))
            point("promoted")
            return self._place(found, path)
        except BaseException as e:
            with contextlib.suppress(OSError):
                file_io.remove(path)
            if isinstance(e, OSError) and e.errno in NO_ROOM_OR_GONE:
                return False  # memory is fuller than we knew, or not there: the reader is served from the extents
            raise
        finally:
            del self.under_way[found.digest]
            promotion.ended.set()
            promotion.asked.set()

    def _place(self, found: Object, path: str) -> bool:
        """Make a file the copy of an object, unless that went meanwhile, or has a copy by now."""
        now = self.index.find(found.digest)
        if now is None or not now.durable or self.holder(found.digest) is not None:
            file_io.remove(path)
            return False
        self.memory.place_object(path, found.digest)
        self.policy.touched(found.digest)
        self.mark_clean(found.digest)
        self.cold_reads += 1
        return True
