"""A file whose memory is gone comes back from its durable object and the log of patches on top of it (patches.py).

Owns: putting both together into a staged file, which is then sealed and flushed like any other. Invariant: base and log stay
what the inode falls back to until the new object is durable.
"""

import logging
import os
from contextlib import suppress

from cascadefs.contents.files import Files
from cascadefs.formats.record import PatchHeader
from cascadefs.media import file_io
from cascadefs.tiers import patch_log
from cascadefs.types import Home, Inode

log = logging.getLogger(__name__)


def is_alone(files: Files, ino: int) -> bool:
    """Whether an inode with a log shows nothing but its base: so a rebuilt index has it."""
    inode = files.namespace.find(ino)
    return inode is not None and not inode.home and inode.oid == inode.durable_oid


def bring_back(files: Files, inode: Inode) -> bool:
    """Whether the inode has its patched bytes as a staged file now."""
    number = files.index.logs.get(inode.ino)
    base = files.index.find_oid(inode.durable_oid) if number is not None and inode.durable_oid else None
    if number is None or base is None:
        return False
    path = patch_log.path_of(files.settings.store / patch_log.FOLDER, inode.ino, number)
    header = patch_log.read_header(path)
    if header is None or (header.ino, header.base) != (inode.ino, base.digest):
        log.error("inode %d: %s is damaged or missing: what was synced since its last whole version is lost", inode.ino, path)
        return False
    for home in dict.fromkeys((files.residency.home_for_new(), Home.COLD)):
        try:
            last = _make(files, inode, str(path), home)
        except OSError as e:
            log.error("inode %d: what was synced of it cannot be put together: %s", inode.ino, e)
            with suppress(OSError):
                files.residency.tier_of(home).drop_staged(inode.ino)
        else:
            files.index.set_content(inode.ino, home, None, last.size_bytes)
            files.namespace.update(inode.ino, mtime_ns=last.mtime_ns, ctime_ns=max(inode.ctime_ns, last.ctime_ns))
            files.to_seal[inode.ino] = 0.0
            return True
    return False


def _make(files: Files, inode: Inode, log_path: str, home: Home) -> PatchHeader:
    """The staged file. OSError."""
    path = files.residency.tier_of(home).staged_path(inode.ino)
    files.residency.materialize(files.index.blocks(inode.durable_oid or 0), path, heal=False)
    fd = file_io.open_file(path, os.O_RDWR)
    try:
        last = patch_log.apply(log_path, files.database.identity.secret, fd)
        if last is None:
            raise OSError(f"{log_path} has no patch that is whole")
        os.utime(fd, ns=(inode.atime_ns, last.mtime_ns))
    finally:
        os.close(fd)
    return last
