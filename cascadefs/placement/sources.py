"""Backing files that are open: one for each inode, whoever uses it.

Owns: their descriptors and counts. Knows no index and no tier. Never awaits. Invariants:
(1) A source is closed exactly when its last user let go; the holder hears of it just before (the mount drops its
    backing id there).
(2) While an inode has a source, every open of it uses that source: kernel passthrough allows no other.
(3) A source serves one inode. Its `digest` is that of the object whose copy it is; None while the file is the inode's alone:
    staged, or private (owners.py).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(eq=False, slots=True)
class Source:
    """An open backing file. `fd` is read-only and belongs to this object; `backing_id` is the mount's to use."""

    ino: int
    fd: int
    digest: bytes | None = None
    users: int = 0
    backing_id: int = 0


class Holder(Protocol):
    """Who has sources open for a kernel, also for later: while no program has the file open. Does not await."""

    def source_closes(self, source: Source) -> None:
        """Just before its descriptor is closed."""

    def let_go(self, ino: int) -> None:
        """End what is held open of an inode for later, if that can be now: its file may be for another one."""

    def memory_is_short(self) -> None:
        """What is held for later is in the way of eviction."""


class NoHolder:
    """Without a mount."""

    def source_closes(self, source: Source) -> None:
        pass

    def let_go(self, ino: int) -> None:
        pass

    def memory_is_short(self) -> None:
        pass


class Leaver(Protocol):
    """Hears of sources that have no user any more."""

    def source_leaves(self, source: Source) -> None:
        """Its inode still has it."""


class Sources:
    """All open backing files, by inode."""

    def __init__(self, holder: Holder) -> None:
        self.holder = holder
        self._of: dict[int, Source] = {}
        self._of_object: dict[bytes, Source] = {}
        self._leavers = list[Leaver]()

    def listen(self, leaver: Leaver) -> None:
        """Tell one more."""
        self._leavers.append(leaver)

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
        for leaver in self._leavers:
            leaver.source_leaves(source)
        self.turn(source, None)
        del self._of[source.ino]
        self.holder.source_closes(source)
        os.close(source.fd)

    def turn(self, source: Source, digest: bytes | None) -> None:
        """The file is the copy of an object now, or the inode's alone; its users keep it."""
        if source.digest is not None and self._of_object.get(source.digest) is source:
            del self._of_object[source.digest]
        source.digest = digest
        if digest is not None:
            self._of_object[digest] = source
