"""What the VFS does by itself for tmpfs and leaves to a FUSE server: privileges of files, and who sees which names.

Owns: the rules (fs/attr.c `setattr_should_drop_suidgid`, fs/xattr.c `simple_xattr_list`) and what /proc tells of a caller.
Knows no handle. Invariant: of whom /proc tells nothing, nothing is believed.
"""

import os
import stat

import pyfuse3

from cascadefs.metadata.namespace import Namespace
from cascadefs.types import Inode

CAPABILITY = b"security.capability"
TRUSTED = b"trusted."
_CAP_SYS_ADMIN = 1 << 21
_FIRST_USER_NAMESPACE = 0xEFFFFFFD  # its inode number (PROC_USER_INIT_INO)


def without_set_id(mode: int, outside: bool = False) -> int:
    """`mode` as a change of content or owner leaves it: no set-user-id; no set-group-id where the group may execute, or where
    whoever changes it stands `outside` the group. Of folders they mean something else and stay."""
    if stat.S_ISDIR(mode):
        return mode
    return mode & ~(stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP or outside else 0))


def has_set_id(mode: int) -> bool:
    """Of a file: those of folders mean something else and stay."""
    return stat.S_ISREG(mode) and bool(mode & (stat.S_ISUID | stat.S_ISGID))


def are_held(names: Namespace, ino: int) -> bool:
    """Whether a write to the file takes privileges from it."""
    inode = names.find(ino)
    return inode is not None and (has_set_id(inode.mode) or names.xattrs.has(ino, CAPABILITY))


def take_from(names: Namespace, ino: int, may_keep_set_id: bool, outside: bool) -> bool:
    """The content of a file is changed; whether it had any."""
    mode = names.get(ino).mode
    left = mode if may_keep_set_id else without_set_id(mode, outside)
    has_capability = names.xattrs.has(ino, CAPABILITY)
    if left != mode:
        names.update(ino, mode=left)
    if has_capability:
        names.xattrs.remove(ino, CAPABILITY)
    return left != mode or has_capability


def changed_columns(inode: Inode, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields) -> dict[str, int]:
    """What a SETATTR changes in the row of an inode."""
    columns: dict[str, int] = {}
    mode = inode.mode
    if fields.update_mode:
        mode = stat.S_IFMT(mode) | (attr.st_mode & 0o7777)
    if fields.update_uid:
        columns["uid"] = attr.st_uid
    if fields.update_gid:
        columns["gid"] = attr.st_gid
    timed = fields.update_atime or fields.update_mtime or fields.update_size
    if not fields.update_mode and not timed:  # chown, also one that names neither owner nor group
        mode = without_set_id(mode)
    if mode != inode.mode:
        columns["mode"] = mode
    return columns


def is_outside(pid: int, gid: int, of: int) -> bool:
    """Whether a caller with group `gid` is no member of group `of`."""
    groups = _status(pid).get("Groups", "").split()
    return of != gid and str(of) not in groups


def sees_trusted(pid: int, uid: int) -> bool:
    """Whether a caller has CAP_SYS_ADMIN in the first user namespace."""
    if not int(_status(pid).get("CapEff", "0"), 16) & _CAP_SYS_ADMIN:
        return False
    try:
        return os.stat(f"/proc/{pid}/ns/user").st_ino == _FIRST_USER_NAMESPACE
    except OSError:  # a daemon of an ordinary user may not look
        return uid == 0


def _status(pid: int) -> dict[str, str]:
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as lines:
            return dict(line.rstrip("\n").split(":", 1) for line in lines if ":" in line)
    except OSError:
        return {}
