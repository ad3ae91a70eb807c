"""Which file serves an inode that shows an object: the object's copy, which serves one inode at a time, or a private one.

Owns: who has which copy, and the names <tier>/private/<ino>. Knows no handles, only sources.py, and no FUSE. So a writer
always takes its inode's own file over in place: its readers and mappings see what is written, no other inode's do. Invariants:
(1) A copy of an object is its owner's as long as the owner has a source or a mapping of it. In passthrough a mapping outlives
    its handle and nobody tells of it: then the kernel grants no write lease.
(2) An inode shows the object that it owns the copy of. One with a private file owns none.
(3) While several inodes show an object, the owner that uses its copy has a private name for that. So the names tell a later
    worker which file the kernel has for each inode; an object of one inode needs none.
(4) A private name goes soon after its file is used no more.
"""

import contextlib
import errno
import itertools
import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import trio

from cascadefs.errors import os_error
from cascadefs.media import file_io
from cascadefs.placement import decisions
from cascadefs.placement.residency import NO_ROOM, Residency
from cascadefs.placement.sources import Source
from cascadefs.tiers.folder import FileTier, is_used
from cascadefs.types import Object

T = TypeVar("T")
V = TypeVar("V")
TRIES = 4  # to copy what a writer takes over meanwhile
INLINE_BYTES = 128 << 10  # copied in 30 us, in which no thread would begin
LOOKED_AT = 64  # private names each time


class Owned(NamedTuple):
    """The copy of an object in a tier is this inode's."""

    ino: int
    tier: FileTier


class Owners:
    """Of one store. All methods run in the trio thread; bytes move in worker threads."""

    def __init__(self, residency: Residency) -> None:
        self._residency, self._index, self._sources = residency, residency.index, residency.sources
        self._owned: dict[bytes, Owned] = {}
        self._private: dict[int, FileTier] = {}
        self._named: dict[bytes, None] = {}  # objects whose owner has a private name for its copy
        self._inherited = False  # whether a kernel has files open or mapped that an earlier worker gave it
        self._numbers = itertools.count()
        residency.listen(self)

    def recover(self, inherited: bool) -> None:
        """On opening. `inherited`: a kernel uses what an earlier worker gave it; else no private file is of use."""
        self._inherited = inherited
        for tier in (self._residency.memory, self._residency.parking):
            for ino in tier.private():
                found = self._index.shown_by(ino) if inherited else None
                if found is None:
                    tier.drop_private(ino)
                elif found.digest in tier.objects and os.path.samefile(
                    tier.private_path(ino), tier.object_path(found.digest)
                ):
                    self._owned[found.digest], self._named[found.digest] = Owned(ino, tier), None
                else:
                    self._private[ino] = tier

    # --- readers

    def open(self, ino: int, found: Object, is_asked: bool = True) -> Source | None:
        """What serves an inode, with one more user. None: nothing that is here may. Not `is_asked`: nobody waits for it, so it
        is not worth a private file, and nobody else lets go."""
        if ino in self._private and not is_asked:
            return None
        return self._open(ino, found) if self._may_have(ino, found, is_asked) else None

    def inherit(self, ino: int, found: Object, is_certain: bool) -> Source | None:
        """The same for a handle of an earlier process, if the inode was served by a file then. That `is_certain` unless the
        handle may be a stream."""
        if is_certain or ino in self._private or self._owner_of(found) == ino:
            return self._open(ino, found)
        return None

    def _open(self, ino: int, found: Object) -> Source | None:
        if (private := self._private.get(ino)) is not None:
            return self._sources.take(ino, partial(file_io.open_file, private.private_path(ino), os.O_RDONLY))
        tier = self._residency.holder(found.digest)
        if tier is None:
            return None
        if not self._own(ino, found, tier):
            return None
        if tier is self._residency.memory:
            self._residency.policy.touched(found.digest)
        return self._sources.take(ino, partial(tier.open_object, found.digest), found.digest)

    def _may_have(self, ino: int, found: Object, is_asked: bool) -> bool:
        owner = self._owner_of(found)
        if ino in self._private or owner == ino:
            return True
        source = self._sources.of_object(found.digest)
        if source is not None and source.users > 1:
            return False  # it has a handle, whoever else keeps it open
        if owner is not None and is_asked:
            self._sources.holder.let_go(owner)
        tier = self._residency.holder(found.digest)
        return tier is not None and self._is_free(found, tier)

    def _owner_of(self, found: Object) -> int | None:
        if (owned := self._owned.get(found.digest)) is not None:
            return owned.ino
        inos = self._index.inodes_of(found.oid, 2) if self._inherited else []
        return inos[0] if len(inos) == 1 and inos[0] not in self._private else None

    def _is_free(self, found: Object, tier: FileTier) -> bool:
        return self._sources.of_object(found.digest) is None and not is_used(tier.object_path(found.digest))

    def _own(self, ino: int, found: Object, tier: FileTier) -> bool:
        """False: the tier has no room for a name."""
        before, shared = self._owned.get(found.digest), self._is_shared(found)
        if before is not None and before.ino == ino:
            return True
        if shared and not _has_room(partial(tier.link_private, found.digest, ino)):
            return False
        if before is not None:
            self._disown(before.ino, found.digest)
        self._owned[found.digest] = Owned(ino, tier)
        if shared:
            self._named[found.digest] = None
        return True

    def _name(self, digest: bytes) -> None:
        ino, tier = self._owned[digest]
        tier.link_private(digest, ino)
        self._named[digest] = None

    def _is_shared(self, found: Object) -> bool:
        return len(self._index.inodes_of(found.oid, 2)) > 1

    async def copy(self, ino: int, found: Object) -> Source | None:
        """A private file for an inode while another one uses the object's copy. None: memory is short, or writers come again
        and again. Holds the lock of the inode."""
        memory = self._residency.memory
        path = f"{memory.private_path(ino)}.new"
        for _ in range(TRIES):
            tier = self._residency.holder(found.digest)
            if tier is None or not decisions.may_promote(self._residency.memory_state(), found.size_bytes):
                return None
            self._residency.make_room(found.size_bytes)
            fd = tier.open_object(found.digest)
            try:
                if not await _copied(memory, fd, path):
                    return None
                if tier.is_copy(fd, found.digest):
                    file_io.rename(path, memory.private_path(ino))
                    self._private[ino] = memory
                    return self._open(ino, found)
            finally:
                os.close(fd)
            file_io.remove(path)
        return None

    def left(self, ino: int) -> None:
        """The last handle of an inode has been closed."""
        if ino in self._private and self._sources.of(ino) is None:
            self._drop_unused(ino)

    def tidy(self) -> None:
        """Private names go whose mappings have gone. A few are looked at, the others next time."""
        for ino in _next(self._private):
            if self._sources.of(ino) is None:
                self._drop_unused(ino)
        for digest in _next(self._named):
            ino, tier = self._owned[digest]
            if self._sources.of(ino) is None and not is_used(tier.object_path(digest)):
                self._disown(ino, digest)

    def _drop_unused(self, ino: int) -> None:
        tier = self._private[ino]
        if not is_used(tier.private_path(ino)):
            del self._private[ino]
            tier.drop_private(ino)

    # --- a writer comes

    async def hand_over(self, ino: int, found: Object, wants_bytes: bool) -> FileTier | None:
        """Give the staged name of an inode to the file that serves it; or, if it wants the bytes, to the object's copy when no
        other inode has a use for that. None: there is no such file. Holds the lock of the inode; after it has returned a tier,
        and the row says so, the caller calls handed_over() without an await."""
        if ino not in self._private:
            tier = self._residency.holder(found.digest)
            if tier is None or not (self._serves(ino, found, tier) or (wants_bytes and self._is_to_spare(found, tier))):
                return None
            if found.durable or not self._is_shared(found):
                tier.unadopt(found.digest, ino)
                return tier
            await self._part(ino, found, tier)
        private = self._private[ino]
        file_io.link(private.private_path(ino), private.staged_path(ino))
        return private

    def _is_to_spare(self, found: Object, tier: FileTier) -> bool:
        return not self._is_shared(found) and self._is_free(found, tier)

    def _serves(self, ino: int, found: Object, tier: FileTier) -> bool:
        """Whether a handle or a mapping of the inode uses the object's copy."""
        if (source := self._sources.of(ino)) is not None:
            return source.digest == found.digest
        return self._owner_of(found) == ino and is_used(tier.object_path(found.digest))

    async def _part(self, ino: int, found: Object, tier: FileTier) -> None:
        """The file that is the only copy of an object becomes its owner's private one; the other inodes that show the object
        get another copy first."""
        memory, parking = self._residency.memory, self._residency.parking
        tier.link_private(found.digest, ino)
        fd = tier.open_object(found.digest)
        try:
            for target in (memory, parking):
                path = f"{target.object_path(found.digest)}.{next(self._numbers)}-parted"
                if await _copied(target, fd, path):
                    break
            else:
                raise os_error(errno.ENOSPC, f"inode {ino}")
            if not tier.is_copy(fd, found.digest):  # the others have gone meanwhile, and the copy with them
                file_io.remove(path)
            else:
                target.place_object(path, found.digest)
        finally:
            os.close(fd)
        self._owned.pop(found.digest, None)
        self._named.pop(found.digest, None)
        self._private[ino] = tier
        if (source := self._sources.of(ino)) is not None:
            self._sources.turn(source, None)
        if target is not tier and found.digest in tier.objects:
            self._residency.drop(tier, found.digest)

    def handed_over(self, ino: int, found: Object, taken: FileTier | None) -> None:
        """The inode is staged; its file, if hand_over() found one, has no other name any more."""
        if (source := self._sources.of(ino)) is not None:
            self._sources.turn(source, None)
        if (private := self._private.pop(ino, None)) is not None:
            private.drop_private(ino)
        elif taken is not None:
            self._residency.drop(taken, found.digest)
        else:
            self._disown(ino, found.digest)

    # --- sealing, deletion, eviction

    def adopt(self, tier: FileTier, ino: int, digest: bytes, known: Object | None = None) -> None:
        """The staged file of an inode becomes the copy of an object; if that is `known`, others may show it, too."""
        self._residency.adopt(tier, ino, digest, bool(known and known.durable))
        self._owned[digest] = Owned(ino, tier)
        if known is not None and self._index.inodes_of(known.oid, 1):
            self._name(digest)

    def keep(self, tier: FileTier, ino: int) -> None:
        """The staged file of an inode, which somebody reads, becomes its private one: the object it is to show has a copy."""
        file_io.link(tier.staged_path(ino), tier.private_path(ino))
        self._private[ino] = tier

    def joined(self, found: Object) -> None:
        """One more inode is about to show an object."""
        tier, owner = self._residency.holder(found.digest), self._owner_of(found)
        if tier is not None and owner is not None and not self._is_shared(found):
            self._owned[found.digest] = Owned(owner, tier)
            self._name(found.digest)

    def gone(self, ino: int, digest: bytes | None) -> None:
        """An inode shows no object any more, and nobody uses it; `digest` is of the one that it showed."""
        if (private := self._private.pop(ino, None)) is not None:
            private.drop_private(ino)
        elif digest is not None:
            self._disown(ino, digest)

    def _disown(self, ino: int, digest: bytes) -> None:
        if (owned := self._owned.get(digest)) is not None and owned.ino == ino:
            del self._owned[digest]
            if digest in self._named:
                del self._named[digest]
                owned.tier.drop_private(ino)

    def copy_dropped(self, tier: FileTier, digest: bytes) -> None:
        """See CopyListener. Its second name would keep its memory."""
        if (owned := self._owned.get(digest)) is not None and owned.tier is tier:
            self._disown(owned.ino, digest)


def _has_room(work: Callable[[], None]) -> bool:
    """Whether what takes room in a tier could be done."""
    try:
        work()
    except OSError as e:
        if e.errno not in NO_ROOM:
            raise
        return False
    return True


def _next(names: dict[T, V]) -> list[T]:
    """The first of them, which are the last afterwards."""
    chosen = list(itertools.islice(names, LOOKED_AT))
    for name in chosen:
        names[name] = names.pop(name)
    return chosen


async def _copied(tier: FileTier, fd: int, path: str) -> bool:
    """Copy an open file to `path` in a tier. False: there is no room."""
    try:
        if os.fstat(fd).st_size <= INLINE_BYTES:
            tier.copy_in(fd, path)
        else:
            await trio.to_thread.run_sync(tier.copy_in, fd, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            file_io.remove(path)
        if isinstance(e, OSError) and e.errno in NO_ROOM:
            return False
        raise
    return True
