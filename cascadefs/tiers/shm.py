"""The memory tier: a FileTier on a tmpfs of our own with huge pages, or on a plain folder in /dev/shm without privilege.

Owns: the tmpfs mounted at the folder that owner.py has claimed. Invariants:
(1) The tmpfs may hold more than the capacity, for writers that outrun eviction: the kernel writes to it without asking
    us, so its hard limit is the capacity plus BURST_SHARE of the memory that is free now.
(2) Without a mount of our own, usage is summed over the files; with one, the kernel counts it. Then others have a part of
    that filesystem: the capacity is what is left of it at the moment, if that is less than was wanted.
"""

import contextlib
import ctypes
import logging
import os
import time
from pathlib import Path

import humanfriendly

from cascadefs.errors import GONE
from cascadefs.formats.name_ring import PLACE as NAMES
from cascadefs.media import file_io
from cascadefs.media.private_files import private_folder
from cascadefs.tiers.folder import PARTS, FileTier
from cascadefs.tiers.owner import Claim, unsign
from cascadefs.tiers.pages import PageSizes

BURST_SHARE = 0.5
KEPT_FREE = 0.1  # of a filesystem that is not ours alone
ROOMY_BYTES = 256 << 20  # what a writer may write while nobody looks
DIRENT_BYTES, TMPFS_MAGIC = 20, 0x01021994
AHEAD_BYTES = 512 << 20  # 50 ms of a writer of 10 GB/s
COUNT_S, COUNT_PLAIN_S = 0.002, 0.02  # at 20 GB/s 2 ms are 40 MB; a plain folder is counted file by file
OLDER_FILES = "it was a plain folder before, and has files"
MS_NOSUID, MS_NODEV, MS_REMOUNT, MNT_DETACH = 2, 4, 32, 2
log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)


def available_memory() -> int:
    """MemAvailable in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _mount_tmpfs(folder: Path, flags: int, size_bytes: int) -> str | None:
    """None when it worked, else why it did not."""
    options = f"mode=700,size={size_bytes},nr_inodes=0,huge=within_size"
    if _libc.mount(b"cascadefs-memory", os.fsencode(folder), b"tmpfs", flags, options.encode()) == 0:
        return None
    return os.strerror(ctypes.get_errno())


def _would_hide(folder: Path) -> bool:
    """Whether a plain folder has files already: of a time when we might not mount. A tmpfs over them would lose them."""
    parts = [folder / part for part in PARTS]
    return not os.path.ismount(folder) and any(part.is_dir() and any(part.iterdir()) for part in parts)


class ShmTier(FileTier):
    """A FileTier with a capacity. `huge` tells whether it has huge pages, `why_not` why it has not."""

    def __init__(self, claim: Claim, capacity_bytes: int) -> None:
        """In the folder of `claim`, which the store has announced."""
        self.claim, self.capacity_bytes, self._wanted = claim, capacity_bytes, capacity_bytes
        self.is_roomy = True  # else new files are staged on the disk: their writers would meet the end of memory
        self._used, self._counted_until = 0, 0.0
        self._watched: dict[str, int] = {}
        self._mount(claim.folder)
        self.pages = PageSizes(claim.folder if self.huge else None)
        super().__init__(claim.folder)
        self._watch()

    def _mount(self, folder: Path) -> None:
        private_folder(folder)
        claim = self.claim
        if not os.path.ismount(folder):
            claim.sign(folder)  # below the tmpfs, for those who do not see that: another mount namespace
        limit = self._wanted + int(available_memory() * BURST_SHARE)
        flags = MS_NOSUID | MS_NODEV | (MS_REMOUNT if os.path.ismount(folder) else 0)
        self.why_not = OLDER_FILES if _would_hide(folder) else _mount_tmpfs(folder, flags, limit)
        self.own_mount = os.path.ismount(folder)
        self.huge = self.own_mount and self.why_not is None
        claim.hold(folder)
        claim.sign(folder)

    def used_bytes(self) -> int:
        """Bytes in memory; a few milliseconds old, because every create asks."""
        now = time.monotonic()
        if now >= self._counted_until:
            self._counted_until = now + (COUNT_S if self.own_mount else COUNT_PLAIN_S)
            with contextlib.suppress(*GONE):  # somebody took the folder away: loss.py will see
                self._used = self._count()
        return self._used

    def _count(self) -> int:
        if not self.own_mount:
            return self._clamped(super().used_bytes())
        space = os.statvfs(self.folder)
        return (space.f_blocks - space.f_bfree) * space.f_frsize

    def _clamped(self, used_bytes: int) -> int:
        """A filesystem that others fill, too, may have less for us than was wanted, now or from the beginning."""
        space = os.statvfs(self.folder)
        free = max(0, space.f_bavail * space.f_frsize - int(space.f_blocks * space.f_frsize * KEPT_FREE))
        self.capacity_bytes = min(self._wanted, used_bytes + free)
        self.is_roomy = self.capacity_bytes == self._wanted or free >= ROOMY_BYTES
        return used_bytes

    def shortage(self) -> str:
        """Why there is less memory than was wanted; empty: there is not."""
        self.used_bytes()
        if self.capacity_bytes >= self._wanted:
            return ""
        sizes = [humanfriendly.format_size(n, binary=True) for n in (self.capacity_bytes, self._wanted)]
        return f"the filesystem of {self.folder.parent} has room for {sizes[0]} of the {sizes[1]} wanted"

    def is_whole(self) -> bool:
        """Whether the folders are where they were made."""
        try:
            return all(os.path.samestat(os.fstat(fd), os.stat(path)) for path, fd in self._watched.items())
        except OSError:
            return False

    def lacks(self, staged: int) -> bool:
        """Whether there are fewer files than there must be. tmpfs tells it by the size of a folder, others do not."""
        sizes = [(path, os.stat(path).st_size) for path in (self.staged_folder, self._objects)]
        if not self._counts or any(size % DIRENT_BYTES for _, size in sizes):
            return False
        return any(size // DIRENT_BYTES < known for (_, size), known in zip(sizes, (staged, len(self.objects)), strict=True))

    def _watch(self) -> None:
        self.stop_watching()
        for path in (str(self.folder), self.staged_folder, self._objects, self._private):
            self._watched[path] = file_io.open_file(path, os.O_RDONLY | os.O_DIRECTORY)
        self._counts = file_io.filesystem_magic(self.folder) == TMPFS_MAGIC

    def stop_watching(self) -> None:
        """The store is closed."""
        while self._watched:
            os.close(self._watched.popitem()[1])

    def renew(self) -> None:
        """Make anew what somebody has taken away: in its place, or in another where something else has that."""
        self.claim.begin_again()
        self._mount(self.claim.folder)
        self.pages.move(self.claim.folder if self.huge else None)
        self._settle_in(self.claim.folder)
        self._watch()
        self._counted_until = 0.0

    def room_ahead(self) -> int:
        """Bytes that may be allocated before they are needed: a quarter of what the kernel still gives, within an eighth of
        the capacity."""
        try:
            space = os.statvfs(self.folder)
        except GONE:
            return 0
        return min(space.f_bavail * space.f_frsize // 4, max(self.capacity_bytes // 8, AHEAD_BYTES)) if self.own_mount else 0

    def copy_in(self, source_fd: int, path: str) -> None:
        """As FileTier.copy_in(); a hole would become part of a huge page."""
        with self.pages.small() if file_io.has_gaps(os.fstat(source_fd)) else contextlib.nullcontext():
            super().copy_in(source_fd, path)

    def drop(self, digest: bytes) -> None:
        """As FileTier.drop(); the room counts at once."""
        super().drop(digest)
        self._counted_until = 0.0

    def release(self) -> None:
        """Give the memory back: every copy goes. Only after everything is durable."""
        self.objects.clear()
        self.stop_watching()
        self.claim.close()
        drop_folder(self.folder)


def drop_folder(folder: Path) -> None:
    """A memory tier goes, with all that it knows of; what else somebody put there stays, and the folder with it."""
    with contextlib.suppress(OSError):
        _empty(folder)
    if os.path.ismount(folder):
        if _libc.umount2(os.fsencode(folder), MNT_DETACH):
            log.warning("the memory tier %s stays mounted: %s", folder, os.strerror(ctypes.get_errno()))
            return
        with contextlib.suppress(OSError):
            unsign(folder)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _empty(folder: Path) -> None:
    for part in (*PARTS, NAMES[0]):
        if (folder / part).is_dir() and not (folder / part).is_symlink():
            for name in os.listdir(folder / part):
                with contextlib.suppress(IsADirectoryError):
                    file_io.remove(folder / part / name)
            os.rmdir(folder / part)
    unsign(folder)
