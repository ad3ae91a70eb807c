"""What is known of the durable version of a file that is open for writing, and who sees the writes to it.

Owns: nothing; patches.py keeps it. Invariant: while `base` is set, the file differs from that version, with the patches of the
log on top, at most in what a Tracker has seen since the last sync, or in pages whose fingerprints are not those of `prints`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from cascadefs.tiers.patch_log import PatchLog

Range = tuple[int, int]  # offset and length


class Tracker(Protocol):
    """Sees which ranges of some files are written. A write is told before its writer goes on, after its bytes are there."""

    def begin(self, ino: int) -> bool:
        """Forget what was written so far. False: not every write to this file is seen."""

    def take(self, ino: int) -> Sequence[Range] | None:
        """What was written since begin() or the last call; they may overlap. None: that is not known."""

    def lose(self, ino: int) -> None:
        """The file was changed in a way that is no write: take() will not know."""

    def end(self, ino: int) -> None:
        """Nobody writes to the file any more."""


class Blind:
    """Where the kernel, or anybody with a descriptor, writes by itself."""

    def begin(self, ino: int) -> bool:
        return False

    def take(self, ino: int) -> Sequence[Range] | None:
        return None

    def lose(self, ino: int) -> None:
        pass

    def end(self, ino: int) -> None:
        pass


@dataclass(eq=False, slots=True)
class Kept:
    """Of one inode. `base`: the durable object, None: not known; `size_bytes` and `mtime_ns`: of the durable
    version, patches included."""

    base: int | None = None
    size_bytes: int = 0
    mtime_ns: int = 0
    log: PatchLog | None = None
    is_seen: bool = False  # by a tracker
    wants_prints: bool = False
    prints: bytearray | None = None  # 16 bytes for each page of the durable version
    lock: trio.Lock = field(default_factory=trio.Lock)
