"""Empty staged files made in advance, with backing id and handle: the transport answers CREATE with one, without waking Python,
and from then on OPEN for reading and GETATTR of the new file.

Owns: the spares that were not given away or whose record was not read yet. Does not enter anything into the index. Invariants:
(1) A spare lies in memory, as the new file would. None is offered unless the index will take its record: with a sound medium
    and the reserve of a full disk at hand.
(2) Its backing id is in the mount's table from the beginning, so that a later worker closes it.
(3) Its grant is there before anybody can know the inode; whoever takes() the file owns the grant, too (delegations.py).
"""

import logging
import os
from dataclasses import dataclass

from cascadefs.formats.name_ring import Created
from cascadefs.media.descriptors import keep_reserve, share
from cascadefs.mount.fuse.attributes import NO_FILE_YET
from cascadefs.mount.fuse.handles import Handles
from cascadefs.placement.sources import Source
from cascadefs.store import Store
from cascadefs.types import Home

log = logging.getLogger(__name__)
TARGET, AT_ONCE = 512, 128  # one costs the control thread 40 us


@dataclass(frozen=True, slots=True)
class Spare:
    """`fd` is read-only."""

    fh: int
    fd: int
    backing_id: int


class Spares:
    """Those of one mount."""

    def __init__(self, store: Store, handles: Handles) -> None:
        self.store, self.handles, self.transport = store, handles, handles.transport
        self._made: dict[int, Spare] = {}
        self._target = share(TARGET, 8)

    @property
    def count(self) -> int:
        """How many there are, including those that were given away and not read of yet."""
        return len(self._made)

    def refill(self) -> bool:
        """Some more, if they may be given away; else none at all. Whether still more are wanted."""
        if not self._may_be_given():
            self.withdraw()
            return False
        for _ in range(min(AT_ONCE, self._target - len(self._made))):
            try:
                self._make()
            except OSError as e:
                log.debug("no spare file: %s", e)
                return False
        return len(self._made) < self._target

    def _may_be_given(self) -> bool:
        database = self.store.database
        sound = database.reserve.held and not database.health.troubles
        return self.handles.passthrough and sound and self.store.residency.home_for_new() == Home.MEMORY

    def _make(self) -> None:
        memory, ino, fh = self.store.residency.memory, self.store.namespace.reserve_ino(), self.handles.number()
        fd = memory.create_staged(ino)
        try:
            keep_reserve(fd)
            backing_id = self.transport.backing_open(fd)
        except BaseException:
            os.close(fd)
            memory.drop_staged(ino)
            raise
        self.handles.table.add_backing(backing_id)
        self._made[ino] = Spare(fh, fd, backing_id)
        self.transport.set_handle(fh, fd=fd, backing_id=backing_id, open_flags=self.handles.open_flags)
        self.transport.set_attributes(ino, NO_FILE_YET, fd)
        self.transport.grant(ino, fd, backing_id, self.handles.open_flags)
        self.transport.add_spare(ino, fh, fd, backing_id)

    def take(self, one: Created) -> Source:
        """This one was given away, and is in the index now: it is a file that somebody has open."""
        spare, files = self._made.pop(one.ino), self.store.files
        source = files.sources.take(one.ino, lambda: spare.fd)
        source.backing_id = spare.backing_id
        self.handles.take_spare(one, files.of(one.ino).enter(source, True))
        files.lookups[one.ino] = 1
        return source

    def withdraw(self, connected: bool = True) -> None:
        """Give none away any more. What was given stays. `connected` False: the kernel has closed all backing ids itself."""
        while ino := self.transport.withdraw_spare():
            spare = self._made.pop(ino)
            self.transport.revoke(ino)
            self.transport.drop_attributes(ino)
            self.transport.drop_handle(spare.fh)
            if connected:
                self.transport.backing_close(spare.backing_id)
            self.handles.table.remove_backing(spare.backing_id)
            os.close(spare.fd)
            self.store.residency.memory.drop_staged(ino)
