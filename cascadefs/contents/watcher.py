"""Who serves the files of an open store to a kernel, as the store sees it: one listener, given to the store.

Owns: the contract, and Nobody for programs without a mount. All calls come in the trio thread and none awaits: what takes time
is noted and done later.
"""

from collections.abc import Sequence
from typing import Protocol

from cascadefs.contents.written import Range
from cascadefs.placement.sources import Holder, NoHolder, Source


class Watcher(Holder, Protocol):
    """Told what becomes of files that a kernel may know; asked what only their server sees."""

    # --- told

    def sealed(self, ino: int) -> None:
        """An inode shows an object in memory now."""

    def left_stream(self, ino: int) -> None:
        """An inode that handles stream has a staged file now."""

    def deleting(self, ino: int) -> None:
        """An inode without name and user is about to be deleted."""

    def recall(self, *inos: int) -> None:
        """From now on nobody opens these inodes without the store's knowing, and who did is known. OSError: not now."""

    def memory_lost(self) -> None:
        """Somebody has emptied the memory tier: what is held there for later is of no use."""

    def fell_back(self, ino: int, names: Sequence[tuple[int, bytes]]) -> None:
        """An inode lost its last version with the memory, and these names in these folders."""

    # --- asked

    def pads(self) -> bool:
        """Whether staged files may have blocks that were allocated ahead of their writers."""

    def is_updated(self, ino: int, source: Source | None) -> bool:
        """Whether the first writer of an inode, who opens it as it is, is served so that every write is seen."""

    def sees_writes(self, ino: int) -> bool:
        """Forget what was written to a file so far, and note from now on. False: not every write to it is seen."""

    def take_written(self, ino: int) -> Sequence[Range] | None:
        """What was written since the last call of this kind; ranges may overlap. None: that is not known. A write is noted
        after its bytes are there and before its writer goes on."""

    def lose_written(self, ino: int) -> None:
        """The file was changed in a way that is no write: take_written() will not know."""

    def end_written(self, ino: int) -> None:
        """Nobody writes to the file any more."""


class Nobody(NoHolder):
    """A store without a mount: its writers use descriptors that nobody sees."""

    def sealed(self, ino: int) -> None:
        pass

    def left_stream(self, ino: int) -> None:
        pass

    def deleting(self, ino: int) -> None:
        pass

    def recall(self, *inos: int) -> None:
        pass

    def memory_lost(self) -> None:
        pass

    def fell_back(self, ino: int, names: Sequence[tuple[int, bytes]]) -> None:
        pass

    def pads(self) -> bool:
        return False

    def is_updated(self, ino: int, source: Source | None) -> bool:
        return False

    def sees_writes(self, ino: int) -> bool:
        return False

    def take_written(self, ino: int) -> Sequence[Range] | None:
        return None

    def lose_written(self, ino: int) -> None:
        pass

    def end_written(self, ino: int) -> None:
        pass
