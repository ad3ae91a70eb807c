"""Files in memory that are open for writing and have gaps: while there is one, the memory tier gives small
pages (tiers/pages.py).

Owns: which inodes those are. Knows no handle: files.py tells of opens, of new lengths, and when the last writer
has left. Never awaits.
"""

import os

from cascadefs.errors import GONE
from cascadefs.media import file_io
from cascadefs.tiers.folder import FileTier
from cascadefs.tiers.pages import PageSizes


class Gaps:
    """Of one memory tier."""

    def __init__(self, memory: FileTier, pages: PageSizes) -> None:
        self._memory, self._pages = memory, pages
        self._inos: set[int] = set()

    def look(self, ino: int) -> None:
        """An inode with a staged file in memory has a writer, or a new length."""
        try:
            state = os.lstat(self._memory.staged_path(ino))
        except GONE:
            self.forget(ino)
            return
        if file_io.has_gaps(state):
            self._inos.add(ino)
            self._pages.want_small(ino)
        else:
            self.forget(ino)

    def forget(self, ino: int) -> None:
        """It has no writer any more."""
        if ino in self._inos:
            self._inos.remove(ino)
            self._pages.enough(ino)

    def look_again(self) -> None:
        """Some may have been filled meanwhile."""
        for ino in list(self._inos):
            self.look(ino)
