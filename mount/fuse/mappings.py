"""Which staged files a program may change through a mapping: in passthrough the kernel tells nobody, so it must not keep their
times.

Owns: the inodes whose attributes every answer gives for no time at all (attributes.py `is_mapped`); each stat then asks, and is
answered from the staged file. Knows no names. Invariants: (1) An inode is among them before the answer to an open by which
somebody could map it for writing, and what the kernel kept is void by then. (2) It leaves when no handle writes to it
and the kernel grants the lease that no writable mapping lets it grant (file_io.py `lease_is_free`), or when it is sealed.
"""

import os
from collections.abc import Iterable

from cascadefs.contents.open_files import Handle
from cascadefs.media import file_io


class Mappings:
    """Of one mount."""

    def __init__(self) -> None:
        self._inodes: set[int] = set()

    def __contains__(self, ino: int) -> bool:
        return ino in self._inodes

    def among(self, inos: Iterable[int]) -> frozenset[int]:
        """Those of them that are."""
        return frozenset(self._inodes.intersection(inos)) if self._inodes else frozenset()

    def may_come(self, inos: Iterable[int]) -> bool:
        """Somebody opens them for reading and writing, or had them open in an earlier worker's time; whether that is news."""
        before = len(self._inodes)
        self._inodes.update(inos)
        return len(self._inodes) != before

    def closed(self, handle: Handle) -> bool:
        """The last handle that writes to the inode is being closed; whether no mapping outlives it."""
        if handle.ino not in self._inodes or handle.source is None or not file_io.lease_is_free(handle.source.fd):
            return False
        self._inodes.discard(handle.ino)
        return True

    def ended(self, ino: int) -> None:
        """The inode is sealed, or deleted."""
        self._inodes.discard(ino)


def can_map(flags: int) -> bool:
    """Whether a file that is opened with these flags can be mapped shared and writable."""
    return flags & os.O_ACCMODE == os.O_RDWR
