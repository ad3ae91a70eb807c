"""Answers to READDIRPLUS of real folders, each made by one statement and given to the kernel past pyfuse3.

Owns: the dots, where each listing ends, the lookup counts of what was listed, answers made ahead. Knows no format:
ext/listing.pyx packs. `.cascade`, requests that are sent again and those that are too many come to operations.py `readdir`
instead. Invariants:
(1) An answer is checked, counted and sent without an await. (2) An entry is counted as a lookup if the kernel took the answer;
dots are not. (3) What was made ahead is used only if no row has changed since. Staged files change without us: they are looked
at when the answer is sent. (4) A listing tells each name once that was there when it began (or began again: rewinddir), is
there still and kept its place (namespace.py); and it ends, whatever comes meanwhile. A new worker takes a new bound.
(5) The kernel keeps what it was told and answers the next listing by itself, as long as no name comes or goes. It is let do so
(`keep_listing`) when it was told everything, with attributes that hold: else a stat of each name would ask us.
"""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import trio

from cascadefs.crash import point
from cascadefs.ext import listing
from cascadefs.mount.fuse.catch_up import Answered
from cascadefs.mount.fuse.guard import errno_of
from cascadefs.store import Store
from cascadefs.types import Inode

log = logging.getLogger(__name__)
AHEAD_MAX = 8  # answers, for as many listings at once; 128 KiB each
BOUNDS_MAX = 4096  # listings at once; the oldest of more than that is bounded anew


@dataclass(frozen=True, slots=True)
class Place:
    """Where a listing of a folder goes on, and the last entry it tells."""

    folder: int
    position: int
    last: int


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the entries of a folder: packed, their inodes, whether some are staged, the position behind them, and how many
    changes the database had seen."""

    entries: bytes
    inodes: list[int]
    staged: bool
    end: int
    changes: int


class Bounds:
    """The last entry that each listing tells. Nobody says when a folder is closed: the oldest bound makes room."""

    def __init__(self, newest: Callable[[], int]) -> None:
        self._newest = newest
        self._last: dict[int, int] = {}

    def of(self, handle: int, position: int) -> int:
        """At the begin it is the newest entry of the moment."""
        known = None if position == 0 else self._last.pop(handle, None)
        last = self._last[handle] = self._newest() if known is None else known
        while len(self._last) > BOUNDS_MAX:
            del self._last[next(iter(self._last))]
        return last

    def is_new(self, handle: int, position: int) -> bool:
        """Whether of() will take a bound: every name that was made before must have been entered by then."""
        return position == 0 or handle not in self._last


class Wholes:
    """How far each listing has come without a gap and without attributes that hold for moments only."""

    def __init__(self) -> None:
        self._at: dict[int, int] = {}

    def told(self, handle: int, position: int, part: Part, is_end: bool) -> bool:
        """Whether everything was told with this."""
        expected = self._at.pop(handle, listing.DOTS)
        if part.staged or (position and expected != max(position, listing.DOTS)):
            return False
        if not is_end:
            self._at[handle] = part.end or listing.DOTS
            while len(self._at) > BOUNDS_MAX:
                del self._at[next(iter(self._at))]
        return is_end


class Listings:
    """Those of one mount."""

    def __init__(self, store: Store, answered: Answered) -> None:
        self.answered, self.transport, self.files = answered, answered.transport, store.files
        self.names, self._db = store.namespace, store.database.connection
        self.is_possible = store.database.has_function(listing.FUNCTION)
        residency = store.residency
        self._staged = os.fsencode(residency.memory.staged_folder), os.fsencode(residency.parking.staged_folder)
        self.bounds, self._wholes = Bounds(self.names.last_entry), Wholes()
        self._mapped = answered.handles.mappings
        self._ahead: dict[Place, Part] = {}  # in the order they were made

    async def serve(self) -> None:
        """Answer what comes. Without the function everything goes to pyfuse3."""
        if not self.is_possible:
            return
        wake_fd = self.transport.take_listings()
        while True:
            while (asked := self.transport.next_listing()) is not None:
                request, folder, handle, position, room = asked
                following = self._answer(request, folder, handle, position, room)
                await trio.lowlevel.checkpoint()
                if following is not None:
                    self._make_ahead(following, room)
            await trio.lowlevel.wait_readable(wake_fd)

    def _answer(self, request: int, folder: int, handle: int, position: int, room: int) -> Place | None:
        """What will be asked next; None when that was the end, or an error."""
        try:
            self.transport.take_replies()  # others need not wait for what follows
            self.answered.prepare("readdir")
            last = self._last_to_tell(handle, position)
            dots = self._dots(folder, position)
            at = Place(folder, max(position, listing.DOTS), last)
            part = self._part(at, room - len(dots))
            listing.pads(self.files.watcher.pads())
            mapped = self._mapped.among(part.inodes) if part.staged else frozenset()
            entries = listing.renewed(part.entries, *self._staged, mapped) if part.staged else part.entries
            self._tell(request, part.inodes, dots + entries if dots else entries)
            if self._wholes.told(handle, position, part, is_end=not dots and not entries):
                self.transport.keep_listing(folder)
        except Exception as e:
            self.transport.answer_listing(request, b"", errno_of("readdirplus", e))
            return None
        return Place(folder, part.end, at.last) if part.inodes else None

    def _last_to_tell(self, handle: int, position: int) -> int:
        if self.bounds.is_new(handle, position):
            self.answered.catch_up()
        return self.bounds.of(handle, position)

    def listing(self, folder: int, after: int) -> Iterator[tuple[int, bytes, Inode]]:
        """As Namespace.listing(), for pyfuse3: it tells no handles apart, so that whoever begins moves the end for all."""
        return self.names.listing(folder, after, self._last_to_tell(folder, after))

    def _tell(self, request: int, inodes: list[int], entries: bytes) -> None:
        self.files.lookups.update(inodes)
        point("answer")
        if not self.transport.answer_listing(request, entries):
            self.answered.forget((ino, 1) for ino in inodes)

    def _dots(self, folder: int, position: int) -> bytes:
        found = b""
        for at, name in enumerate((b".", b".."), 1):
            if at > position and (inode := self.names.lookup(folder, name)) is not None:
                found += self.names.packed(listing.FUNCTION, inode.ino, name, at - listing.DOTS)
        return found

    def _part(self, at: Place, room: int) -> Part:
        """What was made ahead, if that still holds and fits; else it is made now."""
        ready = self._ahead.pop(at, None)
        if ready is not None and ready.changes == self._db.total_changes and len(ready.entries) <= room:
            return ready
        return self._make(at, room)

    def _make(self, at: Place, room: int) -> Part:
        most = room // listing.ENTRY_BYTES
        after = at.position - listing.DOTS
        entries = self.names.packed_listing(listing.FUNCTION, at.folder, after, at.last, room, most)
        inodes, staged, end = listing.told(entries)
        return Part(entries, inodes, staged, end, self._db.total_changes)

    def _make_ahead(self, at: Place, room: int) -> None:
        """While the kernel and the caller work on an answer, on another core, the next one is made."""
        try:
            part = self._make(at, room)
        except Exception as e:  # whoever asks for it will be told
            log.debug("a listing could not be made ahead: %s", e)
            return
        self._ahead[at] = part
        while len(self._ahead) > AHEAD_MAX:
            del self._ahead[next(iter(self._ahead))]
