"""A folder of whole files: staged (mutable, by inode), objects (immutable copies, by digest), private (by inode: which file
serves an inode that shows an object, where that is not the object's copy or may be doubted).

Owns: <folder>/staged, <folder>/objects, <folder>/private. Knows no index and no policy. Invariants:
(1) A file under objects/ or private/ is complete and not written to under that name: it gets it by link or rename when it is
    whole.
(2) `objects` mirrors objects/: digest -> allocated bytes.
"""

import contextlib
import errno
import logging
import os
import re
import stat
from pathlib import Path

from cascadefs.errors import GONE
from cascadefs.ext import digest_names
from cascadefs.media import file_io
from cascadefs.media.private_files import is_ours

PARTS = ("staged", "objects", "private")
_DIGEST, _NUMBER = re.compile("[0-9a-f]{32}"), re.compile("[1-9][0-9]{0,17}")
NO_LEASES = (errno.EINVAL, errno.EOPNOTSUPP)  # of a filesystem such as NFS, which parking may lie on
log = logging.getLogger(__name__)


class FileTier:
    """The memory tier is one (on tmpfs), the staging folder of the cold tier another (on disk)."""

    def __init__(self, folder: Path) -> None:
        self._settle_in(folder)
        # 0 bytes each until Residency.take_copies() tells. Whose a file is, is looked at when it is opened: a stat each.
        self.objects, others = digest_names.listed(self._objects)
        for name in others:
            path = f"{self._objects}/{name}"
            if _DIGEST.fullmatch(name) and stat.S_ISREG(os.lstat(path).st_mode):  # a filesystem that tells no kinds in listings
                self.objects[bytes.fromhex(name)] = 0
            else:
                _remove_foreign(path)

    def _settle_in(self, folder: Path) -> None:
        """It lies there from now on; folders that are missing are made."""
        self.folder = folder
        self.staged_folder, self._objects, self._private = (str(folder / part) for part in PARTS)
        for part in (folder, *(folder / name for name in PARTS)):
            file_io.make_folder(part)

    def staged_path(self, ino: int) -> str:
        """Where the mutable bytes of an inode lie."""
        return f"{self.staged_folder}/{ino}"

    def object_path(self, digest: bytes) -> str:
        """Where the copy of an object lies."""
        return f"{self._objects}/{digest.hex()}"

    def private_path(self, ino: int) -> str:
        """Where the file lies, or has a second name, that serves an inode and no other."""
        return f"{self._private}/{ino}"

    def names(self) -> set[bytes]:
        """Digests of the objects whose copies are here, as the folder says."""
        return set(digest_names.listed(self._objects)[0])

    def staged(self) -> list[int]:
        """Inodes with a staged file here. What is no such file is removed."""
        return _numbered(self.staged_folder)

    def private(self) -> list[int]:
        """Inodes with a private name here. What is no such file is removed."""
        return _numbered(self._private)

    def has_staged(self, ino: int) -> bool:
        """Whether the mutable bytes of an inode are here."""
        try:
            return is_ours(os.lstat(self.staged_path(ino)))
        except GONE:
            return False

    def create_staged(self, ino: int) -> int:
        """An empty staged file; returns a read-only descriptor that the caller closes. An old file of that name goes."""
        path, flags = self.staged_path(ino), os.O_RDONLY | os.O_CREAT | os.O_EXCL
        try:
            return file_io.open_file(path, flags)
        except FileExistsError:
            file_io.remove(path)
            return file_io.open_file(path, flags)

    def adopt(self, ino: int, digest: bytes) -> None:
        """The staged file gets an object's name as well (no copying). The staged name stays until drop_staged()."""
        path = self.object_path(digest)
        file_io.link(self.staged_path(ino), path)
        self.objects[digest] = self.allocated_bytes(digest)

    def unadopt(self, digest: bytes, ino: int) -> None:
        """The object's file gets a staged name as well. The object name stays until drop()."""
        file_io.link(self.object_path(digest), self.staged_path(ino))

    def link_private(self, digest: bytes, ino: int) -> None:
        """The object's file gets a private name as well."""
        file_io.link(self.object_path(digest), self.private_path(ino))

    def drop_staged(self, ino: int) -> None:
        """Remove a staged name; open descriptors stay valid."""
        file_io.remove(self.staged_path(ino))

    def drop_private(self, ino: int) -> None:
        """Remove a private name; open descriptors stay valid."""
        file_io.remove(self.private_path(ino))

    def drop(self, digest: bytes) -> None:
        """Remove the copy of an object; open descriptors stay valid."""
        self.objects.pop(digest, None)
        file_io.remove(self.object_path(digest))

    def open_object(self, digest: bytes) -> int:
        """A read-only descriptor that the caller closes."""
        return file_io.open_file(self.object_path(digest), os.O_RDONLY)

    def copy_in(self, source_fd: int, path: str) -> None:
        """Copy an open file to `path` in this tier; holes stay holes. Blocks."""
        file_io.copy_file(source_fd, path)

    def is_copy(self, fd: int, digest: bytes) -> bool:
        """Whether an open file still is the copy of an object: as long as it is, nobody has written to it."""
        return digest in self.objects and os.path.samestat(os.fstat(fd), os.lstat(self.object_path(digest)))

    def place_object(self, path: str, digest: bytes) -> None:
        """A whole file at `path` (same filesystem) becomes the copy of an object, in place of the one that is there."""
        file_io.rename(path, self.object_path(digest))
        self.objects[digest] = self.allocated_bytes(digest)

    def allocated_bytes(self, digest: bytes) -> int:
        """What the copy of an object takes, without its holes."""
        return os.lstat(self.object_path(digest)).st_blocks * 512

    def used_bytes(self) -> int:
        """Bytes allocated under the folder."""
        return sum(map(_bytes_in, (self.staged_folder, self._private))) + sum(self.objects.values())


def _numbered(folder: str) -> list[int]:
    found = []
    for entry in os.scandir(folder):
        if _NUMBER.fullmatch(entry.name) and is_ours(entry.stat(follow_symlinks=False)):
            found.append(int(entry.name))
        else:
            _remove_foreign(entry.path)
    return found


def _bytes_in(folder: str) -> int:
    """Without files that have another name: it counts there. A folder that somebody took away has none."""
    total = 0
    for entry in os.scandir(folder) if os.path.isdir(folder) else ():
        with contextlib.suppress(*GONE):
            state = entry.stat(follow_symlinks=False)
            total += state.st_blocks * 512 if state.st_nlink == 1 else 0
    return total


def is_used(path: str) -> bool:
    """Whether somebody reads a file: by a descriptor, or by a mapping that outlived its descriptor, which nobody else tells."""
    try:
        fd = file_io.open_file(path, os.O_RDONLY)
    except GONE:
        return False
    try:
        return not file_io.is_only_opener(fd)
    except OSError as e:
        if e.errno in NO_LEASES:
            return False  # there, only handles tell
        raise
    finally:
        os.close(fd)


def _remove_foreign(path: str) -> None:
    """An unfinished file of ours, or what somebody put here: it is not followed, and goes."""
    try:
        file_io.remove(path)
    except IsADirectoryError:
        log.warning("%s does not belong here; it is left alone", path)
