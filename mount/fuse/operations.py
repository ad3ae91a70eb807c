"""The handlers that pyfuse3 calls: names, attributes and opens, each a few lines over the store.

Owns: the translation between FUSE and the store, lookup counts. Bytes of open files do not come by here, except streams and
writes that found no space. Invariants: (1) Every handler is guarded. (2) What the kernel was told of an inode by an entry
reply is counted in `files.lookups`, and taken off by forget(). (3) Between two awaits a handler is atomic.
"""

import errno
import itertools
import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

import pyfuse3
import trio

from cascadefs.contents.open_files import Handle
from cascadefs.errors import os_error
from cascadefs.ext.listing import DOTS
from cascadefs.metadata.namespace import RENAME_EXCHANGE, ROOT
from cascadefs.mount import control
from cascadefs.mount.fuse import virtual, xattrs
from cascadefs.mount.fuse.attributes import ABSENT_S, entry, getattr_answer, statfs_of
from cascadefs.mount.fuse.catch_up import Answered
from cascadefs.mount.fuse.guard import guard_all
from cascadefs.mount.fuse.handles import Handles
from cascadefs.mount.fuse.listings import Listings
from cascadefs.mount.fuse.others import Others
from cascadefs.mount.fuse.privileges import CAPABILITY, TRUSTED, changed_columns, has_set_id, is_outside, sees_trusted
from cascadefs.mount.fuse.refusals import refuse_fact, refuse_kind, refuse_others, refuse_virtual
from cascadefs.mount.fuse.resent import Once
from cascadefs.mount.fuse.virtual import Virtual, is_virtual
from cascadefs.mount.fuse.writes import ALLOCATION, Writes
from cascadefs.store import Store
from cascadefs.types import Inode

Context: TypeAlias = pyfuse3.RequestContext
Info: TypeAlias = pyfuse3.FileInfo
Entry: TypeAlias = pyfuse3.EntryAttributes
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR
NAMELESS = b"/"  # the name that stands for none
# File handles of .cascade/: this bit, the inode, and a count, so that a later worker can tell what they stand for.
TEXT_HANDLES, TEXT_STEP, TEXT_COUNTS = 1 << 62, 1 << 48, 0xFFF << 48


@guard_all
class Operations(pyfuse3.Operations):
    """One mount of one store."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, store: Store, handles: Handles, shown: Virtual, once: Once) -> None:
        super().__init__()
        self.store, self.handles, self.virtual, self.transport = store, handles, shown, handles.transport
        self.once, self.answered = once, Answered(store, handles, once)
        self.listings = Listings(store, self.answered)
        self.writes = Writes(store, handles, self.answered)
        self.others = Others(store, handles.mappings, shown)
        self.files, self.names = store.files, store.namespace
        self.syncs_at_close = store.settings.sync == "close"
        self.drops_memory = False  # after unmounting: asked for by `cascadefs umount --drop-memory`
        self._texts: dict[int, bytes] = {}

    # --- names

    def _told(self, inode: Inode) -> Entry:
        """An entry reply: the kernel knows the inode once more."""
        self.files.lookups[inode.ino] = self.files.lookups.get(inode.ino, 0) + 1
        return self._entry(self.files.with_staged(inode))

    def _entry(self, inode: Inode) -> Entry:
        return entry(inode, is_mapped=inode.ino in self.handles.mappings)

    async def lookup(self, parent: int, name: bytes, ctx: Context) -> Entry:
        """LOOKUP."""
        shown = is_virtual(parent) or (parent == ROOT and name == virtual.NAME)
        found = self.virtual.lookup(parent, name) if shown else self.names.lookup(parent, name)
        if found is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return entry(found, cached=False) if shown else self._told(found)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """FORGET: inodes without name and user go now."""
        self.answered.forget(inode_list)

    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, ctx: Context) -> Entry:
        """MKNOD: files, fifos, sockets, devices."""
        return self._told(self._made(parent, name, ctx) or self._make_once(parent, name, mode & ~ctx.umask, ctx, rdev=rdev))

    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: Context) -> Entry:
        """MKDIR."""
        mode = stat.S_IFDIR | (mode & 0o7777 & ~ctx.umask)
        return self._told(self._made(parent, name, ctx) or self._make_once(parent, name, mode, ctx))

    async def symlink(self, parent: int, name: bytes, target: bytes, ctx: Context) -> Entry:
        """SYMLINK."""
        made = self._made(parent, name, ctx)
        return self._told(made or self._make_once(parent, name, stat.S_IFLNK | 0o777, ctx, target=target))

    def _made(self, parent: int, name: bytes, ctx: Context) -> Inode | None:
        """What an earlier worker made for this very request."""
        return self.names.lookup(parent, name) if self.once.is_done(ctx) else None

    def _make_once(
        self, parent: int, name: bytes, mode: int, ctx: Context, rdev: int = 0, target: bytes | None = None
    ) -> Inode:
        with self.once.operation(ctx, parent) as op:
            return self._make(parent, name, mode, ctx, op, rdev, target)

    def _make(
        self,
        parent: int,
        name: bytes,
        mode: int,
        ctx: Context,
        op: int,
        rdev: int = 0,
        target: bytes | None = None,
        home: int = 0,
    ) -> Inode:
        refuse_virtual(parent)
        with self._new_name(parent, name):
            made, folder = self.names.make_in(parent, name, mode, ctx.uid, ctx.gid, rdev, target, home, op)
        self.transport.set_attributes(parent, getattr_answer(folder))
        return made

    @contextmanager
    def _new_name(self, parent: int, name: bytes) -> Iterator[None]:
        """The transport answers lookups of names that it does not know: it hears of a name before the namespace does."""
        self.transport.add_name(parent, name)
        try:
            yield
        except BaseException:
            self.transport.remove_name(parent, name)
            raise

    def _gone_name(self, parent: int, name: bytes, ino: int) -> None:
        self.transport.drop_attributes(ino)
        self.transport.remove_name(parent, name)
        self._folders_changed(parent)
        if self.answered.inherited:  # the kernel has looked up what it removes, if only in an earlier worker's time
            self.files.lookups.setdefault(ino, 1)
        self.files.forget_if_gone(ino)

    def _folders_changed(self, *inodes: int) -> None:
        """The kernel asks for a folder's attributes after each change in it: the transport gets the answer in advance."""
        for ino in set(inodes):
            self.transport.set_attributes(ino, getattr_answer(self.names.get(ino)))

    async def inform_transport(self) -> None:
        """Tell the transport every name there is, while requests are served: it answers lookups of others by itself afterwards.

        A name that is made or removed meanwhile may be counted once too often: then its lookup is asked of Python, no more.
        """
        self.transport.set_capabilities(self.names.xattrs.any_has(CAPABILITY))
        for names in self.names.all_names():
            for parent, name in names:
                self.transport.add_name(parent, name)
            await trio.lowlevel.checkpoint()
        self.transport.names_are_complete(ABSENT_S)

    async def link(self, inode: int, new_parent: int, new_name: bytes, ctx: Context) -> Entry:
        """LINK."""
        refuse_virtual(inode, new_parent)
        if (linked := self._made(new_parent, new_name, ctx)) is not None:
            return self._told(linked)
        with self._new_name(new_parent, new_name), self.once.operation(ctx, new_parent) as op:
            was_nameless = self.names.get(inode).nlink == 0
            linked = self.names.link(inode, new_parent, new_name, op, may_be_first=True)  # the kernel knows which may
        self.answered.grants.renew(inode, linked)
        self._folders_changed(new_parent)
        if was_nameless:  # an fsync before had no name to tell, and did nothing
            await self.store.mover.fsync(inode)
        return self._told(self.names.get(inode))

    async def readlink(self, inode: int, ctx: Context) -> bytes:
        """READLINK."""
        return self.names.get(inode).target or b""

    async def unlink(self, parent: int, name: bytes, ctx: Context) -> None:
        """UNLINK."""
        refuse_virtual(parent)
        self.files.last_use = time.monotonic()
        if self.once.is_done(ctx):
            return
        with self.once.operation(ctx, parent) as op:
            gone = self.store.database.reserve.lend(partial(self.names.unlink, parent, name, op)).ino
        self._gone_name(parent, name, gone)

    async def rmdir(self, parent: int, name: bytes, ctx: Context) -> None:
        """RMDIR."""
        refuse_virtual(parent)
        if self.once.is_done(ctx):
            return
        with self.once.operation(ctx, parent) as op:
            gone = self.store.database.reserve.lend(partial(self.names.rmdir, parent, name, op)).ino
        self._gone_name(parent, name, gone)

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, ctx: Context) -> None:
        """RENAME2."""
        refuse_virtual(parent, new_parent)
        if (parent, name) == (ROOT, virtual.NAME) or (new_parent, new_name) == (ROOT, virtual.NAME):
            raise pyfuse3.FUSEError(errno.EPERM)
        if self.once.is_done(ctx):
            return
        if flags & RENAME_EXCHANGE:
            with self.once.operation(ctx, new_parent) as op:
                self.names.rename(parent, name, new_parent, new_name, flags, op)
            self._folders_changed(parent, new_parent)
            self._renew_attributes((parent, name), (new_parent, new_name))
            return
        with self._new_name(new_parent, new_name), self.once.operation(ctx, new_parent) as op:
            move = partial(self.names.rename, parent, name, new_parent, new_name, flags, op)
            moved, replaced = self.store.database.reserve.lend(move) if self.names.lookup(new_parent, new_name) else move()
        self.transport.remove_name(*((parent, name) if moved else (new_parent, new_name)))
        if replaced is not None:
            self._gone_name(new_parent, new_name, replaced.ino)
        self._folders_changed(parent, new_parent)
        self._renew_attributes((new_parent, new_name))

    def _renew_attributes(self, *places: tuple[int, bytes]) -> None:
        """What was moved to these places has a new time of change."""
        for parent, name in places:
            if (moved := self.names.lookup(parent, name)) is not None:
                self.answered.grants.renew(moved.ino, moved)
                self.transport.tell_name(parent, name, moved.ino)

    # --- folders

    async def opendir(self, inode: int, ctx: Context) -> int:
        """OPENDIR."""
        if is_virtual(inode):
            refuse_others(ctx)
        self.answered.catch_up()
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """READDIRPLUS that listings.py does not answer. Positions: 1 and 2 after the dots, then DOTS more than the cookies."""
        for position, name, inode in self._dots_and(fh, start_id):
            dot, shown = position <= DOTS, is_virtual(inode.ino)
            attributes = entry(inode, cached=False) if shown else self._entry(self.files.with_staged(inode))
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), attributes, position):
                return
            if not shown and not dot:  # the kernel counts no lookup for dots
                self.files.lookups[inode.ino] = self.files.lookups.get(inode.ino, 0) + 1

    def _dots_and(self, folder: int, after: int) -> Iterator[tuple[int, bytes, Inode]]:
        source = self.virtual if is_virtual(folder) else self.names
        for position, name in ((1, b"."), (2, b"..")):
            if position > after and (inode := source.lookup(folder, name)) is not None:
                yield position, name, inode
        entries = self.virtual if is_virtual(folder) else self.listings
        for cookie, name, inode in entries.listing(folder, max(0, after - DOTS)):
            yield cookie + DOTS, name, inode

    async def releasedir(self, fh: int) -> None:
        """RELEASEDIR."""

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """FSYNCDIR: names are durable; of .cascade: everything is, while the kernel holds the folder's lock: `cascadefs flush`
        syncs a file in it instead, beside which `status` can look up its own."""
        self.answered.catch_up()
        if fh == virtual.FOLDER:
            await self.store.flush()
        else:
            await self.store.mover.fsync_folder(fh)

    # --- attributes

    async def getattr(self, inode: int, ctx: Context) -> Entry:
        """GETATTR."""
        if is_virtual(inode):
            return entry(self.virtual.inode(inode), cached=False)
        return self._entry(self.files.attributes(inode))

    async def setattr(self, inode: int, attr: Entry, fields: pyfuse3.SetattrFields, fh: int | None, ctx: Context) -> Entry:
        """SETATTR: truncate, chmod, chown, utimens."""
        refuse_virtual(inode)
        self.transport.drop_attributes(inode)
        if fields.update_size:
            with self.answered.grants.held_back(inode):
                self.answered.catch_up()  # a reader that has left must not be taken for one that stays
                await self.files.truncate(inode, attr.st_size, by_handle=fh is not None)
            self.answered.grants.want(inode)
            outside = self._is_outside(inode, ctx.pid, ctx.gid)
            self.writes.take_privileges(inode, may_keep_set_id=ctx.uid == 0, outside=outside, tell_kernel=False)
        columns = changed_columns(self.names.get(inode), attr, fields)
        if columns or not (fields.update_size or fields.update_atime or fields.update_mtime):
            self.names.update(inode, **columns, ctime_ns=time.time_ns())
        if has_set_id(columns.get("mode", 0)):
            self.handles.privileges_changed(inode)
        if fields.update_atime or fields.update_mtime:
            atime = attr.st_atime_ns if fields.update_atime else None
            self.files.set_times(inode, atime, attr.st_mtime_ns if fields.update_mtime else None)
        found = self.names.get(inode)
        self.answered.grants.renew(inode, found)
        return self._entry(self.files.with_staged(found))

    async def statfs(self, ctx: Context) -> pyfuse3.StatvfsData:
        """STATFS."""
        return statfs_of(self.store)

    async def getxattr(self, inode: int, name: bytes, ctx: Context) -> bytes:
        """GETXATTR."""
        if name.startswith(xattrs.PREFIX) and not is_virtual(inode):
            self.answered.catch_up()
            return await xattrs.fact(self.store, inode, name)
        if ctx.pid == -1:
            return await self.others.answer(inode, name)
        told, value = control.split(name)
        if inode == virtual.FOLDER and told in control.NAMES and value:
            self._hear(told, value, ctx)
            return b""
        refuse_kind(name)
        return self.names.xattrs.get(inode, name)

    def _hear(self, name: bytes, value: bytes, ctx: Context) -> None:
        """What `control.tell` sends."""
        refuse_others(ctx)
        if name == os.fsencode(control.DROP_MEMORY):
            self.drops_memory = value == b"1"
        elif name == os.fsencode(control.KEEP_MEMORY):
            self.store.keeps_memory_s = _seconds(value)
        else:
            self.store.verifier.request()

    async def listxattr(self, inode: int, ctx: Context) -> list[bytes]:
        """LISTXATTR."""
        found = [] if is_virtual(inode) else self.names.xattrs.names(inode)
        if any(name.startswith(TRUSTED) for name in found) and not sees_trusted(ctx.pid, ctx.uid):
            return [name for name in found if not name.startswith(TRUSTED)]
        return found

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: Context) -> None:
        """SETXATTR; pyfuse3 has checked XATTR_CREATE and XATTR_REPLACE."""
        if (name, ctx.pid) == (ALLOCATION, -1):
            await self.writes.allocate(value, is_root=ctx.uid == 0)
            return
        if inode == virtual.FOLDER and name in control.NAMES:
            self._hear(name, value, ctx)
            return
        refuse_virtual(inode)
        refuse_fact(name)
        refuse_kind(name)
        self.transport.drop_attributes(inode)
        if name == CAPABILITY:
            self.transport.set_capabilities(True)
        self.names.xattrs.put(inode, name, value)
        if name == CAPABILITY:
            self.handles.privileges_changed(inode)
        self.answered.grants.renew(inode, self.names.find(inode))

    async def removexattr(self, inode: int, name: bytes, ctx: Context) -> None:
        """REMOVEXATTR."""
        refuse_virtual(inode)
        refuse_fact(name)
        refuse_kind(name)
        self.transport.drop_attributes(inode)
        if not self.once.is_done(ctx):
            with self.once.operation(ctx, inode) as op:
                self.names.xattrs.remove(inode, name, op)

    # --- open files

    async def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: Context) -> tuple[Info, Entry]:
        """CREATE: a new file, staged, open for its creator; TMPFILE, which the transport puts as this: one without a name."""
        request = self.once.request(ctx)
        if (made := self._made(parent, name, ctx)) is not None:
            self.handles.forget_request(request)
            with self.answered.grants.held_back(made.ino):
                handle = await self.files.open(made.ino, True)
            return self.handles.add(handle, flags, request), self._told(made)
        home = self.store.residency.home_for_new()
        kind = stat.S_IFREG | (mode & 0o7777 & ~ctx.umask)
        if name == NAMELESS:
            return self._create_nameless(parent, kind, flags, home, ctx)
        try:
            with self.once.operation(ctx, parent) as op:
                inode, handle = self.files.create(partial(self._make, parent, name, kind, ctx, op, home=home))
        except OSError:
            self._folders_changed(parent)  # the transport may have been told of a change that was rolled back
            raise
        try:
            info = self.handles.add(handle, flags, request, is_root=ctx.uid == 0, new_in=parent)
        except BaseException:
            gone = self.store.database.reserve.lend(partial(self.names.unlink, parent, name))
            self._gone_name(parent, name, gone.ino)
            raise
        self.files.lookups[inode.ino] = 1
        self.transport.tell_name(parent, name, inode.ino)
        self.answered.grants.opened(handle)
        return info, self._entry(self.files.with_staged(inode))  # modified: as the kernel stamps files, a tick late

    def _create_nameless(self, parent: int, kind: int, flags: int, home: int, ctx: Context) -> tuple[Info, Entry]:
        """O_TMPFILE. Sent again, it is made again: nobody holds the first one, which goes with the handle of the request."""
        refuse_virtual(parent)
        request = self.once.request(ctx)
        self.handles.forget_request(request)
        inode, handle = self.files.create(partial(self.names.make_nameless, parent, kind, ctx.uid, ctx.gid, home))
        info = self.handles.add(handle, flags, request, is_root=ctx.uid == 0)
        self.files.lookups[inode.ino] = 1
        return info, self._entry(inode)

    async def open(self, inode: int, flags: int, ctx: Context) -> Info:
        """OPEN."""
        self.answered.catch_up()
        if is_virtual(inode):
            refuse_others(ctx)
            return self._open_text(inode, flags)
        request = self.once.request(ctx)
        self.handles.forget_request(request)
        if not flags & (WRITE_FLAGS | os.O_TRUNC):
            return self._opened(await self.files.open(inode, False), flags, request, ctx)
        outside = self._is_outside(inode, self.transport.pid_of(ctx.pid), ctx.gid)
        with self.answered.grants.held_back(inode):
            handle = await self.files.open(inode, bool(flags & WRITE_FLAGS), bool(flags & os.O_TRUNC))
        if flags & os.O_TRUNC:
            self.writes.take_privileges(inode, may_keep_set_id=ctx.uid == 0, outside=outside)
        return self._opened(handle, flags, request, ctx, outside)

    def _opened(self, handle: Handle, flags: int, request: int, ctx: Context, outside: bool = False) -> Info:
        is_news = self.handles.expect_mapping(handle, flags)
        info = self.handles.add(handle, flags, request, ctx.uid == 0, outside)
        self.answered.grants.opened(handle)
        if is_news:
            pyfuse3.invalidate_inode(pyfuse3.InodeT(handle.ino), attr_only=True)
        return info

    def _is_outside(self, ino: int, pid: int, gid: int) -> bool:
        """Whether the caller is not in the group of a file that sets it at execution; else it does not matter."""
        inode = self.names.get(ino)
        return has_set_id(inode.mode) and is_outside(pid, gid, inode.gid)

    def _open_text(self, inode: int, flags: int) -> Info:
        if flags & WRITE_FLAGS:
            raise os_error(errno.EACCES)
        fh = next(n for n in itertools.count(TEXT_HANDLES | inode, TEXT_STEP) if n not in self._texts)
        self._texts[fh] = self._text(inode)
        return Info(fh=pyfuse3.FileHandleT(fh), direct_io=True, keep_cache=False)

    def _text(self, inode: int) -> bytes:
        return self.virtual.text(inode) if inode > virtual.FOLDER else b""

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """READ of what the transport does not serve: streams, and files of .cascade/."""
        if fh & TEXT_HANDLES:
            inode = _text_inode(fh)
            return await self.virtual.read(inode, off, size, self._texts.get(fh) or self._text(inode))
        if (opened := self.handles.get(fh)) is None:
            raise os_error(errno.EBADF)
        return await self.store.streams.read(opened.handle.ino, off, size)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """WRITE that the transport could not answer alone."""
        return await self.writes.write(fh, off, buf)

    async def flush(self, fh: int) -> None:
        """FLUSH comes only with --sync close."""
        if self.syncs_at_close and (opened := self.handles.get(fh)) is not None and opened.handle.writable:
            await self.store.mover.fsync(opened.handle.ino)

    async def fsync(self, fh: int, datasync: bool) -> None:
        """FSYNC: data and name are durable afterwards; of .cascade/flush: everything is. Writes through mappings may have
        changed times: ask again."""
        if fh & TEXT_HANDLES:
            if _text_inode(fh) == virtual.FLUSH:
                self.answered.catch_up()
                await self.store.flush()
            return
        self.answered.catch_up()
        if (opened := self.handles.get(fh)) is None:
            await self.store.flush()  # it is not known which file is meant
            return
        ino = opened.handle.ino
        await self.store.mover.fsync(ino)
        pyfuse3.invalidate_inode(pyfuse3.InodeT(ino), attr_only=True)

    async def release(self, fh: int) -> None:
        """RELEASE."""
        if fh & TEXT_HANDLES:
            self._texts.pop(fh, None)
        else:
            self.handles.remove(fh)


def _text_inode(fh: int) -> int:
    return fh & ~TEXT_HANDLES & ~TEXT_COUNTS


def _seconds(text: bytes) -> float:
    try:
        return max(0.0, float(text))
    except ValueError:
        raise os_error(errno.EINVAL) from None
