"""Which contents have a whole copy where: the memory tier and the parking folder, promotion, eviction.

Owns: the two file tiers, the policy, the set of clean copies. Knows objects, not inodes. Invariants:
(1) `clean` holds exactly the copies in memory whose object is durable in the cold tier: only they may be evicted.
(2) A copy that somebody has open is not dropped: its memory would not come back, and its next open would find nothing.
(3) The bytes that promote() puts into memory were verified block by block.
"""

import contextlib
import os
from collections.abc import Sequence
from functools import partial

import trio

from cascadefs import scheduler
from cascadefs.index import Index
from cascadefs.live import Sources
from cascadefs.policies import EvictionPolicy
from cascadefs.scheduler import MemoryState
from cascadefs.tiers.cold import ColdTier
from cascadefs.tiers.files import FileTier
from cascadefs.tiers.shm import ShmTier
from cascadefs.types import Block, Home, Object


class Residency:
    """Copies of objects in memory and in parking. Methods run in the trio thread; bytes move in worker threads."""

    def __init__(
        self, index: Index, memory: ShmTier, parking: FileTier, cold: ColdTier, policy: EvictionPolicy, sources: Sources
    ) -> None:
        self.index, self.memory, self.parking, self.cold = index, memory, parking, cold
        self.policy, self.sources = policy, sources
        self.clean: dict[bytes, int] = {}
        self.clean_bytes = self.hits = self.misses = self.cold_reads = self.evicted = 0
        self._promotions = 0
        self._opened_before: set[bytes] = set()

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
        pinned = self.sources.open_objects()
        evictable = self.clean_bytes - sum(self.clean.get(digest, 0) for digest in pinned)
        return MemoryState(self.memory.capacity_bytes, self.memory.used_bytes(), self.clean, pinned, evictable)

    def home_for_new(self) -> Home:
        """Where the next staged file goes."""
        fits = scheduler.stage_in_memory(self.memory.capacity_bytes, self.memory.used_bytes())
        return Home.MEMORY if fits else Home.COLD

    def under_pressure(self) -> bool:
        """Whether memory is above the high watermark."""
        return self.memory.used_bytes() > self.memory.capacity_bytes * scheduler.HIGH

    def make_room(self, wanted_bytes: int = 0) -> None:
        """Evict clean copies as the policy and the scheduler say."""
        if self.memory.used_bytes() + wanted_bytes <= self.memory.capacity_bytes * scheduler.HIGH:
            return
        for digest in scheduler.plan_eviction(self.memory_state(), self.policy.victims(), wanted_bytes):
            self.drop(self.memory, digest)
            self.evicted += 1

    def mark_clean(self, digest: bytes) -> None:
        """The object of this digest is durable now."""
        if digest in self.memory.objects and digest not in self.clean:
            self.clean[digest] = self.memory.objects[digest]
            self.clean_bytes += self.clean[digest]

    def drop(self, tier: FileTier, digest: bytes) -> None:
        """Remove one copy."""
        tier.drop(digest)
        if tier is self.memory:
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
        """tidy() for what has come since: deleted objects, and copies that somebody had open the last time."""
        pending, self._opened_before = self.index.gone | self._opened_before, set()
        self.index.gone = set()
        if pending:
            self.tidy(list(pending))

    def drop_orphans(self, digest: bytes) -> None:
        """There is no object of this digest: a copy of one that is gone must not pass for the copy of a new one."""
        for tier in (self.memory, self.parking):
            if digest in tier.objects:
                self.drop(tier, digest)

    def tidy(self, digests: Sequence[bytes] | None = None) -> None:
        """Drop copies whose object is gone, and parked copies of durable objects, unless somebody has them open."""
        opened = self.sources.open_objects()
        for tier in (self.memory, self.parking):
            for digest in list(tier.objects) if digests is None else digests:
                if digest not in tier.objects:
                    continue
                if digest in opened:
                    self._opened_before.add(digest)
                    continue
                found = self.index.find(digest)
                if found is None or (found.durable and tier is self.parking):
                    self.drop(tier, digest)

    # --- cold -> memory

    def materialize(self, blocks: Sequence[Block], path: str) -> None:
        """Write the verified bytes of blocks into a new file at `path`; zeros stay holes. In a thread. EIO when damaged."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            offset, holes = 0, set[bytes]()
            for block in blocks:
                if block.fingerprint not in holes and not self._copy_block(block, fd, offset):
                    holes.add(block.fingerprint)
                offset += block.length
            os.ftruncate(fd, offset)
        finally:
            os.close(fd)

    def _copy_block(self, block: Block, fd: int, offset: int) -> bool:
        """False, and nothing written, when the block is all zeros."""
        assert block.location is not None
        buffer, payload = self.cold.read(block.location, block.fingerprint)
        try:
            if not payload[0] and payload == bytes(block.length):
                return False
            done = 0
            while done < block.length:
                done += os.pwrite(fd, payload[done:], offset + done)
            return True
        finally:
            payload.release()
            buffer.close()

    async def promote(self, found: Object) -> bool:
        """Bring a durable object to memory; False when it does not fit. Two at once for one object are harmless."""
        if not scheduler.may_promote(self.memory_state(), found.size_bytes):
            return False
        self.make_room(found.size_bytes)
        self._promotions += 1
        path = f"{self.memory.object_path(found.digest)}.{self._promotions}"
        try:
            await trio.to_thread.run_sync(partial(self.materialize, self.index.blocks(found.oid), path))
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            raise
        if self.holder(found.digest) is None:
            self.memory.place_object(path, found.digest)
            self.policy.touched(found.digest)
            self.mark_clean(found.digest)
        else:
            os.unlink(path)
        self.cold_reads += 1
        return True
