"""The parking folder: a FileTier on the disk of the store, for staged files and object copies that memory has no room for.

Owns: <store>/parking, and `boot` in it. Invariant: files in parking are never synced (what must be durable goes to extents),
so after a loss of power their bytes are anything. `survived` tells whether the machine has run without a break since they were
written: the page cache holds them then, whatever became of processes.
"""

import os
from pathlib import Path

from cascadefs.media import file_io
from cascadefs.tiers.folder import FileTier

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Parking(FileTier):
    """A FileTier that knows after which boot its files were written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._mark, self._boot = folder / "boot", BOOT_ID.read_bytes()
        self.survived = self._mark.exists() and self._mark.read_bytes() == self._boot

    def trust(self) -> None:
        """Recovery has dealt with what it found: what is here from now on belongs to this boot. Needs no sync: a mark that
        was lost, or is older, says the same: do not trust."""
        if self.survived:
            return
        file_io.remove(self._mark)
        fd = file_io.open_file(self._mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            file_io.write_fully(fd, self._boot, 0)
        finally:
            os.close(fd)
        self.survived = True
