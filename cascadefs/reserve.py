"""A few MiB of the store's disk kept aside, so that a full disk can still be emptied: deleting a file makes the index grow.

Owns: <store>/reserve, a file of allocated blocks and no content. Knows nothing of what is deleted. Invariants:
(1) Only work that frees space is given the reserve. (2) It is filled again only when there is plenty of room besides.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cascadefs import media
from cascadefs.config import MIB

RESERVE_BYTES = 8 * MIB  # a thousand deletions between two checkpoints, which is when their pages are used again
PLENTY = 4  # times the reserve must be free besides
log = logging.getLogger(__name__)
R = TypeVar("R")


class Reserve:
    """The reserve of one store."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "reserve"
        self.held = self._path.exists()

    def fill(self) -> None:
        """Take the space, where there is plenty. Errors do not matter: it is tried again."""
        space = os.statvfs(self._folder)
        if self.held or space.f_bavail * space.f_frsize < (PLENTY + 1) * RESERVE_BYTES:
            return
        try:
            fd = media.open_file(self._path, os.O_WRONLY | os.O_CREAT)
            try:
                media.allocate(fd, RESERVE_BYTES)
            finally:
                os.close(fd)
            self.held = True
        except OSError as e:
            log.debug("no reserve on the disk of the store: %s", e)
            with contextlib.suppress(OSError):
                media.remove(self._path)

    def spend(self) -> bool:
        """Give it up; whether there was any."""
        if not self.held:
            return False
        log.warning("the disk of the store is full: its reserve is used to free space")
        media.remove(self._path)
        self.held = False
        return True

    def lend(self, work: Callable[[], R]) -> R:
        """The result of work that frees space; it is done again with the reserve when there is none without."""
        try:
            return work()
        except OSError as e:
            if e.errno != errno.ENOSPC or not self.spend():
                raise
        return work()
