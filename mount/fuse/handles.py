"""Open files as the kernel knows them: file handle numbers, how the transport serves each, and what a later worker needs.

Owns: the numbers, the writable descriptors of the portable path, backing ids; keeps them in the mount's Table. Invariants:
(1) All passthrough handles of one inode carry the backing id of its one source (sources.py); an id lives as long as its source.
(2) A handle is served by the kernel (passthrough), by the transport's threads (a descriptor), or by read() (a stream). In
    passthrough, too, the transport serves those with O_SYNC or O_DSYNC, whose writes are answered when durable, and those by
    which a write may take privileges from the file.
(3) This process holds a writable descriptor only while a handle of the portable path, or one whose writes we must see, is open:
    else it would block sealing.
"""

import contextlib
import errno
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import pyfuse3

from cascadefs.contents.open_files import Handle
from cascadefs.ext.fuse_transport import FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE, FOPEN_NOFLUSH, Transport
from cascadefs.formats.name_ring import Created
from cascadefs.media import file_io
from cascadefs.mount.fuse import privileges
from cascadefs.mount.fuse.handover import KeptHandle, Table
from cascadefs.mount.fuse.mappings import Mappings, can_map
from cascadefs.placement.sources import Source
from cascadefs.store import Store

log = logging.getLogger(__name__)
UNPASSABLE = (errno.ELOOP, errno.EOPNOTSUPP)  # FUSE_DEV_IOC_BACKING_OPEN: a stack of filesystems; no file with bytes of its own
UNRECORDED = 8  # a worker asks for one backing id at a time; the rest is room for a kernel that skips numbers


@dataclass(slots=True)
class Opened:
    """`fd` is a descriptor of our own, for writing or to seek in, or -1; `flags` and `backing_id` as the transport knows them.
    `outside`: the opener was not in the file's group."""

    handle: Handle
    fd: int
    flags: int = 0
    backing_id: int = 0
    outside: bool = False


class MappingListener(Protocol):
    """Hears of files that could be written through a mapping."""

    def unmapped(self, ino: int) -> None:
        """No mapping writes to it any more."""


class Handles:
    """The table of one mount."""

    def __init__(self, store: Store, transport: Transport, table: Table, passthrough: bool, direct_writes: bool) -> None:
        """`direct_writes`: portable writers bypass the page cache, which would only be filled to be dropped again."""
        self.store, self.transport, self.table = store, transport, table
        self.passthrough, self.direct_writes = passthrough, direct_writes
        self._open: dict[int, Opened] = {}
        self._held: set[int] = set()
        self.mappings = Mappings()
        self._listeners = list[MappingListener]()
        self._by_request: dict[int, int] = {}  # of an earlier worker's handles: the kernel may not have been told of the last
        self._numbers = itertools.count((table.generation << 32) + 1)
        self.open_flags = 0 if store.settings.sync == "close" else FOPEN_NOFLUSH

    def listen(self, listener: MappingListener) -> None:
        """Tell one more."""
        self._listeners.append(listener)

    def number(self) -> int:
        """A number for a handle."""
        return next(self._numbers)

    def add(
        self, handle: Handle, flags: int, request: int, is_root: bool = False, outside: bool = False, new_in: int = 0
    ) -> pyfuse3.FileInfo:
        """Give a handle its number and tell the transport how to serve it. `flags` as given to open(2);
        `is_root`: the opener may write to a file without taking set-id bits from it. `new_in`: the folder that it was
        just made in."""
        fh = self.number()
        self.expect_mapping(handle, flags)
        try:
            by_us = handle.writable and self._is_by_us(handle.ino, flags, is_root)
            opened = self._announce(fh, handle, by_us)
        except BaseException:
            self.store.files.release(handle)
            raise
        opened.outside = outside
        self._open[fh] = opened
        passed = self.passthrough and handle.source is not None and not handle.direct
        backing_id = handle.source.backing_id if passed and handle.source is not None else 0
        self.table.add_handle(KeptHandle(fh, handle.ino, request, backing_id, handle.writable, handle.direct, by_us))
        if handle.writable and handle.source is not None:
            self.transport.watch(handle.ino, fh, new_in, handle.source.fd)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(fh), keep_cache=False)

    def expect_mapping(self, handle: Handle, flags: int) -> bool:
        """A file is about to be opened with these flags. Whether only from now on its attributes are for no time at all."""
        return self.passthrough and can_map(flags) and self.mappings.may_come((handle.ino,))

    def take_spare(self, one: Created, handle: Handle) -> None:
        """The kernel has opened a file that the transport made."""
        if one.for_both:
            self.mappings.may_come((one.ino,))
        self._open[one.fh] = Opened(handle, -1)
        self.table.add_handle(KeptHandle(one.fh, one.ino, one.request, one.backing_id, True, False))

    def register(self, source: Source) -> None:
        """The kernel knows the source's file afterwards. OSError when it does not take it."""
        if not source.backing_id:
            source.backing_id = self.transport.backing_open(source.fd)
            self.table.add_backing(source.backing_id)

    def _passes(self, source: Source) -> bool:
        """Whether the kernel serves the source's file; where it will not (parking on an overlay filesystem), we do."""
        try:
            self.register(source)
        except OSError as e:
            if e.errno not in UNPASSABLE:
                raise
        return bool(source.backing_id)

    def take_granted(self, fh: int, handle: Handle, request: int, backing_id: int) -> None:
        """The transport has answered an OPEN."""
        self._open[fh] = Opened(handle, -1)
        self.table.add_handle(KeptHandle(fh, handle.ino, request, backing_id, False, False))

    def _is_by_us(self, ino: int, flags: int, is_root: bool) -> bool:
        """Whether the reads and writes of a writer come to us as they are, where the kernel could pass them on or cache."""
        if self.passthrough:
            return bool(flags & os.O_DSYNC) or (not is_root and self._has_set_id(ino))
        return self.direct_writes and flags & os.O_ACCMODE == os.O_WRONLY

    def _announce(self, fh: int, handle: Handle, by_us: bool) -> Opened:
        """Tell the transport of a handle."""
        source = handle.source
        if source is None:
            self.transport.set_handle(fh, open_flags=self.open_flags | FOPEN_DIRECT_IO)
        elif self.passthrough and not handle.direct and self._passes(source):
            if by_us:
                return self._serve(fh, source, handle, True, source.backing_id)
            self.transport.set_handle(fh, fd=source.fd, backing_id=source.backing_id, open_flags=self.open_flags)
        else:
            return self._serve(fh, source, handle, handle.direct or by_us)
        return Opened(handle, -1)

    def _serve(self, fh: int, source: Source, handle: Handle, direct: bool, backing_id: int = 0) -> Opened:
        flags = self.open_flags | (FOPEN_DIRECT_IO if direct else FOPEN_KEEP_CACHE)
        fd = os.open(f"/proc/self/fd/{source.fd}", os.O_RDWR | os.O_CLOEXEC) if handle.writable else -1
        opened = Opened(handle, fd, flags, backing_id)
        self._tell(fh, opened, source.fd, handle.writable and privileges.are_held(self.store.namespace, handle.ino))
        return opened

    def _tell(self, fh: int, opened: Opened, readable_fd: int, guarded: bool) -> None:
        self.transport.set_handle(
            fh,
            fd=opened.fd if opened.fd >= 0 else readable_fd,
            backing_id=opened.backing_id,
            open_flags=opened.flags,
            served=True,
            writable=opened.handle.writable,
            guarded=guarded,
        )

    def _has_set_id(self, ino: int) -> bool:
        return privileges.has_set_id(self.store.namespace.get(ino).mode)

    def privileges_changed(self, ino: int) -> None:
        """The file got or lost some: those who write to it by us are watched, or not."""
        guarded = ino in self._held or privileges.are_held(self.store.namespace, ino)
        for fh, opened in self._open.items():
            if opened.handle.ino == ino and opened.handle.writable and opened.flags and opened.fd >= 0:
                self._tell(fh, opened, opened.fd, guarded)

    @contextlib.contextmanager
    def held(self, ino: int) -> Iterator[None]:
        """No thread of the transport writes to the inode: what comes meanwhile comes to Python. In portable mode."""
        self._held.add(ino)
        self.privileges_changed(ino)
        try:
            yield
        finally:
            self._held.discard(ino)
            self.privileges_changed(ino)

    def writers_of(self, ino: int) -> list[int]:
        """Our writable descriptors of it."""
        return [one.fd for one in self._open.values() if one.handle.ino == ino and one.handle.writable and one.fd >= 0]

    def follow(self, ino: int) -> None:
        """Handles that were opened as streams of an object: the transport seeks in the file that their inode has now."""
        path = self.store.files.staged_path(self.store.namespace.get(ino))
        for fh, opened in self._open.items():
            if opened.handle.ino == ino and opened.handle.source is None:
                before, opened.fd = opened.fd, file_io.open_file(path, os.O_RDONLY)
                self.transport.set_handle(fh, fd=opened.fd, open_flags=self.open_flags | FOPEN_DIRECT_IO)
                if before >= 0:
                    os.close(before)

    def inherit(self, opened: Sequence[tuple[int, int, int, int]] = ()) -> None:
        """Take over what an earlier worker had open, and what its transport had made and `opened` (as take_events() tells)
        without its knowing. Before the first request."""
        known = {kept.fh for kept in self.table.handles()}
        made = [one for one in self.store.pending if isinstance(one, Created)]
        unknown = [KeptHandle(one.fh, one.ino, one.request, one.backing_id, True, False) for one in made]
        unknown += [KeptHandle(fh, ino, request, backing_id, False, False) for fh, ino, request, backing_id in opened]
        for kept in unknown:
            if kept.fh not in known:
                self.table.add_handle(kept)
        for kept in self.table.handles():
            try:
                handle = self.store.files.inherit(kept.ino, kept.writable, kept.direct)
                if handle.source is not None and kept.backing_id:
                    handle.source.backing_id = kept.backing_id
                self._open[kept.fh] = self._announce(kept.fh, handle, kept.by_us)
                self._by_request[kept.request] = kept.fh
                if kept.writable and handle.source is not None:
                    self.transport.watch(kept.ino, kept.fh)
            except OSError as e:
                log.warning("an open file of inode %d cannot be taken over: %s", kept.ino, e)
                self.table.remove_handle(kept.fh)
        if self.passthrough:
            self._close_idle_backings()

    def _close_idle_backings(self) -> None:
        """Backing ids that no open file uses, and those that were asked for when the last worker died: ids count up."""
        used = {opened.handle.source.backing_id for opened in self._open.values() if opened.handle.source is not None}
        known = self.table.backings()
        last = max(known, default=0)
        for backing_id in [*(one for one in known if one not in used), *range(last + 1, last + 1 + UNRECORDED)]:
            with contextlib.suppress(FileNotFoundError):
                self.transport.backing_close(backing_id)
            self.table.remove_backing(backing_id)

    def forget_request(self, request: int) -> None:
        """A request comes again whose answer the kernel never got: nobody has the handle that was made for it."""
        if (fh := self._by_request.pop(request, None)) is not None:
            self.remove(fh)

    def get(self, fh: int) -> Opened | None:
        """The handle of that number; None for one that an earlier worker had no room to hand on."""
        return self._open.get(fh)

    def remove(self, fh: int) -> None:
        """RELEASE: the kernel will not use it again."""
        self.transport.drop_handle(fh)  # also of one that was opened by a grant and closed before we heard of it
        opened = self._open.pop(fh, None)
        if opened is None:
            return
        self.table.remove_handle(fh)
        if opened.fd >= 0:
            os.close(opened.fd)
        self._look_for_mappings(opened.handle)
        self.store.files.release(opened.handle)

    def _look_for_mappings(self, handle: Handle) -> None:
        if handle.writable and self.store.files.of(handle.ino).writers == 1 and self.mappings.closed(handle):
            for listener in self._listeners:
                listener.unmapped(handle.ino)

    def all_handles(self) -> list[Handle]:
        """Handles that are open, for when the mount is gone and nobody will close them."""
        return [opened.handle for opened in self._open.values()]

    def source_closes(self, source: Source) -> None:
        """The kernel needs its backing id no more."""
        if source.backing_id:
            self.transport.backing_close(source.backing_id)
            self.table.remove_backing(source.backing_id)
            source.backing_id = 0
