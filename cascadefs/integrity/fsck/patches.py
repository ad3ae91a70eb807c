"""Checks of the logs of patches: each that the index names is there, belongs to what it is put on, and is whole to its end.

Owns: the rules of patch_log.py seen from outside. Changes nothing.
"""

import os
import sqlite3
from pathlib import Path

from cascadefs.formats.record import decode_patch_header, patch_bytes
from cascadefs.integrity.fsck.names import Paths
from cascadefs.integrity.fsck.report import Places, Report
from cascadefs.media import file_io
from cascadefs.media.file_io import ALIGN
from cascadefs.tiers import patch_log


def check_logs(image: sqlite3.Connection, places: Places, secret: bytes, report: Report) -> None:
    """Those of an index; stores of older versions have none."""
    folder, rows = places.store / patch_log.FOLDER, list[tuple[int, int, bytes | None]]()
    if image.execute("SELECT 1 FROM sqlite_master WHERE name='patch_logs'").fetchone():
        rows = image.execute(
            "SELECT p.ino, number, digest FROM patch_logs p LEFT JOIN inodes i ON i.ino=p.ino "
            "LEFT JOIN objects o ON o.oid=i.durable_oid"
        ).fetchall()
    for ino, number, base in rows:
        if (what := _damage(folder, ino, number, base, secret)) is not None:
            files = Paths(image).of_inode(ino)
            report.add("patches", f"log {number} of inode {ino} {what}: if memory is lost, older bytes come back", files)
    left = set(patch_log.known(folder)) - {(ino, number) for ino, number, _ in rows}
    if left:
        report.notes.append(f"{len(left)} logs of patches are not needed any more: the next mount removes them")


def _damage(folder: Path, ino: int, number: int, base: bytes | None, secret: bytes) -> str | None:
    path = patch_log.path_of(folder, ino, number)
    header = patch_log.read_header(path)
    if header is None or (header.ino, header.number) != (ino, number):
        return "is missing, or its first page is damaged"
    if header.base != base:
        return "is not of what the inode falls back to"
    end, count = ALIGN, 0
    for patch in patch_log.read(path, secret):
        end, count = end + patch_bytes(patch.header.length), count + 1
    if not count:
        return "has no patch that is whole"
    return "is damaged" if _goes_on(path, end, number, count) else None


def _goes_on(path: Path, end: int, number: int, count: int) -> bool:
    """Whether patches follow the first that is not whole. Without any it is one whose sync was never answered."""
    fd = file_io.open_file(path, os.O_RDONLY)
    try:
        for at in range(end + ALIGN, os.fstat(fd).st_size, ALIGN):
            header = decode_patch_header(os.pread(fd, ALIGN, at))
            if header is not None and header.number == number and header.place > count:
                return True
    finally:
        os.close(fd)
    return False
