"""Answers to READDIRPLUS of real folders, each made by one statement and given to the kernel past pyfuse3.

Owns: the dots, the lookup counts of what was listed. Knows no format: ext/listing.pyx packs. `.cascade`, requests that are sent
again and those that are too many come to operations.py `readdir` instead. Invariants: (1) An answer is made, counted and sent
without an await. (2) An entry is counted as a lookup if the kernel took the answer; dots are not.
"""

import os

import trio

from cascadefs.crash import point
from cascadefs.ext import listing
from cascadefs.mount.answered import Answered
from cascadefs.mount.guard import errno_of
from cascadefs.namespace import Namespace
from cascadefs.store import Store


class Listings:
    """Those of one mount."""

    def __init__(self, store: Store, answered: Answered) -> None:
        self.answered, self.transport, self.files = answered, answered.transport, store.files
        self.names: Namespace = store.namespace
        self.is_possible = store.database.has_function(listing.FUNCTION)
        residency = store.residency
        self._staged = os.fsencode(residency.memory.staged_folder), os.fsencode(residency.parking.staged_folder)

    async def serve(self) -> None:
        """Answer what comes. Without the function everything goes to pyfuse3."""
        if not self.is_possible:
            return
        wake_fd = self.transport.take_listings()
        while True:
            while (asked := self.transport.next_listing()) is not None:
                self._answer(*asked)
                await trio.lowlevel.checkpoint()
            await trio.lowlevel.wait_readable(wake_fd)

    def _answer(self, request: int, folder: int, position: int, room: int) -> None:
        try:
            self.transport.take_replies()  # others need not wait for what follows
            self._answer_or_fail(request, folder, position, room)
        except Exception as e:
            self.transport.answer_listing(request, b"", errno_of("readdirplus", e))

    def _answer_or_fail(self, request: int, folder: int, position: int, room: int) -> None:
        self.answered.prepare("readdir")
        if position == 0:
            self.answered.catch_up()
        dots = self._dots(folder, position)
        entries, inodes = self._entries(folder, max(0, position - listing.DOTS), room - len(dots))
        self.files.lookups.update(inodes)
        point("answer")
        if not self.transport.answer_listing(request, dots + entries if dots else entries):
            self.answered.forget((ino, 1) for ino in inodes)

    def _dots(self, folder: int, position: int) -> bytes:
        found = b""
        for at, name in enumerate((b".", b".."), 1):
            if at > position and (inode := self.names.lookup(folder, name)) is not None:
                found += self.names.packed(listing.FUNCTION, inode.ino, name, at - listing.DOTS)
        return found

    def _entries(self, folder: int, after: int, room: int) -> tuple[bytes, list[int]]:
        """What fits of the entries behind the cookie `after`, and their inodes."""
        entries = self.names.packed_listing(listing.FUNCTION, folder, after, room, room // listing.ENTRY_BYTES)
        inodes, staged = listing.inodes(entries)
        return listing.renewed(entries, *self._staged) if staged else entries, inodes
