"""A whole store: its parts put together, and the library's own door to it (put, get) without a mount.

Owns: the composition, opening and closing. Does not know FUSE. Invariant: a Store that could be constructed is consistent
(recovery.py has run) and holds the lock of its folder until close().
"""

import errno
import hashlib
import logging
import math
import os
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import trio

from cascadefs.config import Settings
from cascadefs.contents.files import Files
from cascadefs.contents.open_files import Handle
from cascadefs.contents.outgrown import Outgrown
from cascadefs.contents.streams import Streams
from cascadefs.contents.watcher import Nobody, Watcher
from cascadefs.errors import GONE, StoreError, os_error
from cascadefs.formats.name_ring import NameRing
from cascadefs.integrity.loss import Loss
from cascadefs.integrity.recovery import enter_pending, recover
from cascadefs.integrity.verifier import Verifier
from cascadefs.media import file_io
from cascadefs.metadata.namespace import ROOT
from cascadefs.metadata.objects import Index
from cascadefs.metadata.sqlite import Database
from cascadefs.placement.policies.lru import Lru
from cascadefs.placement.residency import NO_ROOM, Residency
from cascadefs.placement.sources import Sources
from cascadefs.tiers.extents import ColdTier
from cascadefs.tiers.owner import Claim
from cascadefs.tiers.parking import Parking
from cascadefs.tiers.shm import ShmTier, drop_folder
from cascadefs.types import Inode
from cascadefs.writeback.mover import Mover
from cascadefs.writeback.sealing import Sealer

ADDRESS_DIGITS = 32  # the public address is this much of the SHA-256, as the ancestor had it
FORGET_S = 0.5  # what was removed a moment ago frees space when the kernel forgets it
log = logging.getLogger(__name__)


class Store:
    """Open it, run `run()` in a nursery, use it in the same trio thread, `await flush()`, `close()`."""

    def __init__(
        self,
        settings: Settings,
        claim_fd: int | None = None,
        keep_orphans: bool = False,
        first_ino: int = 0,
        adrift: Mapping[int, int] | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        """Raises StoreError when the folder is no store, in use, or of another format; nothing is touched then.

        claim_fd: the lock that another process holds for this one. keep_orphans: a kernel may still use files without a name.
        first_ino: lower numbers may be known to that kernel for inodes that are gone. adrift: descriptors of staged files that
        had lost their names when an earlier worker died, by inode. watcher: who serves the files to a kernel.
        """
        self.settings = settings
        self.keeps_memory_s: float | None = None  # instead of the setting
        try:
            self.database = Database(settings.store, claim_fd)
            try:
                self._put_together(keep_orphans, first_ino, adrift or {}, watcher or Nobody())
            except BaseException:
                self.database.close()
                raise
        except OSError as e:
            raise StoreError(f"the store {settings.store} cannot be opened: {e}; see to its disk and mount again") from e
        self.namespace, self.index = self.files.namespace, self.residency.index
        self.sealer, self.outgrown = Sealer(self.files), Outgrown(self.files)
        self.loss = Loss(self.files, self.ring)
        self.mover = Mover(self.files, self.sealer, self.loss.look)
        self.streams = Streams(self.files)
        self.verifier = Verifier(self.files, self.mover)

    def _put_together(self, keep_orphans: bool, first_ino: int, adrift: Mapping[int, int], watcher: Watcher) -> None:
        settings, identity = self.settings, self.database.identity
        index = Index(self.database)
        memory = ShmTier(self._claim_memory(index, keep_orphans), settings.shm_size)
        if shortage := memory.shortage():
            memory.claim.notes.append(shortage)
            log.warning("%s", shortage)
        parking = Parking(settings.store / "parking")
        cold = ColdTier(settings.store / "extents", identity.store_id, identity.secret)
        file_io.sync_folder(settings.store)  # names of index.db, its WAL and extents/: a synced WAL without a name is lost
        self.residency = Residency(index, memory, parking, cold, Lru(), Sources(watcher), self._paths_of_block)
        self.files = Files(settings, self.database, self.residency, watcher, first_ino)
        for ino, fd in adrift.items():
            self.files.adrift.keep(ino, fd)
        self.ring = NameRing(memory.folder)
        self.pending = self.ring.pending(self.ring.put)  # just before everything, or an earlier worker of a mount, died
        self.database.reserve.lend(partial(enter_pending, self.files, self.ring, self.pending))
        if not keep_orphans:  # else the mount settles them, when it knows their handles
            self.ring.settle(self.ring.put)
        self.recovered = self.database.reserve.lend(partial(recover, self.files, keep_orphans))
        self.database.reserve.fill()

    def _claim_memory(self, index: Index, goes_on: bool) -> Claim:
        """The memory tier of this copy of the store. `goes_on`: a mount lives that has it."""
        settings = self.settings
        claim = Claim(settings.store, settings.shm_dir, self.database.identity.store_id)
        old = claim.folder
        if claim.is_elsewhere and not goes_on:
            if self._needs_memory(index):
                claim.notes.append(f"the memory tier stays at {old}: it holds what is not durable, until a flush and umount")
            else:
                claim.begin_anew()
        self.database.reserve.lend(claim.take_over if goes_on else claim.announce)
        if claim.folder != old:
            drop_folder(old)
        for note in claim.notes:
            log.warning("%s", note)
        return claim

    def _needs_memory(self, index: Index) -> bool:
        """Whether anything is only in memory, or in parking."""
        return bool(index.dirty(1) or index.staged_inodes())

    async def run(self) -> None:
        """Seal, flush, evict, read ahead, and verify when asked, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.mover.run)
            nursery.start_soon(self.files.read_ahead.run)
            nursery.start_soon(self.streams.run)
            nursery.start_soon(self.verifier.run)

    async def flush(self) -> None:
        """Everything closed before is durable in the cold tier afterwards."""
        self.loss.look(count=True)
        try:
            await self.mover.flush_all()
        except GONE:  # it was emptied meanwhile
            self.loss.suspected = True
            self.loss.look(count=True)
            await self.mover.flush_all()
        except OSError as e:
            if e.errno != errno.ENOSPC:
                raise
            await trio.sleep(FORGET_S)
            await self.mover.flush_all()

    def close(self) -> None:
        """Close the database and release the lock. What is not flushed stays in memory and is found by the next opening."""
        with suppress(OSError):  # copies that stay are dropped by the next opening
            self.residency.tidy_later()
        self.mover.journal.close()
        is_durable = self._is_durable()
        self.ring.close()
        memory = self.residency.memory
        memory.claim.leave(memory.folder, is_durable, self.keep_until())
        memory.stop_watching()
        memory.claim.close()
        self.database.close()

    def keep_until(self) -> float:
        """time.time() at which the memory tier may go; 0: never by itself."""
        return 0 if math.isinf(self.keep_s) else time.time() + self.keep_s

    @property
    def keep_s(self) -> float:
        """How long the memory tier is kept after a close."""
        return self.settings.keep_memory if self.keeps_memory_s is None else self.keeps_memory_s

    def _is_durable(self) -> bool:
        """Whether the extents have all that memory has."""
        try:
            return not self._needs_memory(self.index) and not self.ring.pending(self.ring.put)
        except OSError:
            return False  # an index that cannot be read

    def release_memory(self) -> None:
        """Give the memory tier back. Only after flush() and when nothing is open."""
        if self._needs_memory(self.index):
            log.warning("the memory tier is kept: it holds what is not yet durable")
            return
        self.residency.memory.release()

    # --- the library's door

    def find(self, path: str) -> Inode:
        """The inode at a path such as "a/b"; ENOENT when there is none."""
        inode = self.namespace.get(ROOT)
        for part in path.strip("/").split("/"):
            found = self.namespace.lookup(inode.ino, os.fsencode(part))
            if found is None:
                raise os_error(errno.ENOENT, path)
            inode = found
        return inode

    async def put(self, path: str, data: bytes) -> None:
        """Write a whole file; its folder must exist. Replaces what was there, for readers at once."""
        handle, staged = await self.open_empty(path)
        try:
            try:
                await trio.to_thread.run_sync(file_io.write_whole, staged, (data,))
            except OSError as e:
                await trio.to_thread.run_sync(file_io.write_whole, await self.place_with_room(handle, e), (data,))
        finally:
            self.files.release(handle)

    async def place_with_room(self, handle: Handle, refusal: OSError) -> str:
        """Where a file goes on that was refused where open_empty() said; raises `refusal` when there is no better place."""
        if refusal.errno not in NO_ROOM:
            raise refusal
        async with self.files.of(handle.ino).lock:
            if not await self.outgrown.move(handle.ino):
                raise refusal
        return self.files.staged_path(self.namespace.get(handle.ino))

    async def open_empty(self, path: str) -> tuple[Handle, str]:
        """A file with no bytes at `path`, made or emptied; its folder must exist. The bytes are to be written to the second,
        a path of this machine, until the handle is given to `files.release`."""
        folder, _, name = path.strip("/").rpartition("/")
        parent = self.find(folder).ino if folder else ROOT
        known = self.namespace.lookup(parent, os.fsencode(name))
        if known is None:
            home = self.residency.home_for_new()
            mode = stat.S_IFREG | 0o644
            make = partial(self.namespace.make, parent, os.fsencode(name), mode, os.getuid(), os.getgid(), home=home)
            _, handle = self.files.create(make)
        else:
            handle = await self.files.open(known.ino, writable=True, truncate=True)
        return handle, self.files.staged_path(self.namespace.get(handle.ino))

    async def get(self, path: str) -> bytes:
        """The bytes of a whole file."""
        inode = self.files.attributes(self.find(path).ino)
        handle = await self.files.open(inode.ino, writable=False)
        try:
            return await self.streams.read(inode.ino, 0, inode.size)
        finally:
            self.files.release(handle)

    async def get_into(self, path: str, *buffers: memoryview) -> int:
        """Fill writable buffers of bytes, one behind the other, from the beginning of a file; how many bytes there were. They
        may be used again when this returns: also after an error, which leaves them half filled."""
        handle = await self.open_to_read(path)
        try:
            if handle.source is not None:
                return await trio.to_thread.run_sync(file_io.read_whole, handle.source.fd, buffers)
            return await self.stream_into(handle, *buffers)
        finally:
            self.files.release(handle)

    async def open_to_read(self, path: str) -> Handle:
        """Its `source`, if it has one, is a file of these bytes; else stream_into(). To be given to `files.release`."""
        return await self.files.open(self.find(path).ino, writable=False)

    async def stream_into(self, handle: Handle, *buffers: memoryview) -> int:
        """As get_into(), from the extents."""
        done = 0
        for buffer in buffers:
            for at in range(0, len(buffer), self.index.block_bytes):
                part = await self.streams.read(handle.ino, done, min(self.index.block_bytes, len(buffer) - at))
                buffer[at : at + len(part)] = part
                done += len(part)
        return done

    def remove(self, path: str) -> None:
        """Take a name away, and what only it kept; ENOENT, EISDIR."""
        folder, _, name = path.strip("/").rpartition("/")
        gone = self.namespace.unlink(self.find(folder).ino if folder else ROOT, os.fsencode(name))
        self.files.forget_if_gone(gone.ino)

    # --- what is known of one file

    def _paths_of_block(self, bid: int) -> list[str]:
        return sorted({path for ino in self.index.owners(bid) for path in self.namespace.paths(ino)})

    async def address(self, oid: int) -> str:
        """The public address of an object; computed once, then remembered."""
        known = self.index.sha256(oid)
        if known is None:
            digest, size = hashlib.sha256(), self.index.object(oid).size_bytes
            for offset in range(0, size, self.index.block_bytes):
                part = await self.streams.read_object(oid, offset, min(self.index.block_bytes, size - offset))
                await trio.to_thread.run_sync(partial(digest.update, part))
            known = digest.hexdigest()[:ADDRESS_DIGITS]
            self.index.remember_sha256(oid, known)
        return known

    def tier(self, inode: Inode) -> str:
        """Where the next reader finds the bytes: shm or cold."""
        if inode.home:
            return "shm" if self.residency.tier_of(inode.home) is self.residency.memory else "cold"
        if inode.oid is None:
            return "shm"
        return "shm" if self.index.object(inode.oid).digest in self.residency.memory.objects else "cold"

    async def info(self, ino: int) -> dict[str, Any]:
        """What `cascadefs info` shows. A staged file without writers is sealed first, so that it has a hash."""
        await self.sealer.seal(ino)
        inode = self.files.attributes(ino)
        blocks = self.index.blocks(inode.oid) if inode.oid is not None else []
        found = self.index.object(inode.oid) if inode.oid is not None else None
        return {
            "inode": ino,
            "size_bytes": inode.size,
            "state": "staged" if inode.home else "object" if found else "empty",
            "tier": self.tier(inode),
            "hash": found.digest.hex() if found else None,
            "sha256": await self.address(found.oid) if found else None,
            "durable": found.durable if found else not inode.home,
            "blocks": len(blocks),
            "extents": sorted({block.location.extent for block in blocks if block.location}),
            "references": len(self.index.inodes_of(found.oid)) if found else 0,
        }
