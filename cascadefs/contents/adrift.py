"""Staged files that lost their name: somebody emptied the memory tier, or took a file out of it, while programs had them open.

Owns: which inodes those are, and saving their bytes. An open descriptor still has them, so nothing is lost that is open. Never
awaits. Invariants:
(1) While an inode is adrift, its source is the only way to its bytes, for readers, writers and our own work.
(2) Its bytes get a name again before the source is closed, in memory or in parking.
(3) With a mount, its keeper has a descriptor, too, as long as it is adrift: a later worker takes it over (`keep`).
"""

import contextlib
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Protocol

from cascadefs.errors import GONE
from cascadefs.media import file_io
from cascadefs.metadata.namespace import Namespace
from cascadefs.placement.residency import Residency
from cascadefs.placement.sources import Source
from cascadefs.types import Home, Inode

log = logging.getLogger(__name__)


class FileHeir(Protocol):
    """Keeps files without a name open beside the process that has the store open, and after it."""

    def went(self, ino: int, fd: int) -> None:
        """An inode is adrift, and this is a descriptor of its file."""

    def came_back(self, ino: int) -> None:
        """It has a name again, or is gone."""


class Adrift:
    """Of one store."""

    def __init__(self, residency: Residency, namespace: Namespace, saved: Callable[[int], None]) -> None:
        self._residency, self._namespace, self._saved = residency, namespace, saved
        self._sources = residency.sources
        self._sources.listen(self)
        self._inos: set[int] = set()
        self._kept: dict[int, int] = {}  # of an earlier worker's, until there is a source
        self._heirs = list[FileHeir]()

    def bequeath(self, heir: FileHeir) -> None:
        """From now on it keeps them, too."""
        self._heirs.append(heir)

    def __contains__(self, ino: int) -> bool:
        return ino in self._inos

    def look(self, ino: int) -> bool:
        """Whether an inode that is staged is adrift, after a look at its source."""
        source, inode = self._sources.of(ino), self._namespace.find(ino)
        if source is not None and inode is not None and inode.home and not self._has_name(inode.home, source):
            self._add(ino, source.fd)
        return ino in self._inos

    def _add(self, ino: int, fd: int) -> None:
        if ino not in self._inos:
            self._inos.add(ino)
            for heir in self._heirs:
                heir.went(ino, fd)

    def keep(self, ino: int, fd: int) -> None:
        """It was adrift when an earlier worker died; `fd` is ours from now on."""
        self._kept[ino] = fd
        self._inos.add(ino)

    def settle_kept(self) -> None:
        """All that was open is known again: what nobody has open is saved now."""
        for ino, fd in list(self._kept.items()):
            if self._sources.of(ino) is None:
                self._sources.release(self._sources.take(ino, partial(os.dup, fd)))
            del self._kept[ino]
            os.close(fd)

    def _has_name(self, home: int, source: Source) -> bool:
        """A file of a tmpfs that was unmounted has a name, too, but not here."""
        try:
            named = os.lstat(self._residency.tier_of(home).staged_path(source.ino))
        except GONE:
            return False
        return os.path.samestat(named, os.fstat(source.fd))

    def path(self, ino: int) -> str | None:
        """By which the file can be reached, by calls that follow links; None: it is not adrift."""
        if ino not in self._inos:
            return None
        source = self._sources.of(ino)
        fd = self._kept.get(ino) if source is None else source.fd
        return None if fd is None else f"/proc/self/fd/{fd}"

    def open(self, ino: int) -> int | None:
        """A read-only descriptor that the caller closes."""
        path = self.path(ino)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC) if path is not None else None

    def source_leaves(self, source: Source) -> None:
        """See Leaver: the last user has let go of it."""
        if source.digest is None and not self._has_name(Home.MEMORY, source):
            inode = self._namespace.find(source.ino)
            if inode is not None and inode.home and inode.nlink and not self._has_name(inode.home, source):
                self._save(inode, source.fd)
        if source.ino in self._inos:
            self._inos.discard(source.ino)
            for heir in self._heirs:
                heir.came_back(source.ino)

    def _save(self, inode: Inode, fd: int) -> None:
        for home in dict.fromkeys((Home(inode.home), Home.COLD)):
            tier = self._residency.tier_of(home)
            try:
                tier.drop_staged(inode.ino)
                tier.copy_in(fd, tier.staged_path(inode.ino))
            except OSError as e:
                log.debug("inode %d cannot be saved there: %s", inode.ino, e)
                with contextlib.suppress(OSError):
                    tier.drop_staged(inode.ino)
                continue
            state = os.fstat(fd)
            os.utime(tier.staged_path(inode.ino), ns=(state.st_atime_ns, state.st_mtime_ns))
            if home != inode.home:
                self._namespace.update(inode.ino, home=home)
            self._saved(inode.ino)
            return
        log.error("inode %d lost its file in memory, and there is no room to save its bytes", inode.ino)


def copied(source: Source, path: str) -> bool:
    """Whether the bytes of an object's copy, whose name is gone, have a name again."""
    try:
        file_io.remove(path)
        file_io.copy_file(source.fd, path)
    except OSError as e:
        log.error("a copy that lost its name cannot be saved: %s", e)
        return False
    return True
