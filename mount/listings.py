"""Answers to READDIRPLUS of real folders, each made by one statement and given to the kernel past pyfuse3.

Owns: the dots, the lookup counts of what was listed, answers made ahead. Knows no format: ext/listing.pyx packs. `.cascade`,
requests that are sent again and those that are too many come to operations.py `readdir` instead. Invariants:
(1) An answer is checked, counted and sent without an await. (2) An entry is counted as a lookup if the kernel took the answer;
dots are not. (3) What was made ahead is used only if no row has changed since. Staged files change without us: they are looked
at when the answer is sent.
"""

import logging
import os
from dataclasses import dataclass

import trio

from cascadefs.crash import point
from cascadefs.ext import listing
from cascadefs.mount.answered import Answered
from cascadefs.mount.guard import errno_of
from cascadefs.store import Store

log = logging.getLogger(__name__)
AHEAD_MAX = 8  # answers, for as many listings at once; 128 KiB each


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the entries of a folder: packed, their inodes, whether some are staged, the position behind them, and how many
    changes the database had seen."""

    entries: bytes
    inodes: list[int]
    staged: bool
    end: int
    changes: int


class Listings:
    """Those of one mount."""

    def __init__(self, store: Store, answered: Answered) -> None:
        self.answered, self.transport, self.files = answered, answered.transport, store.files
        self.names, self._db = store.namespace, store.database.connection
        self.is_possible = store.database.has_function(listing.FUNCTION)
        residency = store.residency
        self._staged = os.fsencode(residency.memory.staged_folder), os.fsencode(residency.parking.staged_folder)
        self._ahead: dict[tuple[int, int], Part] = {}  # by folder and position, in the order they were made

    async def serve(self) -> None:
        """Answer what comes. Without the function everything goes to pyfuse3."""
        if not self.is_possible:
            return
        wake_fd = self.transport.take_listings()
        while True:
            while (asked := self.transport.next_listing()) is not None:
                request, folder, position, room = asked
                answered = self._answer(request, folder, position, room)
                await trio.lowlevel.checkpoint()
                if answered is not None and answered.inodes:
                    self._make_ahead(folder, answered.end, room)
            await trio.lowlevel.wait_readable(wake_fd)

    def _answer(self, request: int, folder: int, position: int, room: int) -> Part | None:
        """What the kernel was told; None when it was an error."""
        try:
            self.transport.take_replies()  # others need not wait for what follows
            self.answered.prepare("readdir")
            if position == 0:
                self.answered.catch_up()
            dots = self._dots(folder, position)
            part = self._part(folder, max(position, listing.DOTS), room - len(dots))
            entries = listing.renewed(part.entries, *self._staged) if part.staged else part.entries
            self._tell(request, part.inodes, dots + entries if dots else entries)
        except Exception as e:
            self.transport.answer_listing(request, b"", errno_of("readdirplus", e))
            return None
        return part

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

    def _part(self, folder: int, position: int, room: int) -> Part:
        """What was made ahead, if that still holds and fits; else it is made now."""
        ready = self._ahead.pop((folder, position), None)
        if ready is not None and ready.changes == self._db.total_changes and len(ready.entries) <= room:
            return ready
        return self._make(folder, position, room)

    def _make(self, folder: int, position: int, room: int) -> Part:
        most = room // listing.ENTRY_BYTES
        entries = self.names.packed_listing(listing.FUNCTION, folder, position - listing.DOTS, room, most)
        inodes, staged, end = listing.told(entries)
        return Part(entries, inodes, staged, end, self._db.total_changes)

    def _make_ahead(self, folder: int, position: int, room: int) -> None:
        """While the kernel and the caller work on an answer, on another core, the next one is made."""
        try:
            part = self._make(folder, position, room)
        except Exception as e:  # whoever asks for it will be told
            log.debug("a listing could not be made ahead: %s", e)
            return
        self._ahead[folder, position] = part
        while len(self._ahead) > AHEAD_MAX:
            del self._ahead[next(iter(self._ahead))]
