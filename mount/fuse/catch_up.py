"""What the transport has answered by itself, taken in afterwards: names made, moved, removed, opens granted, releases, forgets.

Owns: the order of taking in, the spares and grants, lookup counts after FORGET. Knows no handler. Never awaits. Invariants:
(1) A change of names is known before anything that came after it. (2) A handle is known before its release. (3) What was
taken in is settled with the transport after its commit: a later worker finds what this one did not finish.
"""

import contextlib
import logging
import time
from collections.abc import Iterable, Sequence
from functools import partial

from cascadefs.crash import point
from cascadefs.formats.name_ring import Change, Created, Removed
from cascadefs.mount.fuse.delegations import Grants
from cascadefs.mount.fuse.handles import Handles
from cascadefs.mount.fuse.resent import Once
from cascadefs.mount.fuse.seen import Seen
from cascadefs.mount.fuse.spares import Spares
from cascadefs.store import Store

log = logging.getLogger(__name__)
OF_NAMES = frozenset(
    ("lookup", "create", "mknod", "mkdir", "symlink", "link", "unlink", "rmdir", "rename", "opendir", "readdir")
)


class Answered:
    """Of one mount."""

    def __init__(self, store: Store, handles: Handles, once: Once) -> None:
        self.store, self.handles, self.once, self.transport = store, handles, once, handles.transport
        self.files = store.files
        self.spares, self.grants = Spares(store, handles), Grants(store, handles, self.catch_up_or_fail)
        handles.listen(self)
        self.seen = Seen(store, handles, self.grants)
        self.inherited = False  # whether the kernel knows inodes from an earlier worker: their lookups were not counted here

    def prepare(self, handler: str) -> None:
        """Before a handler: it must know the names that the transport has made and removed. If the index cannot take them now,
        a handler that could miss them fails, others go on. Of the grants that came with those names the oldest make room."""
        try:
            self.take_names()
        except OSError:
            if handler in OF_NAMES:
                raise
        self.grants.trim()

    def offer(self) -> bool:
        """Let the transport answer changes of names while the index will take them, and allocate ahead; whether there
        is more to prepare."""
        database = self.store.database
        self.transport.allow_removals(bool(database.reserve.held and not database.health.troubles))
        self.transport.allow_ahead(self.store.residency.memory.room_ahead())
        for ino in self.transport.take_gaps():
            self.files.found_gaps(ino)
        return self.spares.refill()

    def withdraw(self, connected: bool = True) -> None:
        """Changes of names are Python's from here on."""
        self.transport.allow_removals(False)
        self.spares.withdraw(connected)

    def take_names(self) -> None:
        """Enter the changes of names that the transport has answered since the last call, in one commit. OSError: none; it is
        tried again."""
        put = self.store.ring.put
        changes = self.store.ring.pending(put)
        if not changes:
            return
        point("entering")
        self.files.last_use = time.monotonic()
        try:
            gone = self.store.database.reserve.lend(partial(self._enter, changes))
        except OSError:
            self.withdraw()
            raise
        point("entered")
        for one in changes:
            self._entered(one, gone)
        self.store.ring.settle(put)

    def _enter(self, changes: Sequence[Change]) -> dict[int, int]:
        numbers = [self.once.number(one.request, one.folder) for one in changes]
        self.store.ring.begin(changes, numbers)
        try:
            return self.store.namespace.enter(changes, numbers)
        except BaseException:
            self.once.drop(numbers)
            self.store.ring.begin(changes, [0] * len(changes))
            raise

    def _entered(self, one: Change, gone: dict[int, int]) -> None:
        if isinstance(one, Created):
            self.grants.keep(one.ino, self.spares.take(one))
        elif one.at in gone and isinstance(one, Removed):  # its FORGET is still to come
            self.transport.drop_attributes(gone[one.at])
            if self.inherited:  # the kernel has looked up what it removes, if only in an earlier worker's time
                self.files.lookups.setdefault(gone[one.at], 1)
        elif one.at not in gone:
            log.error("the kernel has removed or moved a name that is not there: %r in folder %d", one.name, one.folder)

    def catch_up(self) -> None:
        """Do what the transport put aside because nobody waits for it: releases and forgets; hear of the opens it answered."""
        with contextlib.suppress(OSError):
            self.catch_up_or_fail()

    def catch_up_or_fail(self) -> None:
        """As catch_up(). OSError, and nothing has changed, when the index does not take what was created before."""
        limit = self.transport.events_put()
        self.take_names()  # a file is known before its release
        opened, released, forgotten = self.transport.take_events(limit)
        if not opened and not released and not forgotten:
            return
        gone = set(released)
        for fh, ino, request, backing_id in opened:
            self._granted(ino, None if fh in gone else fh, request, backing_id)
        self._take_in(released, forgotten)

    def _take_in(self, released: Sequence[int], forgotten: Sequence[tuple[int, int]]) -> None:
        with self.store.database.transaction():  # one commit for all
            for fh in released:
                self.handles.remove(fh)
            self.forget(forgotten)
        self.transport.events_done()
        self.files.delete_leftover()

    def inherit(self) -> None:
        """Take a mount over from an earlier worker. Before the first request."""
        opened, released, forgotten = self.transport.take_events(self.transport.events_put())
        self.handles.inherit(opened)
        self.once.add_done(one.request for one in self.store.pending)
        self.store.ring.settle(self.store.ring.put)
        self.inherited = True
        if self.handles.passthrough:
            self.handles.mappings.may_come(self.store.index.staged_inodes())
        self._take_in(released, forgotten)
        self.files.adrift.settle_kept()

    def unmapped(self, ino: int) -> None:
        """Its times move no more behind our back."""
        self.grants.renew(ino, self.store.namespace.find(ino))

    def _granted(self, ino: int, fh: int | None, request: int, backing_id: int) -> None:
        """The transport has answered an OPEN for reading, by a grant. `fh` None: it is closed already."""
        source = self.grants.source_of(ino)
        if source is None:
            log.error("inode %d was opened by a grant that is gone", ino)
            return
        self.grants.used(ino)
        self.files.read_without_us(ino, source)
        if fh is not None:
            handle = self.files.of(ino).enter(self.files.sources.share(source), False, direct=False)
            self.handles.take_granted(fh, handle, request, backing_id)

    def forget(self, forgotten: Iterable[tuple[int, int]]) -> None:
        """The kernel has dropped so many of its references to these inodes."""
        lookups, unknown = self.files.lookups, set[int]()
        for ino, times in forgotten:
            left = lookups.pop(ino, 0) - times
            if left > 0:
                lookups[ino] = left
            else:
                unknown.add(ino)
        if unknown and self.files.forget_all_gone(unknown):
            self.transport.keep_listing()  # it may have kept a listing, and would ask for each name
