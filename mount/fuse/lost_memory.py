"""What a mount does when somebody else has emptied its memory tier: it lets go of files made in advance, and tells the kernel.

Owns: nothing that stays. Knows loss.py, which calls it, and the parts of a mount that keep files of the tier for later.
"""

import contextlib
import logging
from collections.abc import Sequence

import pyfuse3
import trio

from cascadefs.mount.fuse.catch_up import Answered

log = logging.getLogger(__name__)


def let_go(answered: Answered) -> None:
    """Of all that the mount has for later."""
    with contextlib.suppress(OSError):
        answered.catch_up_or_fail()
    answered.spares.withdraw()
    with contextlib.suppress(OSError):
        answered.grants.end_all()


def tell_kernel(answered: Answered, ino: int, names: Sequence[tuple[int, bytes]]) -> None:
    """An inode has its durable version now, or none; it lost these names in these folders."""
    answered.transport.drop_attributes(ino)
    answered.transport.keep_listing()  # names go without the kernel's doing
    trio.lowlevel.spawn_system_task(trio.to_thread.run_sync, _forget, ino, names)


def _forget(ino: int, names: Sequence[tuple[int, bytes]]) -> None:
    """In a thread: the kernel may wait for pages that it has asked us for."""
    for parent, name in names:
        pyfuse3.invalidate_entry_async(pyfuse3.InodeT(parent), pyfuse3.FileNameT(name), ignore_enoent=True)
    with contextlib.suppress(OSError):
        pyfuse3.invalidate_inode(pyfuse3.InodeT(ino), attr_only=False)
