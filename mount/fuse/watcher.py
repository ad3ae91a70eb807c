"""What an open store tells of its files goes to the part of the mount that it concerns.

Owns: which part that is. The store is opened before the mount has any parts: until begin(), and after end(), it is as without a
mount.
"""

from collections.abc import Sequence

from cascadefs.contents.watcher import Nobody
from cascadefs.contents.written import Range
from cascadefs.mount.fuse import lost_memory
from cascadefs.mount.fuse.catch_up import Answered
from cascadefs.placement.sources import Source


class MountWatcher(Nobody):
    """Of one mount. The contract is contents/watcher.py's."""

    def __init__(self) -> None:
        self._mount: Answered | None = None

    def begin(self, mount: Answered) -> None:
        """The parts are there."""
        self._mount = mount

    def end(self) -> None:
        """The kernel has forgotten the mount."""
        self._mount = None

    # --- told

    def source_closes(self, source: Source) -> None:
        if self._mount is not None:
            self._mount.handles.source_closes(source)

    def let_go(self, ino: int) -> None:
        if self._mount is not None:
            self._mount.grants.let_go(ino)

    def memory_is_short(self) -> None:
        if self._mount is not None:
            self._mount.grants.memory_is_short()

    def sealed(self, ino: int) -> None:
        if self._mount is not None:
            self._mount.grants.sealed(ino)

    def left_stream(self, ino: int) -> None:
        if self._mount is not None:
            self._mount.handles.follow(ino)

    def deleting(self, ino: int) -> None:
        if self._mount is not None:
            self._mount.grants.end_deleted(ino)

    def recall(self, *inos: int) -> None:
        if self._mount is not None:
            self._mount.grants.end(*inos)

    def memory_lost(self) -> None:
        if self._mount is not None:
            lost_memory.let_go(self._mount)

    def fell_back(self, ino: int, names: Sequence[tuple[int, bytes]]) -> None:
        if self._mount is not None:
            lost_memory.tell_kernel(self._mount, ino, names)

    # --- asked

    def pads(self) -> bool:
        return self._mount is not None and self._mount.transport.pads()

    def is_updated(self, ino: int, source: Source | None) -> bool:
        return self._mount is not None and self._mount.seen.is_updated(ino, source)

    def sees_writes(self, ino: int) -> bool:
        return self._mount is not None and self._mount.seen.begin(ino)

    def take_written(self, ino: int) -> Sequence[Range] | None:
        return self._mount.transport.take_written(ino) if self._mount is not None else None

    def lose_written(self, ino: int) -> None:
        if self._mount is not None:
            self._mount.transport.lose_written(ino)

    def end_written(self, ino: int) -> None:
        if self._mount is not None:
            self._mount.transport.end_written(ino)
