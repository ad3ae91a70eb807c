"""The extent that still grows: who may write to it, where, and when it is sealed.

Owns: the lock of flushing. Invariant: whoever appends holds `lock` from asking for the tail until the places are committed, or
given up; what lies behind the tail then is cut off by the next append.
"""

import errno
from functools import partial

import trio

from cascadefs.contents.files import Files
from cascadefs.crash import point
from cascadefs.errors import os_error
from cascadefs.media import file_io


class OpenExtent:
    """Of one store."""

    def __init__(self, files: Files) -> None:
        self._files, self._index, self._cold = files, files.index, files.residency.cold
        self.lock = trio.Lock()
        self._own = 0  # the extent that is known to have no other name
        self.placed: dict[bytes, None] = {}  # digests of objects that are durable once the index is synced

    async def tail(self, for_data: bool = True) -> tuple[int, int]:
        """(number, where the next record goes); the next extent is made when there is none. ENOSPC for new data while what is
        left of the disk is needed to free space."""
        database = self._files.database
        if for_data and not database.reserve.fill():
            full = os_error(errno.ENOSPC, "extents")
            database.health.failed("cold tier", full)
            raise full
        found = self._index.open_extent()
        if found is None:
            number = self._index.next_extent()
            size = await trio.to_thread.run_sync(self._cold.create, number)
            self._files.bulk.place((), number, size)
            self._own = number
            return number, size
        if found[0] != self._own:
            await trio.to_thread.run_sync(file_io.make_own, self._cold.path(found[0]))
            self._own = found[0]
        return found

    async def seal_if_full(self, number: int, end: int) -> None:
        """Give it its footer when it has reached its size."""
        if end < self._files.settings.extent_size:
            return
        records = self._index.extent_records(number)
        size = await trio.to_thread.run_sync(partial(self._cold.seal, number, end, records))
        point("extent sealed")
        self._index.seal_extent(number, size)
