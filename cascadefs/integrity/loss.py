"""Somebody else emptied the memory tier, or took files out of it, while the store is open: it is noticed, made anew and told.

Owns: the look, and bringing names, contents and copies to agree again by the rules of recovery.py. Invariants:
(1) What programs have open is not lost (adrift.py). Of the rest a file shows its durable version, or is absent.
(2) Afterwards every staged inode has its file or is adrift, every dirty object has a copy; what somebody is at work with is
    looked at the next time.
(3) Whoever meets a missing file first does not hear of it: see retried(). All else never awaits.
"""

import errno
import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from cascadefs.contents.adrift import copied
from cascadefs.contents.files import Files
from cascadefs.errors import UserError, os_error
from cascadefs.formats.name_ring import NameRing
from cascadefs.integrity.recovery import Recovered, fall_back
from cascadefs.types import Home, Inode, Object

log = logging.getLogger(__name__)
COUNT_S = 2.0  # between two looks whether single files are missing
RETRY_S = 8.0
TRIES, PAUSE_S = 4, 0.02  # of one request: who takes the tier away may not be done yet
R = TypeVar("R")


class Loss:
    """Watches the memory tier of one store."""

    def __init__(self, files: Files, ring: NameRing) -> None:
        self._files, self._ring = files, ring
        self._memory, self._residency = files.residency.memory, files.residency
        self._next_count = self._next_try = 0.0
        self.suspected = False  # a file of the tier was not there
        self.times = 0
        self._folders = {self._memory.folder}  # where it has been

    def look(self, count: bool = False) -> None:
        """Cheap; to be called often. `count`: single files, too, in any case."""
        now, health = time.monotonic(), self._files.database.health
        if now < self._next_try and not count:
            return
        try:
            self._look(count or now >= self._next_count)
        except (OSError, UserError) as e:
            self._next_try = now + RETRY_S
            health.failed("memory tier", e if isinstance(e, OSError) else OSError(str(e)))
            self._do_without()
        else:
            health.worked("memory tier")

    async def retried(self, work: Callable[[], Awaitable[R]]) -> R:
        """The result of work that changes nothing when it meets a missing file of the tier: that is seen to at once, and it is
        done again. To a program ENOENT would say that there is no such name."""
        for turn in range(1, TRIES):
            try:
                return await work()
            except OSError as e:
                if not self._is_of_tier(e):
                    raise
            self.suspected = True
            self.look(count=True)
            await trio.sleep(PAUSE_S * (turn - 1))
        try:
            return await work()
        except OSError as e:
            if self._is_of_tier(e):
                raise os_error(errno.EIO, f"the memory tier lacks {e.filename}: {e.__cause__ or e}") from e
            raise

    def _is_of_tier(self, e: OSError) -> bool:
        """Whether an error tells of a file of the tier that is not there: a name in the namespace begins with no slash."""
        found = e.__cause__ if isinstance(e.__cause__, OSError) else e
        is_gone = found.errno in (errno.ENOENT, errno.ENOTDIR)
        return is_gone and any(f"{found.filename}/".startswith(f"{folder}/") for folder in self._folders)

    def _look(self, count: bool) -> None:
        if not self._memory.is_whole() or not self._ring.is_there():
            self.mend()
        elif self.suspected or (count and self._lacks_files()):
            self.suspected = False
            self._settle()

    def _lacks_files(self) -> bool:
        self._next_count = time.monotonic() + COUNT_S
        return self._memory.lacks(self._files.index.count_staged(Home.MEMORY))

    def _do_without(self) -> None:
        """No tier can be made for now: what is durable is read from the extents meanwhile."""
        for digest in [digest for digest in self._memory.objects if digest in self._residency.clean]:
            if not os.path.lexists(self._memory.object_path(digest)):
                self._residency.drop(self._memory, digest)

    def mend(self) -> None:
        """Folders of the tier are gone."""
        self._files.watcher.memory_lost()
        self._memory.renew()
        self._folders.add(self._memory.folder)
        self._ring.renew(self._memory.folder)
        self._settle()

    def _settle(self) -> None:
        self._files.watcher.memory_lost()
        self._residency.sources.holder.memory_is_short()
        here = self._memory.names()
        result, missing = Recovered(), [digest for digest in self._memory.objects if digest not in here]
        with self._files.database.transaction():
            staged = [ino for ino in self._files.index.staged_inodes() if self._is_lost(ino)]
            self._fall_back(staged, result)
            for found in self._files.index.all_dirty():
                if found.digest in missing and not self._saved(found):
                    self._residency.drop(self._memory, found.digest)
                    self._fall_back(self._files.index.inodes_of(found.oid), result)
        for digest in missing:
            if digest in self._memory.objects and not os.path.lexists(self._memory.object_path(digest)):
                self._residency.drop(self._memory, digest)
        if staged or missing or result.absent:
            self._tell(result)

    def _is_lost(self, ino: int) -> bool:
        """Whether an inode is staged in memory and nothing has its bytes any more."""
        inode = self._files.namespace.get(ino)
        if inode.home != Home.MEMORY or self._memory.has_staged(ino):
            return False
        live = self._files.live.get(ino)
        if live is not None and live.is_locked:
            self.suspected = True
            return False
        self._files.watcher.recall(ino)  # if only a grant has it open, it is saved now
        inode = self._files.namespace.get(ino)
        return inode.home == Home.MEMORY and not self._memory.has_staged(ino) and not self._files.adrift.look(ino)

    def _saved(self, found: Object) -> bool:
        source = self._files.sources.of_object(found.digest)
        return source is not None and copied(source, self._memory.object_path(found.digest))

    def _fall_back(self, inos: list[int], result: Recovered) -> None:
        for ino in inos:
            inode: Inode = self._files.namespace.get(ino)
            names = self._files.namespace.names_of(ino)
            fall_back(self._files, inode, result)
            if ino not in self._files.index.logs:  # else it is staged again
                self._files.to_seal.pop(ino, None)
            self._files.forget_if_gone(ino)
            self._files.watcher.fell_back(ino, [] if self._files.namespace.names_of(ino) else names)

    def _tell(self, result: Recovered) -> None:
        self.times += 1
        what = f"{result.fallen_back} files fell back to an older version, {result.absent} are absent"
        note = f"the memory tier {self._memory.folder} was emptied by somebody else ({time.strftime('%F %T')}): {what}"
        self._memory.claim.notes[:] = [*self._memory.claim.notes[-9:], note]
        log.error("%s", note)
