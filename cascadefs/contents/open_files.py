"""Files that are open right now: handles, and how those of one inode may be served.

Owns: counts of handles, the lock of each inode. Knows no index, no tier and no descriptor. Invariant: an inode whose bytes move
from one state to another is locked; waiting for that lock is the only await.
"""

from dataclasses import dataclass

import trio

from cascadefs.contents.written import Kept
from cascadefs.locks import take
from cascadefs.placement.sources import Source


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
