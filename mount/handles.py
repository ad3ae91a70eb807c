"""Open files as the kernel knows them: file handle numbers, and how the transport serves each.

Owns: the numbers, the writable descriptors of the portable path, backing ids. Invariants:
(1) All passthrough handles of one inode carry the backing id of its one source (live.py); an id lives as long as its source.
(2) A handle is served by the kernel (passthrough), by the transport's threads (a descriptor), or by read() (a stream).
(3) This process holds a writable descriptor only while a handle of the portable path is open: else it would block sealing.
"""

import itertools
import os
from dataclasses import dataclass

import pyfuse3

from cascadefs.ext.fuse_transport import FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE, FOPEN_NOFLUSH, Transport
from cascadefs.live import Handle, Source
from cascadefs.store import Store


@dataclass(slots=True)
class Opened:
    """`fd` is a descriptor of our own for writing, or -1."""

    handle: Handle
    fd: int


class Handles:
    """The table of one mount."""

    def __init__(self, store: Store, transport: Transport, passthrough: bool, direct_writes: bool) -> None:
        """`direct_writes`: portable writers bypass the page cache, which would only be filled to be dropped again."""
        self.store, self.transport = store, transport
        self.passthrough, self.direct_writes = passthrough, direct_writes
        self._open: dict[int, Opened] = {}
        self._numbers = itertools.count(1)
        self._flags = 0 if store.settings.sync == "close" else FOPEN_NOFLUSH
        store.files.sources.closing = self._source_closes

    def add(self, handle: Handle, flags: int) -> pyfuse3.FileInfo:
        """Give a handle its number and tell the transport how to serve it. `flags` as given to open(2)."""
        fh = next(self._numbers)
        source, fd = handle.source, -1
        try:
            if source is None:
                size = self.store.namespace.get(handle.ino).size
                self.transport.set_handle(fh, open_flags=self._flags | FOPEN_DIRECT_IO, size_bytes=size)
            elif self.passthrough and not handle.direct:
                if not source.backing_id:
                    source.backing_id = self.transport.backing_open(source.fd)
                self.transport.set_handle(fh, fd=source.fd, backing_id=source.backing_id, open_flags=self._flags)
            else:
                write_only = flags & os.O_ACCMODE == os.O_WRONLY
                fd = self._serve(fh, source, handle, handle.direct or (self.direct_writes and write_only))
        except BaseException:
            self.store.files.release(handle)
            raise
        self._open[fh] = Opened(handle, fd)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(fh), keep_cache=False)

    def _serve(self, fh: int, source: Source, handle: Handle, direct: bool) -> int:
        flags = self._flags | (FOPEN_DIRECT_IO if direct else FOPEN_KEEP_CACHE)
        fd = os.open(f"/proc/self/fd/{source.fd}", os.O_RDWR | os.O_CLOEXEC) if handle.writable else -1
        served_fd = fd if fd >= 0 else source.fd
        self.transport.set_handle(fh, fd=served_fd, open_flags=flags, served=True, writable=handle.writable)
        return fd

    def get(self, fh: int) -> Opened:
        """The handle of that number."""
        return self._open[fh]

    def remove(self, fh: int) -> None:
        """RELEASE: the kernel will not use it again."""
        opened = self._open.pop(fh, None)
        if opened is None:
            return
        self.transport.drop_handle(fh)
        if opened.fd >= 0:
            os.close(opened.fd)
        self.store.files.release(opened.handle)

    def all_handles(self) -> list[Handle]:
        """Handles that are open, for when the mount is gone and nobody will close them."""
        return [opened.handle for opened in self._open.values()]

    def _source_closes(self, source: Source) -> None:
        if source.backing_id:
            self.transport.backing_close(source.backing_id)
            source.backing_id = 0
