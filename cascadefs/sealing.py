"""Staged bytes become an object: lease, block fingerprints, dedup confirmed by bytes, adoption; snapshots for fsync.

Owns: the transition staged -> object. Invariants:
(1) A file is sealed only when it is at most FILE_BYTES_MAX long and the lease says that no writable descriptor and no
    writable mapping of it exists.
(2) Two contents share an object only if their bytes were compared, or the object has no copy in memory and its 128-bit
    keyed fingerprints are equal.
(3) A snapshot shows the file as it was at some moment after fsync() began for every byte written before it.
"""

import errno
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import trio

from cascadefs import media
from cascadefs.config import FILE_BYTES_MAX
from cascadefs.crash import point
from cascadefs.errors import os_error
from cascadefs.ext import hashing
from cascadefs.files import Files, changed_ns
from cascadefs.index import digest_of
from cascadefs.live import Live
from cascadefs.scheduler import may_seal
from cascadefs.tiers.files import FileTier
from cascadefs.types import EMPTY_OID, Block, Home, Inode, Object

DOMAIN_BITS = 8  # of a digest's salt, below the domain
SALTS = 8  # two different contents of one fingerprint have never been seen; eight at once will not be
RETRY_S = 0.25  # a mapping that outlives close(2) is looked at this often
INLINE_BYTES = 64 << 10  # read and hashed in 15 us; handing it to a thread would cost the control thread more
ORPHAN_MODE = 0o100600
Print = tuple[bytes, int]  # fingerprint and length of a block


@dataclass(frozen=True, slots=True)
class Content:
    """What a staged file turned out to hold: digest, its blocks' prints, the object if it is known already."""

    digest: bytes
    size_bytes: int
    prints: list[Print]
    known: Object | None
    domain: int


class Sealer:
    """Seals staged files of one store, one at a time for each inode."""

    def __init__(self, files: Files) -> None:
        self.files, self.index, self.residency = files, files.index, files.residency
        self.secret = files.database.identity.secret
        self.unasked = files.settings.seal == "auto"  # what was closed is sealed in the background

    async def seal(self, ino: int) -> bool:
        """Turn a staged file into an object. False: it has writers, now or before we were done; try again later."""
        live = self.files.of(ino)
        try:
            async with live.lock:
                inode = self.files.namespace.find(ino)
                if inode is None or not inode.home or inode.nlink == 0:
                    return True
                return not live.writers and await self._seal_locked(live, inode)
        finally:
            self.files.forget_if_gone(ino)

    async def _seal_locked(self, live: Live, inode: Inode) -> bool:
        tier = self.residency.tier_of(inode.home)
        fd = media.open_file(tier.staged_path(inode.ino), os.O_RDONLY)
        try:
            state = os.fstat(fd)
            if state.st_size > FILE_BYTES_MAX or not media.lease_is_free(fd):
                return False
            if live.source is not None and not state.st_size:
                return False  # nothing is no object: its readers would be left with a file that no writer knows
            point("leased")
            content = await self._content(fd, state.st_size, tier is self.residency.memory, self._domain(inode))
            point("hashed")
            if live.source is not None and self.residency.holder(content.digest) is not None:
                return False  # its readers hold this very file: the double goes when they have closed it
            self._show_object(live, inode.ino, tier, fd, content)
        finally:
            os.close(fd)
        return True

    def _domain(self, inode: Inode) -> int:
        """Contents are shared inside a domain only: 0 is the whole store; else what one user stores tells others nothing."""
        return {"store": 0, "user": 1 + inode.uid, "off": (1 << 33) + inode.ino}[self.files.settings.dedup]

    async def _content(self, fd: int, size_bytes: int, in_memory: bool, domain: int) -> Content:
        """Fingerprints of the blocks, and the object of the same bytes, confirmed by comparing where a copy is at hand."""
        if in_memory and size_bytes <= INLINE_BYTES:
            prints = self._fingerprints(fd, size_bytes)
        else:
            prints = await trio.to_thread.run_sync(self._fingerprints, fd, size_bytes)
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
            return same or self.residency.holder(digest) is None  # the copy was opened for writing: nothing was compared
        except OSError:
            if self.residency.holder(digest) is not None:
                raise
            return True
        finally:
            os.close(copy)

    def _fingerprints(self, fd: int, size_bytes: int) -> list[Print]:
        """(fingerprint, length) of each block; whole holes are not read. Blocks: in a thread."""
        step = self.index.block_bytes
        buffer, result = memoryview(bytearray(min(step, size_bytes) or 1)), list[Print]()
        zeros: dict[int, bytes] = {}
        data_from = -1
        for offset in range(0, size_bytes, step):
            length = min(step, size_bytes - offset)
            if data_from < offset:
                data_from = _next_data(fd, offset, size_bytes)
            if data_from >= offset + length:
                if length not in zeros:
                    zeros[length] = hashing.fingerprint(bytes(length), self.secret)
                result.append((zeros[length], length))
            else:
                result.append((hashing.read_fingerprint(fd, offset, buffer[:length], self.secret), length))
        return result

    def _show_object(self, live: Live, ino: int, tier: FileTier, fd: int, content: Content) -> None:
        """The transaction of sealing, and the names of the file around it. No await: nothing changes in between. Attributes are
        read again, because chmod and utimens do not wait for the lock."""
        files, adopted = self.files, False
        inode, state = files.namespace.get(ino), os.fstat(fd)
        if content.known is None:
            self.residency.drop_orphans(content.digest)
        if content.size_bytes and self.residency.holder(content.digest) is None:
            self.residency.adopt(tier, inode.ino, content.digest, bool(content.known and content.known.durable))
            adopted = True
            point("adopted")
        try:
            with files.database.transaction():
                oid = self._object_of(content).oid if content.size_bytes else None
                keep = oid is not None
                files.dead += self.index.set_content(inode.ino, Home.NONE, oid, content.size_bytes, keep_fallback=keep)
                changed = changed_ns(inode, state.st_mtime_ns)
                blocks = min(state.st_blocks, -(-content.size_bytes // 4096) * 8)  # without what a huge page adds
                files.namespace.update(inode.ino, mtime_ns=state.st_mtime_ns, ctime_ns=changed, blocks=blocks)
        except BaseException:
            if adopted:  # else a later file of these bytes would share a file that this inode goes on writing to
                self.residency.drop(tier, content.digest)
            raise
        point("sealed")
        tier.drop_staged(inode.ino)
        if live.source is not None and adopted:
            files.sources.rename(live.source, ("object", content.digest))
        files.wake()
        files.sealed(inode.ino)

    def _object_of(self, content: Content) -> Object:
        """The object of a content; its rows are made when it is new. Blocks that other objects hold are shared, but not
        with other domains: their objects share whole contents only."""
        if content.known is not None:
            return content.known
        parts = [(f, length, None if content.domain else self.index.find_block(f, length)) for f, length in content.prints]
        return self.index.add(content.digest, content.size_bytes, parts)

    def matches(self, fd: int, blocks: Sequence[Block]) -> bool:
        """Whether a file still holds these blocks. Blocks: in a thread."""
        size_bytes = sum(block.length for block in blocks)
        expected = [(block.fingerprint, block.length) for block in blocks]
        try:
            return os.fstat(fd).st_size == size_bytes and self._fingerprints(fd, size_bytes) == expected
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
        source = media.open_file(self.files.staged_path(inode), os.O_RDONLY)
        live = self.files.of(holder.ino)
        try:
            async with live.lock:
                home = await self.files.fill_staged(holder.ino, partial(media.copy_file, source))
                if home != holder.home:
                    namespace.update(holder.ino, home=home)
                    holder = namespace.get(holder.ino)
                tier = self.residency.tier_of(home)
                fd = media.open_file(tier.staged_path(holder.ino), os.O_RDONLY)
                try:
                    state = os.fstat(fd)
                    self._show_object(
                        live, holder.ino, tier, fd, await self._content(fd, state.st_size, False, self._domain(inode))
                    )
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
        pressed, quiet = self.residency.under_pressure(), now - self.files.last_use
        if not pressed and not self.unasked:
            return []
        chosen = (i for i, at in self.files.to_seal.items() if may_seal(pressed, self.unasked, now - at, quiet))
        return list(islice(chosen, limit))

    async def seal_due(self, limit: int = 64) -> int:
        """Seal what is due; returns how many. What still has writers is tried again later (a close by a writer, or RETRY_S)."""
        done = 0
        for ino in self.due(time.monotonic(), limit) if self.files.to_seal else ():
            self.files.to_seal.pop(ino, None)
            sealed = False
            try:
                sealed = await self.seal(ino)
            finally:  # also after an error of the medium
                if not sealed and ((live := self.files.live.get(ino)) is None or not live.writers):
                    self.files.to_seal.setdefault(ino, time.monotonic() + RETRY_S)
            done += sealed
        return done


def _next_data(fd: int, offset: int, size_bytes: int) -> int:
    """Where the next data are; the size when only a hole follows."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as e:
        if e.errno == errno.ENXIO:
            return size_bytes
        raise
