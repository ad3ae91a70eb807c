"""How large the pages are that a tmpfs with huge pages gives to writers: huge ones where they pay, small ones where they eat.

Owns: the `huge=` option of one mounted tmpfs; who wants it otherwise. A file that grows by its writes gets huge
pages without waste. In a file with gaps each write of 4 KiB would take 2 MiB. The option holds for new pages of all
files; a remount takes 6 us. Threads may share one. Invariant: pages are small exactly while somebody wants them.
"""

import contextlib
import ctypes
import os
from collections.abc import Hashable, Iterator
from pathlib import Path
from threading import Lock

HUGE, SMALL = b"huge=within_size", b"huge=advise"  # "never" would be remembered by the files that are made meanwhile
MS_NOSUID, MS_NODEV, MS_REMOUNT = 2, 4, 32
_libc = ctypes.CDLL(None, use_errno=True)


class PageSizes:
    """Of the tmpfs at `folder`; None: there is nothing to choose."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else os.fsencode(folder)
        self._wanted_by: set[Hashable] = set()
        self._lock = Lock()

    def move(self, folder: Path | None) -> None:
        """The tmpfs is another one, with huge pages so far."""
        with self._lock:
            self._folder = None if folder is None else os.fsencode(folder)
            if self._wanted_by:
                self._remount(SMALL)

    @property
    def are_small(self) -> bool:
        """Whether somebody wants small ones."""
        return bool(self._wanted_by)

    def want_small(self, who: Hashable) -> None:
        """Until this one says that it is enough."""
        with self._lock:
            self._wanted_by.add(who)
            if len(self._wanted_by) == 1:
                self._remount(SMALL)

    def enough(self, who: Hashable) -> None:
        """The reverse; nothing when it wanted none."""
        with self._lock:
            if who in self._wanted_by:
                self._wanted_by.remove(who)
                if not self._wanted_by:
                    self._remount(HUGE)

    @contextlib.contextmanager
    def small(self) -> Iterator[None]:
        """Small ones until the end of a block."""
        who = object()
        self.want_small(who)
        try:
            yield
        finally:
            self.enough(who)

    def _remount(self, option: bytes) -> None:
        """Where it is refused, pages stay as they are: more memory or less speed, no harm."""
        if self._folder is not None:
            _libc.mount(b"cascadefs-memory", self._folder, None, MS_REMOUNT | MS_NOSUID | MS_NODEV, option)
