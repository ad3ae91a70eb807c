"""What a mount does when somebody else has emptied its memory tier: it lets go of files made in advance, and tells the kernel.

Owns: nothing that stays. Knows loss.py, which calls it, and the parts of a mount that keep files of the tier for later.
"""

import contextlib
import logging

import pyfuse3
import trio

from cascadefs.mount.fuse.catch_up import Answered
from cascadefs.store import Store

log = logging.getLogger(__name__)


def attach(store: Store, answered: Answered) -> None:
    """From now on the mount hears of it."""

    def let_go() -> None:
        with contextlib.suppress(OSError):
            answered.catch_up_or_fail()
        answered.spares.withdraw()
        with contextlib.suppress(OSError):
            answered.grants.end_all()

    def fell_back(ino: int, names: list[tuple[int, bytes]]) -> None:
        answered.transport.drop_attributes(ino)
        answered.transport.keep_listing()  # names go without the kernel's doing
        trio.lowlevel.spawn_system_task(trio.to_thread.run_sync, _forget, ino, names)

    store.loss.before, store.loss.fell_back = let_go, fell_back


def _forget(ino: int, names: list[tuple[int, bytes]]) -> None:
    """In a thread: the kernel may wait for pages that it has asked us for."""
    for parent, name in names:
        pyfuse3.invalidate_entry_async(pyfuse3.InodeT(parent), pyfuse3.FileNameT(name), ignore_enoent=True)
    with contextlib.suppress(OSError):
        pyfuse3.invalidate_inode(pyfuse3.InodeT(ino), attr_only=False)
