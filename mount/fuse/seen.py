"""Which writes to open files we see, and which files are served so that we see them.

Owns: the rules; the transport has the ranges, and watcher.py hands them on. Invariant: begin() says yes only while nobody
has, or can get, a way to write to the file that is not the transport's: no passthrough handle, hence no mapping past us.
"""

import os

from cascadefs.config import MIB
from cascadefs.media import file_io
from cascadefs.mount.fuse.delegations import Grants
from cascadefs.mount.fuse.handles import Handles
from cascadefs.placement.sources import Source
from cascadefs.store import Store

# A file of such a size that is opened for writing as it is, while nobody else has it open, is served by us in passthrough, too:
# databases do that, and sync after every few pages. Caches make files, and what is longer is more often filled than updated:
# they keep the kernel's speed. Shorter ones are compared in less than a millisecond.
UPDATED_FROM_BYTES, UPDATED_TO_BYTES = 8 * MIB, 256 * MIB


class Seen:
    """Of one mount."""

    def __init__(self, store: Store, handles: Handles, grants: Grants) -> None:
        self._files, self._handles, self._grants, self._transport = store.files, handles, grants, handles.transport

    def begin(self, ino: int) -> bool:
        """Forget what was written so far. False: not every write to this file is seen."""
        live = self._files.live.get(ino)
        if live is None or (self._handles.passthrough and live.directs < live.handles):
            return False
        return self._transport.begin_written(ino)

    def is_updated(self, ino: int, source: Source | None) -> bool:
        """Whether the first writer of an inode, who opens it as it is, and all who come meanwhile, are served by us."""
        if source is None or not self._handles.passthrough:
            return False
        size = os.fstat(source.fd).st_size
        if not UPDATED_FROM_BYTES <= size <= UPDATED_TO_BYTES or not file_io.lease_is_free(source.fd):
            return False
        self._grants.end(ino)  # who has opened it without our knowing is known now
        return not self._files.of(ino).handles
