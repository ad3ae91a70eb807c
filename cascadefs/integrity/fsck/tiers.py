"""Checks of the files in the memory tier and in parking, and of what else lies in the store's folder.

Owns: the rules of tiers/folder.py and recovery.py seen from outside. Changes nothing.
"""

import os
import sqlite3
from pathlib import Path

from cascadefs.ext import hashing
from cascadefs.formats import name_ring
from cascadefs.integrity.fsck.names import Paths
from cascadefs.integrity.fsck.report import Places, Progress, Report
from cascadefs.media import file_io
from cascadefs.tiers.owner import MEMORY
from cascadefs.tiers.patch_log import FOLDER

INDEX = ("index.db", "index.db-wal", "index.db-shm", "index.sums")
KNOWN = {"store.json", MEMORY, *INDEX, "extents", "parking", FOLDER, "cascadefs.log", "lost+found", "reserve"}
DIGEST_DIGITS = 32


class Copies:
    """Whole copies and staged files outside the extents."""

    def __init__(
        self, image: sqlite3.Connection, places: Places, secret: bytes, block_bytes: int, report: Report, progress: Progress
    ) -> None:
        self.image, self.places, self.report, self.progress = image, places, report, progress
        self.secret, self.block_bytes, self.paths = secret, block_bytes, Paths(image)

    def run(self) -> None:
        """Both tiers, then what they lack."""
        held = set[bytes]()
        for what, folder, home in self.places.tiers():
            for name in self._names(folder / "objects"):
                if len(name) != DIGEST_DIGITS:
                    self.report.notes.append(f"{what} holds an unfinished copy: the next mount removes it")
                elif self._check_copy(what, folder / "objects" / name, bytes.fromhex(name)):
                    held.add(bytes.fromhex(name))
            self._check_staged(what, folder / "staged", home)
        for oid, digest in self.image.execute("SELECT oid, digest FROM objects WHERE durable=0"):
            if digest not in held:
                files = ", ".join(self.paths.of_object(oid))
                self.report.notes.append(f"memory was lost: the next mount shows an older version, or none, of {files}")
        self._check_store_folder()

    def _names(self, folder: Path) -> list[str]:
        return sorted(os.listdir(folder)) if folder.is_dir() else []

    def _check_copy(self, what: str, path: Path, digest: bytes) -> bool:
        row = self.image.execute("SELECT oid, size, durable FROM objects WHERE digest=?", (digest,)).fetchone()
        if row is None:
            self.report.notes.append(f"{what} holds a copy of an object that is no more: the next mount removes it")
            return True
        oid, size, durable = row
        if self._matches(path, oid, size):
            return True
        text = f"the copy of object {oid} in {what} is damaged"
        if durable:
            self.report.add("copies", text + "; the extents have it", self.paths.of_object(oid), "drop_copy", str(path))
        else:
            self.report.add("copies", text + ", and it is the only one", self.paths.of_object(oid))
        return True

    def _matches(self, path: Path, oid: int, size: int) -> bool:
        query = "SELECT fingerprint, length FROM object_blocks o JOIN blocks b ON b.bid=o.bid WHERE oid=? ORDER BY seq"
        fd = file_io.open_file(path, os.O_RDONLY)
        try:
            if os.fstat(fd).st_size != size:
                return False
            at, buffer = 0, memoryview(bytearray(self.block_bytes))
            for fingerprint, length in self.image.execute(query, (oid,)):
                if hashing.read_fingerprint(fd, at, buffer[:length], self.secret) != fingerprint:
                    return False
                at += length
                self.report.bytes_read += length
                self.progress("copies in memory", at, size)
            return at == size
        except OSError:
            return False
        finally:
            os.close(fd)

    def _check_staged(self, what: str, folder: Path, home: int) -> None:
        here = set(self._names(folder))
        rows = {str(ino): ino for (ino,) in self.image.execute("SELECT ino FROM inodes WHERE home=?", (home,))}
        created = {str(one.ino) for one in name_ring.pending_changes(folder.parent) if isinstance(one, name_ring.Created)}
        spares = 0
        for name in sorted(here - rows.keys()):
            if name in created:
                self.report.notes.append(f"{what} holds a file that was made just before a crash: the next mount enters it")
            elif name.isdigit() and not os.lstat(folder / name).st_size:
                spares += 1
            else:
                self.report.notes.append(f"{what} holds a staged file that belongs to no inode: the next mount removes it")
        if spares:
            self.report.notes.append(f"{what} holds {spares} empty files made ahead: the next mount removes them")
        for name in rows.keys() - here:
            files = ", ".join(self.paths.of_inode(rows[name]))
            self.report.notes.append(f"memory was lost: the next mount shows an older version, or none, of {files}")

    def _check_store_folder(self) -> None:
        for name in sorted(set(os.listdir(self.places.store)) - KNOWN):
            if ".before-" not in name:  # an old index that rebuild-index has kept
                self.report.notes.append(f"{name} in the store's folder is not part of the store")
