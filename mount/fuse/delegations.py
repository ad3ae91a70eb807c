"""Files in memory whose OPEN for reading, and GETATTR, the transport answers by itself: which they are, and how that ends.

Owns: the grants. Each holds its inode's source open (sources.py) like a user of it. Invariants:
(1) A grant is for a staged file in the memory tier, from its creation on and with or without writers, who write to that very
    file; or for an inode that may have its object's copy there (owners.py: of equal files one): it ends before a writer comes.
    None is given while somebody is about to change content (`held_back`) or memory is short.
(2) A grant ends in this order: the transport uses it no more, the opens that it answered are known, the source is let go.
(3) Sealing makes the staged file the object's copy: the same file, so the grant stays. Where it does not (nothing in it, or a
    copy is there) the grant is recalled first.
(4) There are at most LIMIT and what one round of spares adds, each with a descriptor: the one opened longest ago goes. Before
    objects are evicted those of objects go.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice

from cascadefs.contents.open_files import Handle
from cascadefs.ext.fuse_transport import FOPEN_KEEP_CACHE
from cascadefs.media import file_io
from cascadefs.media.descriptors import keep_reserve, share
from cascadefs.mount.fuse.attributes import getattr_answer
from cascadefs.mount.fuse.handles import Handles
from cascadefs.placement.sources import Source
from cascadefs.store import Store
from cascadefs.types import Home, Inode

log = logging.getLogger(__name__)
LIMIT, AT_ONCE = 4096, 64
FIRST = 1 << 31  # handles made from grants have numbers from here on, within those of a worker


class Grants:
    """Those of one mount. `catch_up` takes in what the transport has answered (catch_up.py)."""

    def __init__(self, store: Store, handles: Handles, catch_up: Callable[[], None]) -> None:
        self.store, self.handles, self.transport = store, handles, handles.transport
        self._catch_up = catch_up
        self._sources: dict[int, Source] = {}  # in the order of their last use that we know of
        self._wanted: dict[int, None] = {}
        self._changing = 0
        self._memory_is_short = False
        self._limit = share(LIMIT, 4)
        self.transport.number_grants((handles.table.generation << 32) + FIRST)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._sources)

    def keep(self, ino: int, source: Source) -> None:
        """The transport has had this grant since the file was a spare."""
        self._sources[ino] = self.store.files.sources.share(source)

    def used(self, ino: int) -> None:
        """Somebody has opened it."""
        self._sources[ino] = self._sources.pop(ino)

    def opened(self, handle: Handle) -> None:
        """By way of Python. What is written now is read soon: it gets a grant at once, others when there is time."""
        if handle.source is None or handle.source.digest is not None:
            self.want(handle.ino)
            return
        try:
            self._give(handle.ino)
        except OSError as e:
            log.debug("no grant for inode %d: %s", handle.ino, e)

    def sealed(self, ino: int) -> None:
        """An inode shows an object in memory now."""
        self.handles.mappings.ended(ino)
        self.want(ino)

    def want(self, ino: int) -> None:
        """This inode shows an object in memory now: a grant for it, or news to that which it has, when there is time."""
        if len(self._wanted) < LIMIT:
            self._wanted[ino] = None
            self.transport.ring()

    def give_wanted(self) -> None:
        """Give some of those that are wanted; none, and take those of objects back, when memory is short. None while somebody
        waits for a flush: for small files they cost as much as the flush itself."""
        if self._memory_is_short:
            self._memory_is_short = False
            self._wanted.clear()
            self.end(*(ino for ino, source in self._sources.items() if source.digest is not None))
        self.trim()
        if self.store.mover.is_awaited or not self._wanted:
            return
        if self.store.residency.under_pressure():
            self._wanted.clear()
        for ino in [one for one in islice(self._wanted, AT_ONCE) if not self._is_changing(one)]:
            del self._wanted[ino]
            try:
                self._give(ino)
            except OSError as e:
                log.debug("no grant for inode %d: %s", ino, e)

    def _is_changing(self, ino: int) -> bool:
        """Whether it must wait for its grant: who has sealed it may hold its lock yet, a writer of any file may be coming."""
        live = self.store.files.live.get(ino)
        return self._changing > 0 or (live is not None and live.is_locked)

    def trim(self) -> None:
        """The oldest beyond the limit end."""
        with suppress(OSError):  # the index takes nothing now: later
            self.end(*islice(self._sources, max(0, len(self._sources) - self._limit)))

    def _give(self, ino: int) -> None:
        inode = self.store.namespace.find(ino)
        if inode is None or ino in self._sources:
            self.renew(ino, inode)
            return
        if self._changing:
            return
        source = self._take_source(inode)
        if source is None:
            return
        try:
            keep_reserve(source.fd)
            self._tell_attributes(inode, source)
            self._tell(ino, source)  # the last step: from here on it may be in use
        except BaseException:
            self.transport.drop_attributes(ino)
            self.store.files.sources.release(source)
            raise
        self._sources[ino] = source

    def renew(self, ino: int, inode: Inode | None) -> None:
        """Its row has changed."""
        if inode is not None and (source := self._sources.get(ino)) is not None:
            self._tell_attributes(inode, source)
        else:
            self.transport.drop_attributes(ino)

    def _tell_attributes(self, inode: Inode, source: Source) -> None:
        answer = getattr_answer(inode, inode.ino in self.handles.mappings)
        self.transport.set_attributes(inode.ino, answer, source.fd if inode.home else -1)

    def _tell(self, ino: int, source: Source) -> None:
        """As handles.py announces a reader."""
        flags = self.handles.open_flags
        if self.handles.passthrough:
            self.handles.register(source)
            self.transport.grant(ino, source.fd, source.backing_id, flags)
        else:
            self.transport.grant(ino, source.fd, 0, flags | FOPEN_KEEP_CACHE, served=True)

    def _take_source(self, inode: Inode) -> Source | None:
        """The source that every handle of an inode shares, with one more user, if its opens may be answered without asking."""
        live = self.store.files.live.get(inode.ino)
        if live is not None and (live.directs or live.is_locked):
            return None
        return self._staged_source(inode) if inode.home else self._object_source(inode)

    def _staged_source(self, inode: Inode) -> Source | None:
        if inode.home != Home.MEMORY:
            return None
        files = self.store.files
        return files.sources.take(inode.ino, partial(file_io.open_file, files.staged_path(inode), os.O_RDONLY))

    def _object_source(self, inode: Inode) -> Source | None:
        files, memory = self.store.files, self.store.residency.memory
        found = files.index.shown_by(inode.ino)
        if found is None or found.digest not in memory.objects:
            return None
        if (source := files.sources.of(inode.ino)) is not None:
            return files.sources.share(source) if source.digest is not None else None
        return files.owners.open(inode.ino, found, is_asked=False)

    def source_of(self, ino: int) -> Source | None:
        """What the handles of a grant read."""
        return self._sources.get(ino)

    # --- the end of a grant

    def end(self, *inos: int) -> None:
        """Afterwards every open that these grants have answered is known, and their sources have one user less. OSError, and
        the grants are as before, when that cannot be known now."""
        known = [ino for ino in inos if ino in self._sources]
        if not known:
            return
        for ino in known:
            self.transport.revoke(ino)
            self.transport.drop_attributes(ino)
        try:
            self._catch_up()
        except OSError:
            for ino in known:
                self._tell(ino, self._sources[ino])
            raise
        for ino in known:
            self._let_go(ino)

    def _let_go(self, ino: int) -> None:
        self._wanted.pop(ino, None)
        self.transport.drop_attributes(ino)
        if (source := self._sources.pop(ino, None)) is not None:
            self.store.files.sources.release(source)

    def end_deleted(self, ino: int) -> None:
        """The kernel has forgotten the inode after its last close: nothing of it can be unknown."""
        self.transport.revoke(ino)
        self._let_go(ino)
        self.handles.mappings.ended(ino)

    def end_all(self) -> None:
        """Nothing that nobody has open is held in memory by a grant afterwards."""
        self._wanted.clear()
        self.end(*self._sources)

    def memory_is_short(self) -> None:
        """Grants of objects end, when there is time."""
        self._memory_is_short = True
        self.transport.ring()

    def let_go(self, ino: int) -> None:
        """End the grant of an inode, if it can be ended now: its file may be for another one."""
        with suppress(OSError):
            self.end(ino)

    @contextmanager
    def held_back(self, ino: int) -> Iterator[None]:
        """Somebody is about to change the content of an inode: while it shows an object, it has no grant."""
        self._changing += 1
        try:
            inode = self.store.namespace.find(ino)
            if inode is not None and not inode.home:
                self.end(ino)
            yield
        finally:
            self._changing -= 1
