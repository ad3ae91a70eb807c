"""Staged bytes become an object: lease, block fingerprints, dedup confirmed by bytes, adoption; snapshots for fsync.

Owns: the transition staged -> object. Invariants:
(1) A file is sealed only when it is at most FILE_BYTES_MAX long and the lease says that no writable descriptor and no
    writable mapping of it exists.
(2) Two contents share an object only if their bytes were compared, or the object has no copy in memory and its 128-bit
    keyed fingerprints are equal.
(3) A snapshot shows the file as it was at some moment after fsync() began for every byte written before it.
(4) Files are sealed many at a time, but each as if alone: under the lock of its inode, or as long as it is in
    `Files.unchanged` (single_pass.py). What fails with one, or because they are many, leaves the others sealed.
"""

import errno
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import trio

from cascadefs.config import FILE_BYTES_MAX, MIB
from cascadefs.contents.files import Files, changed_ns
from cascadefs.contents.open_files import Live
from cascadefs.crash import point
from cascadefs.errors import os_error
from cascadefs.ext import hashing
from cascadefs.media import file_io
from cascadefs.media.descriptors import ROUND, share
from cascadefs.metadata.bulk import NewObject, Shown, Waiting
from cascadefs.metadata.objects import digest_of
from cascadefs.placement.decisions import goes_straight, may_seal
from cascadefs.tiers.folder import FileTier
from cascadefs.types import EMPTY_OID, Block, Home, Inode, Object, Print
from cascadefs.writeback.fingerprints import Examiner, Staged

DOMAIN_BITS = 8  # of a digest's salt, below the domain
SALTS = 8  # two different contents of one fingerprint have never been seen; eight at once will not be
RETRY_S = 0.25  # a mapping that outlives close(2) is looked at this often
INLINE_BYTES = 64 << 10  # read and hashed in 15 us; handing it to a thread would cost the control thread more
# Of one batch. A writer that opens one of its files waits for all of it: 4 ms.
BATCH_FILES, BATCH_BYTES = 64, 16 * MIB
SCANNED = 1024  # of those that wait, each time: looking at 20,000 every 10 ms took a tenth of the worker's time
ORPHAN_MODE = 0o100600


@dataclass(frozen=True, slots=True)
class Content:
    """What a staged file turned out to hold: digest, its blocks' prints, the object if it is known already."""

    digest: bytes
    size_bytes: int
    prints: list[Print]
    known: Object | None
    domain: int


@dataclass(slots=True)
class Outcome:
    """Of sealing several files. `busy` have writers, now or before we were done: try again later. `sealed` are no longer
    staged, for whatever reason. With the others something went wrong: `error` is the first of it."""

    sealed: set[int] = field(default_factory=set)
    busy: set[int] = field(default_factory=set)
    sealed_bytes: int = 0  # to be flushed
    error: OSError | None = None

    def failed(self, e: OSError) -> None:
        """Remember the first."""
        self.error = self.error or e


Straightened = Callable[[Sequence[int], Outcome], Awaitable[None]]


class Sealer:
    """Seals staged files of one store."""

    def __init__(self, files: Files) -> None:
        self.files, self.index, self.residency = files, files.index, files.residency
        identity = files.database.identity
        self.examiner = Examiner(identity.block_bytes, identity.secret, files.residency.cold.buffers)
        self.unasked = files.settings.seal == "auto"  # what was closed is sealed in the background

    async def seal(self, ino: int) -> bool:
        """Turn a staged file into an object. False: it has writers, now or before we were done; try again later."""
        outcome = Outcome()
        await self.seal_batch((ino,), outcome)
        if outcome.error is not None:
            raise outcome.error
        return ino not in outcome.busy

    def batches(self, inos: Sequence[int]) -> Iterator[list[int]]:
        """In groups of at most BATCH_FILES and about BATCH_BYTES; what is read is as of the moment a group is asked for."""
        most = share(BATCH_FILES, ROUND)
        for at in range(0, len(inos), most):
            group, total = list[int](), 0
            found = self.files.bulk.staged(inos[at : at + most])
            for ino in inos[at : at + most]:
                size = self._staged_bytes(found[ino]) if ino in found else 0
                if group and total + size > BATCH_BYTES:
                    yield group
                    group, total = [], 0
                group.append(ino)
                total += size
            if group:
                yield group

    async def seal_batch(self, inos: Sequence[int], outcome: Outcome) -> None:
        """Seal these; tells `outcome` what became of each. One whose lock somebody has waits for it after the others."""
        held, later = await self._lock(inos)
        try:
            await self._seal_held(held, outcome)
        finally:
            for live in held:
                live.lock.release()
            for live in held:
                if live.ino in outcome.sealed:
                    self.files.to_seal.pop(live.ino, None)
                self.files.forget_if_gone(live.ino)
        for ino in later:
            await self.seal_batch((ino,), outcome)

    async def _lock(self, inos: Sequence[int]) -> tuple[list[Live], list[int]]:
        """(those whose lock we have now, those whose lock is taken). Nobody waits for a lock who holds another."""
        if len(inos) == 1:
            live = self.files.of(inos[0])
            try:
                await live.acquire()
            except BaseException:
                self.files.forget_if_gone(live.ino)
                raise
            return [live], []
        held, later = list[Live](), list[int]()
        for live in map(self.files.of, inos):
            if live.is_locked:
                later.append(live.ino)
            else:
                live.lock.acquire_nowait()
                held.append(live)
        return held, later

    async def _seal_held(self, held: Sequence[Live], outcome: Outcome) -> None:
        batch = list(self._candidates(held, outcome))
        try:
            await self._examine(batch)
            self.recall_empty(batch)
            fresh, twins = self.told_apart(batch, outcome)
            self.show_fresh(fresh, outcome, nothing_more)
            for one in twins:
                await self._seal_twin(one, outcome)
        finally:
            for one in batch:
                one.close()

    def _candidates(self, held: Sequence[Live], outcome: Outcome) -> Iterator[Staged]:
        found = self.files.bulk.staged([live.ino for live in held])
        for live in held:
            if live.ino not in found:
                outcome.sealed.add(live.ino)
            elif live.writers or live.ino in self.files.adrift:
                outcome.busy.add(live.ino)
            else:
                inode = found[live.ino]
                yield Staged(live, self.residency.tier_of(inode.home), self.domain(inode))

    async def _examine(self, batch: Sequence[Staged]) -> None:
        if len(batch) == 1 and self._is_small(batch[0]):
            self.examiner.examine(batch)
        elif batch:
            await trio.to_thread.run_sync(self.examiner.examine, batch)

    def _is_small(self, one: Staged) -> bool:
        found = self.files.bulk.staged((one.ino,)).get(one.ino)
        return found is not None and found.home == Home.MEMORY and self._staged_bytes(found) <= INLINE_BYTES

    def _staged_bytes(self, inode: Waiting) -> int:
        """0 when there is no staged file: trouble, if it is some, will be met again."""
        with suppress(OSError):
            return os.lstat(self.residency.tier_of(inode.home).staged_path(inode.ino)).st_size
        return 0

    def _waiting_bytes(self, inos: Sequence[int]) -> int:
        return sum(map(self._staged_bytes, self.files.bulk.staged(inos).values()))

    def recall_empty(self, batch: Sequence[Staged]) -> None:
        """Their files become nothing that a reader could hold."""
        empty = [one for one in batch if one.fd >= 0 and not one.is_busy and not one.size_bytes]
        try:
            self.files.watcher.recall(*(one.ino for one in empty))
            for one in empty:
                one.is_busy = self.files.of(one.ino).source is not None
        except OSError as e:
            for one in empty:
                one.error = e

    def told_apart(self, batch: Sequence[Staged], outcome: Outcome) -> tuple[list[Staged], list[Staged]]:
        """(those whose content is new, those whose bytes must be compared with others first)."""
        readable = list[Staged]()
        for one in batch:
            if one.error is not None:
                outcome.failed(one.error)
            elif one.is_busy:
                outcome.busy.add(one.ino)
            else:
                one.digest = digest_of(one.size_bytes, (f for f, _ in one.prints), one.domain << DOMAIN_BITS)
                readable.append(one)
        point("hashed")
        seen = self.files.bulk.known([one.digest for one in readable])
        fresh, twins = list[Staged](), list[Staged]()
        for one in readable:
            (twins if one.digest in seen else fresh).append(one)
            if one.size_bytes:
                seen.add(one.digest)
        return fresh, twins

    # --- contents that are new

    def show_fresh(self, fresh: Sequence[Staged], outcome: Outcome, more: Callable[[Sequence[Staged]], None]) -> None:
        """In one transaction, of which `more` is the end. One that the index refuses is tried again file by file: a smaller
        change may go through."""
        adopted = [one for one in fresh if self._adopted(one, outcome)]
        try:
            self._show(adopted, more)
        except BaseException as e:
            for one in adopted:  # else a later file of these bytes would share a file that this inode goes on writing to
                self.residency.drop(one.tier, one.digest)
            if not isinstance(e, OSError):
                raise
            if len(adopted) == 1:
                outcome.failed(e)
                return
            for one in adopted:
                self.show_fresh((one,), outcome, more)
            return
        point("sealed")
        outcome.sealed.update(one.ino for one in adopted)
        outcome.sealed_bytes += sum(one.size_bytes for one in adopted)
        try:
            self._finish([(one.live, one.tier, one.digest if one.size_bytes else None) for one in adopted])
        except OSError as e:
            outcome.failed(e)

    def _adopted(self, one: Staged, outcome: Outcome) -> bool:
        """Whether the file has the name of its object now."""
        if self.files.sources.of_object(one.digest) is not None:
            outcome.busy.add(one.ino)  # of an object that is gone, and whose readers have still to go
            return False
        try:
            self.residency.drop_orphans(one.digest)
            if one.size_bytes:
                self.files.owners.adopt(one.tier, one.ino, one.digest)
                point("adopted")
        except OSError as e:
            outcome.failed(e)
            return False
        return True

    def _show(self, batch: Sequence[Staged], more: Callable[[Sequence[Staged]], None]) -> None:
        """The transaction. No await since the adoption; attributes are read again, because chmod and utimens do not wait for
        the lock."""
        if not batch:
            return
        now = self.files.bulk.staged([one.ino for one in batch])
        shown = list[Shown]()
        for one in batch:
            found = now.get(one.ino) or self.files.namespace.get(one.ino)  # it lost its last name meanwhile
            mtime_ns, ctime_ns, blocks = _attributes(found, os.fstat(one.fd), one.size_bytes)
            content = NewObject(one.digest, one.size_bytes, one.prints, one.domain == 0)
            shown.append(Shown(one.ino, content, mtime_ns, ctime_ns, blocks))
        with self.files.database.transaction():
            self.files.dead += self.files.bulk.show(shown)
            more(batch)

    def _finish(self, sealed: Sequence[tuple[Live, FileTier, bytes | None]]) -> None:
        """The rows say so: readers' sources and staged names follow. The digest is of the object that the file became, if it
        did. OSError at the end: a name that stays is removed at the next opening."""
        errors = list[OSError]()
        for live, tier, digest in sealed:
            if digest is not None and (source := self.files.sources.of(live.ino)) is not None:
                self.files.sources.turn(source, digest)
            try:
                tier.drop_staged(live.ino)
            except OSError as e:
                errors.append(e)
            self.files.watcher.sealed(live.ino)
        self.files.work.ring()
        if errors:
            raise errors[0]

    # --- contents that are known

    async def _seal_twin(self, one: Staged, outcome: Outcome) -> None:
        """An object of these fingerprints exists, or comes before it in the batch."""
        try:
            content = await self.content(one.fd, one.size_bytes, one.prints, one.domain)
        except OSError as e:
            outcome.failed(e)
        else:
            self.show_twin(one, content, outcome)

    def show_twin(self, one: Staged, content: Content, outcome: Outcome) -> None:
        """No await since `content` was found."""
        try:
            self.files.watcher.recall(one.ino)
        except OSError as e:
            outcome.failed(e)
            return
        if content.known is not None and self.index.find_oid(content.known.oid) is None:
            outcome.busy.add(one.ino)  # its last file has gone: recall() hears of what was closed
            return
        try:
            self._show_object(one.live, one.tier, one.fd, content)
        except OSError as e:
            outcome.failed(e)
        else:
            outcome.sealed.add(one.ino)

    def domain(self, inode: Inode | Waiting) -> int:
        """Contents are shared inside a domain only: 0 is the whole store; else what one user stores tells others nothing."""
        kind = self.files.settings.dedup
        return 0 if kind == "store" else 1 + inode.uid if kind == "user" else (1 << 33) + inode.ino

    async def content(self, fd: int, size_bytes: int, prints: list[Print], domain: int) -> Content:
        """The object of the same bytes, confirmed by comparing where a copy is at hand."""
        for salt in range(domain << DOMAIN_BITS, (domain << DOMAIN_BITS) + SALTS):
            digest = digest_of(size_bytes, (fingerprint for fingerprint, _ in prints), salt)
            if self.index.find(digest) is None or await self._same_bytes(fd, digest, size_bytes):
                return Content(digest, size_bytes, prints, self.index.find(digest), domain)
        raise os_error(errno.EIO, "too many contents with one fingerprint")

    async def _same_bytes(self, fd: int, digest: bytes, size_bytes: int) -> bool:
        tier = self.residency.holder(digest)
        if tier is None:
            return True
        copy = tier.open_object(digest)
        try:
            same = await trio.to_thread.run_sync(partial(hashing.equal, fd, 0, copy, 0, size_bytes, bytearray(1 << 20)))
            return same or not tier.is_copy(copy, digest)  # it was opened for writing: nothing was compared
        except OSError:
            if os.fstat(fd).st_size < size_bytes:
                return False  # its writer has cut it meanwhile: what was read of it is a content of its own
            if tier.is_copy(copy, digest):
                raise
            return True
        finally:
            os.close(copy)

    def _show_object(self, live: Live, tier: FileTier, fd: int, content: Content) -> None:
        """As _show(), for one content that may be known. A file that is used and whose content has a copy is kept as its
        inode's own."""
        files, owners, ino = self.files, self.files.owners, live.ino
        adopted = kept = False
        mtime_ns, ctime_ns, blocks = _attributes(files.namespace.get(ino), os.fstat(fd), content.size_bytes)
        if content.known is None:
            self.residency.drop_orphans(content.digest)
        else:
            owners.joined(content.known)
        if content.size_bytes and self.residency.holder(content.digest) is None:
            owners.adopt(tier, ino, content.digest, content.known)
            adopted = True
            point("adopted")
        elif content.size_bytes and self._is_used(ino, fd):
            owners.keep(tier, ino)
            kept = True
        try:
            with files.database.transaction():
                if content.known is None:
                    new = NewObject(content.digest, content.size_bytes, content.prints, content.domain == 0)
                    files.dead += files.bulk.show([Shown(ino, new, mtime_ns, ctime_ns, blocks)])
                else:
                    files.dead += self.index.set_content(ino, Home.NONE, content.known.oid, content.size_bytes)
                    files.namespace.update(ino, mtime_ns=mtime_ns, ctime_ns=ctime_ns, blocks=blocks)
        except BaseException:
            if adopted:  # else a later file of these bytes would share a file that this inode goes on writing to
                self.residency.drop(tier, content.digest)
            if kept:
                owners.gone(ino, None)
            raise
        point("sealed")
        self._finish([(live, tier, content.digest if adopted else None)])

    def _is_used(self, ino: int, fd: int) -> bool:
        """Whether somebody has the staged file open, or mapped, beside us."""
        return self.files.sources.of(ino) is not None or not file_io.is_only_opener(fd)

    def matches(self, fd: int, blocks: Sequence[Block]) -> bool:
        """Whether a file still holds these blocks. Blocks: in a thread."""
        size_bytes = sum(block.length for block in blocks)
        expected = [(block.fingerprint, block.length) for block in blocks]
        try:
            return os.fstat(fd).st_size == size_bytes and self.examiner.fingerprints(fd, size_bytes) == expected
        except OSError:
            return False  # it became shorter meanwhile, or cannot be read

    # --- fsync of a file that has writers

    async def snapshot(self, ino: int) -> int | None:
        """Copy a staged file to an object held by a nameless inode; returns that inode's number. None: nothing to hold.

        The caller makes the object durable, then calls settle(). A crash in between leaves an orphan: recovery deletes it.
        """
        inode = self.files.namespace.get(ino)
        if not inode.home:
            return None
        if self.files.attributes(ino).size > FILE_BYTES_MAX:
            raise os_error(errno.EFBIG, f"inode {ino}")
        namespace = self.files.namespace
        holder = namespace.make_holder(ORPHAN_MODE, self.residency.home_for_new())
        source = self.files.open_staged(inode)
        live = self.files.of(holder.ino)
        try:
            async with live.lock:
                home = await self.files.fill_staged(holder.ino, partial(self.residency.memory.copy_in, source))
                if home != holder.home:
                    namespace.update(holder.ino, home=home)
                    holder = namespace.get(holder.ino)
                tier = self.residency.tier_of(home)
                fd = file_io.open_file(tier.staged_path(holder.ino), os.O_RDONLY)
                try:
                    size = os.fstat(fd).st_size
                    prints = await trio.to_thread.run_sync(self.examiner.fingerprints, fd, size)
                    content = await self.content(fd, size, prints, self.domain(inode))
                    self._show_object(live, tier, fd, content)
                finally:
                    os.close(fd)
        except BaseException:
            self.files.forget_if_gone(holder.ino)
            raise
        finally:
            os.close(source)
        return holder.ino

    def settle(self, ino: int, holder: int) -> None:
        """The snapshot is durable: it becomes what `ino` falls back to, and its holder goes."""
        files = self.files
        found = files.namespace.get(holder)
        with files.database.transaction():
            files.dead += self.index.set_fallback(ino, EMPTY_OID if found.oid is None else found.oid)
            now = files.namespace.find(ino)
            if now is not None and now.home:
                files.namespace.update(ino, size=files.with_staged(now).size)
        files.forget_if_gone(holder)

    def due(self, now: float, limit: int) -> list[int]:
        """Inodes whose time to be sealed has come, by the scheduler's rule. At most `limit`."""
        pressed, quiet = self.residency.under_pressure(), self.files.quiet_s(now)
        if not pressed and not self.unasked:
            return []
        waiting = islice(self.files.to_seal.items(), SCANNED)  # the oldest are first
        chosen = (i for i, at in waiting if may_seal(pressed, self.unasked, now - at, quiet))
        return list(islice(chosen, limit))

    async def seal_due(self, straight: Straightened, limit: int = BATCH_FILES) -> int:
        """Seal what is due, as much as `straight` can do by that; returns how many. What still has writers is tried again later
        (a close by a writer, or RETRY_S)."""
        outcome = Outcome()
        due = self.due(time.monotonic(), limit) if self.files.to_seal else []
        for ino in due:
            del self.files.to_seal[ino]
        try:
            if goes_straight(self._waiting_bytes(due)):
                await straight(due, outcome)
            for batch in self.batches([ino for ino in due if ino not in outcome.sealed]):
                await self.seal_batch(batch, outcome)
        finally:  # also after an error of the medium
            self._try_again(set(due) - outcome.sealed)
        if outcome.error is not None:
            raise outcome.error
        return len(outcome.sealed)

    def _try_again(self, inos: Iterable[int]) -> None:
        """Those with writers come back when the last has left."""
        at = time.monotonic() + RETRY_S
        for ino in inos:
            if (live := self.files.live.get(ino)) is None or not live.writers:
                self.files.to_seal.setdefault(ino, at)


def nothing_more(shown: Sequence[Staged]) -> None:
    """Where sealing is all."""


def _attributes(inode: Inode | Waiting, state: os.stat_result, size_bytes: int) -> tuple[int, int, int]:
    """(mtime, ctime, blocks) of an inode whose staged file is in that state, once it is sealed."""
    blocks = min(state.st_blocks, -(-size_bytes // 4096) * 8)  # without what a huge page adds
    return state.st_mtime_ns, changed_ns(inode, state.st_mtime_ns), blocks
