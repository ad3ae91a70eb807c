"""A few MiB of the store's disk kept aside, so that a full disk can still be emptied: deleting a file makes the index grow.

Owns: <store>/reserve, a file of allocated blocks and no content. Knows nothing of what is deleted. Invariants:
(1) Only work that frees space is given of the reserve, no more of it than it needs, and what it leaves is taken back at once.
(2) What becomes free goes to the reserve before it goes to new data: fill() says whether those may have any.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

from cascadefs.config import KIB, MIB
from cascadefs.media import file_io

RESERVE_BYTES = 8 * MIB  # a thousand deletions, if nothing that was written before can be written over
SHARE = 16  # at most such a part of the disk
PIECE_BYTES = 64 * KIB  # is given up first, some deletions; then twice as much, and so on: somebody else may have been faster
log = logging.getLogger(__name__)
R = TypeVar("R")


class Borrower(Protocol):
    """Has space of the disk that it can do without."""

    def reuse_space(self) -> None:
        """A part of the reserve was given up: use what is there again before it takes more."""

    def shrink(self) -> bool:
        """There is no reserve left. Whether some space was given back."""


class Reserve:
    """The reserve of one store."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "reserve"
        space = os.statvfs(folder)
        self.wanted_bytes = min(RESERVE_BYTES, space.f_blocks * space.f_frsize // SHARE)
        self.bytes = os.lstat(self._path).st_size if self._path.exists() else 0
        self._borrowers = list[Borrower]()

    def listen(self, borrower: Borrower) -> None:
        """Ask one more."""
        self._borrowers.append(borrower)

    @property
    def held(self) -> bool:
        """Whether all of it is there."""
        return self.bytes >= self.wanted_bytes

    def fill(self) -> bool:
        """Take what is missing, or as much of it as is free. Whether new data may be written: not before the reserve is whole,
        unless it is no lack of space that keeps it from being so."""
        if self.held:
            return True
        space = os.statvfs(self._folder)
        step = min(self.wanted_bytes - self.bytes, space.f_bavail * space.f_frsize)
        if step < min(PIECE_BYTES, self.wanted_bytes - self.bytes):
            return False
        try:
            self._take(step)
        except OSError as e:
            log.debug("no reserve on the disk of the store: %s", e)
            return e.errno != errno.ENOSPC
        return self.held

    def _take(self, step: int) -> None:
        fd = file_io.open_file(self._path, os.O_WRONLY | os.O_CREAT)
        try:
            while step:
                try:
                    file_io.allocate(fd, step, self.bytes)
                    self.bytes += step
                    return
                except OSError as e:
                    file_io.truncate(fd, self.bytes)
                    step //= 2
                    if e.errno != errno.ENOSPC or step < PIECE_BYTES:
                        raise
        finally:
            os.close(fd)

    def spend(self, piece_bytes: int) -> bool:
        """Give up so much of it; whether there was any."""
        if not self.bytes:
            return False
        if self.held:
            log.warning("the disk of the store is full: its reserve is used to free space")
        self.bytes = max(0, self.bytes - piece_bytes)
        with contextlib.suppress(FileNotFoundError):  # somebody has removed it
            file_io.truncate(self._path, self.bytes)
        return True

    def _given(self) -> Iterator[bool]:
        """Ways to more room, one after the other."""
        piece_bytes = PIECE_BYTES
        while self.spend(piece_bytes):
            for borrower in self._borrowers:
                borrower.reuse_space()
            yield True
            piece_bytes *= 2
        if any([borrower.shrink() for borrower in self._borrowers]):
            yield True

    def lend(self, work: Callable[[], R]) -> R:
        """The result of work that frees space; it is done again with some of the reserve when there is none without."""
        given = self._given()
        while True:
            try:
                result = work()
            except OSError as e:
                if e.errno != errno.ENOSPC or not next(given, False):
                    raise
            else:
                self.fill()
                return result

    async def lend_to(self, work: Callable[[], Awaitable[None]]) -> None:
        """The same for work that waits."""
        given = self._given()
        while True:
            try:
                await work()
            except OSError as e:
                if e.errno != errno.ENOSPC or not next(given, False):
                    raise
            else:
                self.fill()
                return
