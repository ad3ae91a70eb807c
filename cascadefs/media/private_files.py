"""Who may look into a store: folders of our own, closed to others; files that are what they seem.

Owns: the checks when a folder of the store or of the memory tier is opened, and the opening of files below it. Knows no format.
Invariants: (1) After private_folder() the folder is a real one, ours, mode 0700. (2) open_private() follows no symbolic link in
the last part of a path and returns regular files of ours only: what somebody planted is ELOOP or EPERM, never read or written.
"""

import errno
import logging
import os
import stat
from pathlib import Path

from cascadefs.errors import StoreError, os_error

log = logging.getLogger(__name__)
MODE = 0o700


def private_folder(path: Path, follow: bool = False) -> None:
    """Make `path`, or check it: ours, and closed to others (an open one is closed, with one line in the log). `follow`: the
    user may name a store by a symbolic link; what lies inside is never one. Raises StoreError."""
    try:
        if follow or not path.is_symlink():
            path.mkdir(mode=MODE, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    except OSError as e:
        raise StoreError(f"{path} is not a folder that can be used ({e.strerror}); remove it or give another --store") from e
    try:
        found = os.fstat(fd)
        check_owner(path, found)
        if found.st_mode & 0o077:
            log.warning("%s was open to others (mode %o); it is closed now", path, stat.S_IMODE(found.st_mode))
            os.fchmod(fd, MODE)
    finally:
        os.close(fd)


def check_owner(path: Path, found: os.stat_result) -> None:
    """StoreError when it is another user's: root, too, would leave files there that its owner cannot open."""
    if found.st_uid != os.geteuid():
        raise StoreError(
            f"{path} belongs to user {found.st_uid}, not to you ({os.geteuid()}); give a folder of your own, or be that user"
        )


def is_ours(found: os.stat_result) -> bool:
    """A regular file of this user's (lstat or fstat)."""
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()


def check_file(path: Path) -> None:
    """Raise StoreError when something else than a regular file of ours stands at `path`; nothing is fine."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not is_ours(found):
        raise StoreError(f"{path} is not a regular file of yours; somebody put it there: look at it, then remove it")


def open_private(path: str | Path, flags: int, mode: int = 0o600) -> int:
    """open(2) of a file of the store. O_NONBLOCK, so that a planted fifo cannot hold us; it means nothing to regular files."""
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    if is_ours(os.fstat(fd)):
        return fd
    os.close(fd)
    raise os_error(errno.EPERM, str(path))


def truncate_private(path: str, size_bytes: int, by_handle: bool = True) -> None:
    """ftruncate(2) or truncate(2) of a file of the store: they differ in the times of a file that has that size already."""
    fd = open_private(path, os.O_WRONLY)
    try:
        os.truncate(fd if by_handle else f"/proc/self/fd/{fd}", size_bytes)
    finally:
        os.close(fd)
