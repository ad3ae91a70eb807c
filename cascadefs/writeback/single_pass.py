"""Staged files that nobody writes to become objects in the open extent in one pass: each byte is read once, hashed, written.

Owns: one pass. packer.py moves the bytes, sealing.py makes objects of what was read, the mover flushes the rest. Invariants:
(1) No lock of an inode is held while bytes move. Whoever may change one takes it out of `Files.unchanged`: what is not there
    any more at the end is left for sealing. So is what has holes, or is longer than an extent: rounds keep what they have done.
    One run at a time: a second would put in again what a writer took out, and read what the first has read.
(2) Order: records, fdatasync, one transaction: objects, their places, who shows them. Before it no index knows of a record.
    What nothing needed in the end is dead.
"""

import os
from collections.abc import Iterator, Sequence

import trio

from cascadefs.contents.files import Files
from cascadefs.crash import point
from cascadefs.errors import UnreadableCopy
from cascadefs.locks import take
from cascadefs.media.descriptors import ROUND, share
from cascadefs.tiers.packer import Capture, Subject
from cascadefs.types import Location, Print
from cascadefs.writeback.extent_log import OpenExtent
from cascadefs.writeback.fingerprints import Staged
from cascadefs.writeback.sealing import Outcome, Sealer

FILES = 512  # open at once


class Straight:
    """Of one store."""

    def __init__(self, files: Files, sealer: Sealer, extent: OpenExtent) -> None:
        self._files, self._sealer, self._extent = files, sealer, extent
        self._turn = trio.Lock()

    async def run(self, inos: Sequence[int], limit_bytes: int, outcome: Outcome) -> None:
        """Make durable what can be, some `limit_bytes` at a time; `outcome.sealed` tells which. The index is not synced yet."""
        async with self._turn:
            some = share(FILES, ROUND)
            for at in range(0, len(inos), some):
                await self._run_some(inos[at : at + some], limit_bytes, outcome)

    async def _run_some(self, inos: Sequence[int], limit_bytes: int, outcome: Outcome) -> None:
        opened, total = list[Staged](), 0
        try:
            for one in self._opened(inos):
                opened.append(one)
                total += one.size_bytes
                if total >= limit_bytes:
                    await self._show_twins(await self._pass(opened, outcome), outcome)
                    self._let_go(opened, outcome)
                    total = 0
            await self._show_twins(await self._pass(opened, outcome), outcome)
        finally:
            self._let_go(opened, outcome)

    def _opened(self, inos: Sequence[int]) -> Iterator[Staged]:
        """Those that are staged and have no writer; busy: those that are too long, have holes, or may have writers yet."""
        files = self._files
        found = files.bulk.staged(inos)
        for ino in inos:
            live = files.of(ino)
            if ino not in found or live.writers or live.is_locked:
                files.forget_if_gone(ino)
                continue
            one = Staged(live, files.residency.tier_of(found[ino].home), self._sealer.domain(found[ino]))
            files.unchanged.add(ino)
            try:
                self._sealer.examiner.open(one)
                one.is_busy |= one.size_bytes > files.settings.extent_size or os.fstat(one.fd).st_blocks * 512 < one.size_bytes
            except OSError:
                one.is_busy = True  # sealing will say why
            yield one

    def _let_go(self, opened: list[Staged], outcome: Outcome) -> None:
        for one in opened:
            one.close()
            self._files.unchanged.discard(one.ino)
            if one.ino in outcome.sealed:
                self._files.to_seal.pop(one.ino, None)
            self._files.forget_if_gone(one.ino)
        opened.clear()

    async def _pass(self, opened: Sequence[Staged], outcome: Outcome) -> list[Staged]:
        """Returns those whose contents are known: they are to be compared."""
        batch, twins = [one for one in opened if not one.is_busy], list[Staged]()
        if not batch:
            return twins
        await take(self._extent.lock)
        try:
            number, position = await self._extent.tail()
            subjects = self._subjects(batch)
            end = await self._written(subjects, number, position)
            if end is not None:
                point("appended")
                twins = self._commit(list(zip(batch, subjects, strict=True)), number, end, outcome)
                if self._files.index.open_extent() == (number, end):
                    await self._extent.seal_if_full(number, end)
        finally:
            self._extent.lock.release()
        return twins

    def _subjects(self, batch: Sequence[Staged]) -> list[Subject]:
        shared: dict[Print, Location] = {}
        return [Subject(one.fd, one.size_bytes, not one.domain, {} if one.domain else shared) for one in batch]

    async def _written(self, subjects: Sequence[Subject], number: int, position: int) -> int | None:
        """The new end; None when one of them cannot be read: sealing will say which."""
        files, health = self._files, self._files.database.health

        def lacking(prints: Sequence[Print]) -> set[Print]:
            return trio.from_thread.run_sync(files.bulk.lacking, prints)

        capture = Capture(files.residency.cold, files.index.block_bytes, number, position, lacking)
        try:
            end = await trio.to_thread.run_sync(capture.run, subjects, None)
        except UnreadableCopy:
            return None
        except OSError as e:
            health.failed("cold tier", e)
            raise
        health.worked("cold tier")
        return end

    def _commit(self, batch: Sequence[tuple[Staged, Subject]], number: int, end: int, outcome: Outcome) -> list[Staged]:
        """No await: what is unchanged now is so when the transaction ends. Returns those whose contents are known."""
        files, places = self._files, {one.ino: subject.places for one, subject in batch}
        shared = {id(found): found for found in places.values()}  # of many files it is one
        unused = {at for found in shared.values() for at in found.values()}

        def place(shown: Sequence[Staged]) -> None:
            numbers = files.bulk.numbers([one.digest for one in shown])
            found = {numbers[one.digest]: one for one in shown if one.digest in numbers}
            placed = files.bulk.place_captured({oid: places[one.ino] for oid, one in found.items()}, number, end)
            files.dead += placed.dead
            unused.difference_update(placed.used)
            self._extent.placed.update({found[oid].digest: None for oid in placed.durable})

        for one, subject in batch:
            one.prints = subject.prints
        self._sealer.recall_empty([one for one, _ in batch])
        fresh, twins = self._sealer.told_apart(list(self._unchanged([one for one, _ in batch])), outcome)
        self._sealer.show_fresh(fresh, outcome, place)
        if files.index.open_extent() == (number, end):  # else the next append begins where this one did
            files.dead += unused
        return twins

    async def _show_twins(self, twins: Sequence[Staged], outcome: Outcome) -> None:
        """Contents that are known, as far as their bytes are those of the object and nobody has changed them meanwhile."""
        for one in twins:
            try:
                content = await self._sealer.content(one.fd, one.size_bytes, one.prints, one.domain)
                self._files.watcher.recall(one.ino)  # now: it tells of closed files, too
            except OSError:
                continue  # sealing will say why
            for still in self._unchanged((one,)):
                self._sealer.show_twin(still, content, outcome)

    def _unchanged(self, batch: Sequence[Staged]) -> Iterator[Staged]:
        """Those that are as they were read. Their running state may be another by now: who closes a file drops it."""
        staged = self._files.bulk.staged([one.ino for one in batch])
        for one in batch:
            one.live = self._files.of(one.ino)
            if one.ino in self._files.unchanged and one.ino in staged and not one.live.is_locked:
                yield one
