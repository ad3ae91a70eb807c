"""What no handler does, whatever the store holds: each a function that raises FUSEError with the errno of the refusal."""

import errno
import os

import pyfuse3

from cascadefs.mount.fuse import xattrs
from cascadefs.mount.fuse.virtual import is_virtual

XATTR_KINDS = (b"user.", b"trusted.", b"security.")  # no ACLs: system.posix_acl_* is refused


def refuse_virtual(*inodes: int) -> None:
    if any(is_virtual(ino) for ino in inodes):
        raise pyfuse3.FUSEError(errno.EPERM)


def refuse_others(ctx: pyfuse3.RequestContext) -> None:
    """Control is for root and for whoever mounted; the kernel checks the permissions of .cascade, this is the second lock."""
    if ctx.uid not in (0, os.getuid()):
        raise pyfuse3.FUSEError(errno.EACCES)


def refuse_fact(name: bytes) -> None:
    if name.startswith(xattrs.PREFIX):
        raise pyfuse3.FUSEError(errno.EPERM)


def refuse_kind(name: bytes) -> None:
    if not name.startswith(XATTR_KINDS):
        raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
    if name in XATTR_KINDS:
        raise pyfuse3.FUSEError(errno.EINVAL)
