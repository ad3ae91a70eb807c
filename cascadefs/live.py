"""What is open right now: sources (backing files, one for each inode) and live inodes (handles and how they may be served).

Owns: descriptors of backing files and their counts. Knows no index and no tier. Never awaits. Invariants:
(1) A source is closed exactly when its last user let go; `closing` runs just before (the mount drops its backing id there).
(2) While an inode has a source, every open of it uses that source: kernel passthrough allows no other.
(3) A source serves one inode. Its `digest` is that of the object whose copy it is; None while the file is the inode's alone:
    staged, or private (owners.py).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import trio

from cascadefs.written import Kept


async def take(lock: trio.Lock) -> None:
    """Acquire a lock; without a turn of the scheduler when it is free, as it nearly always is."""
    try:
        lock.acquire_nowait()
    except trio.WouldBlock:
        await lock.acquire()


@dataclass(eq=False, slots=True)
class Source:
    """An open backing file. `fd` is read-only and belongs to this object; `backing_id` is the mount's to use."""

    ino: int
    fd: int
    digest: bytes | None = None
    users: int = 0
    backing_id: int = 0


@dataclass(eq=False, slots=True)
class Handle:
    """One open(2) of a file. `source` is None when the bytes are streamed from extents (or there are none).

    `direct`: the kernel must neither cache nor pass through, because other handles of the inode are served that way.
    """

    ino: int
    writable: bool
    source: Source | None
    direct: bool


@dataclass(eq=False, slots=True)
class Live:
    """The running state of one inode: numbers of its handles by kind and of its syncs, and the lock of its transitions."""

    ino: int
    source: Source | None = None
    handles: int = 0
    writers: int = 0
    directs: int = 0
    sourced: int = 0
    syncs: int = 0  # of its staged bytes, while somebody writes
    kept: Kept | None = None  # of its durable version, while somebody writes
    _lock: trio.Lock | None = None  # made when first taken: most files are created, written and closed without

    @property
    def lock(self) -> trio.Lock:
        """Held by whoever moves the inode's content from one state to another."""
        if self._lock is None:
            self._lock = trio.Lock()
        return self._lock

    @property
    def is_locked(self) -> bool:
        """Whether a transition is under way."""
        return self._lock is not None and self._lock.locked()

    async def acquire(self) -> None:
        """Take the lock."""
        await take(self.lock)

    def enter(self, source: Source | None, writable: bool, direct: bool | None = None) -> Handle:
        """Count a new handle; `source` already counts it as a user. `direct` is given when the kernel has it already."""
        handle = Handle(self.ino, writable, source, (source is None or self.directs > 0) if direct is None else direct)
        self.handles += 1
        self.writers += writable
        self.directs += handle.direct
        self.sourced += source is not None
        self.source = source or self.source
        return handle

    def leave(self, handle: Handle) -> None:
        """The reverse of enter(); the caller releases the source."""
        self.handles -= 1
        self.writers -= handle.writable
        self.directs -= handle.direct
        self.sourced -= handle.source is not None
        if not self.sourced:
            self.source = None


class Sources:
    """All open backing files, by inode."""

    def __init__(self) -> None:
        self._of: dict[int, Source] = {}
        self._of_object: dict[bytes, Source] = {}
        self.closing: Callable[[Source], None] = lambda source: None
        self.leaving: Callable[[Source], None] = lambda source: None  # before that; the inode still has it

    def __len__(self) -> int:
        return len(self._of)

    def of(self, ino: int) -> Source | None:
        """The source of an inode, if open."""
        return self._of.get(ino)

    def of_object(self, digest: bytes) -> Source | None:
        """The source that is the copy of an object, if open."""
        return self._of_object.get(digest)

    def open_objects(self) -> set[bytes]:
        """Digests of the objects whose copies somebody has open."""
        return set(self._of_object)

    def share(self, source: Source) -> Source:
        """One more user."""
        source.users += 1
        return source

    def take(self, ino: int, open_fd: Callable[[], int], digest: bytes | None = None) -> Source:
        """The source of an inode with one more user; opened when it is not."""
        source = self._of.get(ino)
        if source is None:
            source = self._of[ino] = Source(ino, open_fd())
            self.turn(source, digest)
        return self.share(source)

    def release(self, source: Source) -> None:
        """One user less; closes after the last."""
        source.users -= 1
        if source.users:
            return
        self.leaving(source)
        self.turn(source, None)
        del self._of[source.ino]
        self.closing(source)
        os.close(source.fd)

    def turn(self, source: Source, digest: bytes | None) -> None:
        """The file is the copy of an object now, or the inode's alone; its users keep it."""
        if source.digest is not None and self._of_object.get(source.digest) is source:
            del self._of_object[source.digest]
        source.digest = digest
        if digest is not None:
            self._of_object[digest] = source
