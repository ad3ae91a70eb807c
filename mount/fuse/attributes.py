"""Inode rows as the kernel wants them. Owns: timeouts. No I/O but statvfs."""

import os
import stat
import struct
from itertools import chain

import pyfuse3

from cascadefs.config import KIB, NAME_MAX
from cascadefs.store import Store
from cascadefs.types import Inode

# Names and attributes change only through this mount, so the kernel sees every change. Exception: times that a write through
# a mapping moves while the file is staged (mappings.py).
STAGED_S, SETTLED_S = 30, 3600
# The kernel may keep that a name is absent, too: none appears past it. Exception: a program is killed while it creates one and
# waits for the next worker; that name may be hidden so long.
ABSENT_S = 600
BLOCK = 4096
FOLDER_BLOCK = 128 * KIB  # opendir(3) of glibc makes its buffer so large, and the kernel asks us for as many entries as fit it
NS = 1_000_000_000
_ATTR_OUT = struct.Struct("<QII3Q3q10I")  # include/uapi/linux/fuse.h, protocol 7.9 and later
# protocol 7.39: the validity, then struct fuse_statx; times are seconds, nanoseconds and a reserved word
_STATX_OUT = struct.Struct("<QII16xIIQIIIHxxQQQQ" + "qI4x" * 4 + "4I112x")
STATX_BASIC_STATS, STATX_BTIME = 0x7FF, 0x800
NO_FILE_YET = bytes(_ATTR_OUT.size)  # for a spare


def _valid_s(inode: Inode, is_mapped: bool) -> int:
    """How long the kernel may keep attributes; `is_mapped` as mappings.py says."""
    if not inode.home:
        return SETTLED_S
    return 0 if is_mapped else STAGED_S


def entry(inode: Inode, cached: bool = True, is_mapped: bool = False) -> pyfuse3.EntryAttributes:
    """An entry reply; `cached` False for what changes behind the kernel's back."""
    e = pyfuse3.EntryAttributes()
    e.st_ino = pyfuse3.InodeT(inode.ino)
    e.generation = 0
    e.entry_timeout = SETTLED_S if cached else 0
    e.attr_timeout = _valid_s(inode, is_mapped) if cached else 0
    e.st_mode = pyfuse3.ModeT(inode.mode)
    e.st_nlink, e.st_uid, e.st_gid, e.st_rdev = inode.nlink, inode.uid, inode.gid, inode.rdev
    e.st_size, e.st_blksize, e.st_blocks = inode.size, _block_of(inode), inode.blocks
    e.st_atime_ns, e.st_mtime_ns, e.st_ctime_ns = inode.atime_ns, inode.mtime_ns, inode.ctime_ns
    return e


def _block_of(inode: Inode) -> int:
    return FOLDER_BLOCK if stat.S_ISDIR(inode.mode) else BLOCK


def getattr_answer(inode: Inode, is_mapped: bool = False) -> bytes:
    """The same as a struct fuse_attr_out, for the transport to answer GETATTR with; of a staged file as its row has it."""
    times = (inode.atime_ns, inode.mtime_ns, inode.ctime_ns)
    seconds, rest = (t // NS for t in times), (t % NS for t in times)
    numbers = (inode.mode, inode.nlink, inode.uid, inode.gid, inode.rdev, _block_of(inode), 0)
    return _ATTR_OUT.pack(_valid_s(inode, is_mapped), 0, 0, inode.ino, inode.size, inode.blocks, *seconds, *rest, *numbers)


def statx_answer(inode: Inode, born_ns: int | None, is_cached: bool, is_mapped: bool = False) -> bytes:
    """A struct fuse_statx_out: what getattr_answer() tells, and the time of birth if it is known."""
    valid_s = _valid_s(inode, is_mapped) if is_cached else 0
    mask = STATX_BASIC_STATS | (0 if born_ns is None else STATX_BTIME)
    owner = (inode.nlink, inode.uid, inode.gid, inode.mode)
    times = ((t // NS, t % NS) for t in (inode.atime_ns, born_ns or 0, inode.ctime_ns, inode.mtime_ns))
    device = (os.major(inode.rdev), os.minor(inode.rdev))
    return _STATX_OUT.pack(
        valid_s, 0, 0, mask, _block_of(inode), 0, *owner, inode.ino, inode.size, inode.blocks, 0, *chain(*times), *device, 0, 0
    )


def statfs_of(store: Store) -> pyfuse3.StatvfsData:
    """The space of the cold tier: that is where everything ends."""
    space, data = store.database.space(), pyfuse3.StatvfsData()
    data.f_bsize = data.f_frsize = BLOCK
    scale = space.f_frsize / BLOCK
    data.f_blocks, data.f_bfree = int(space.f_blocks * scale), int(space.f_bfree * scale)
    data.f_bavail = int(space.f_bavail * scale)
    data.f_files = data.f_ffree = data.f_favail = 1 << 40
    data.f_namemax = NAME_MAX
    return data
