"""Checks of rows against each other: the tree of names, and every count against a full recount.

Owns: the rules of namespace.py and objects.py said once more, in other words. Asks the image only; changes nothing.
"""

import os
import sqlite3
import stat

from cascadefs.integrity.fsck.report import Report

ROOT = 1
ALIGN, HEADER = 4096, 64


class Paths:
    """From inodes and blocks to the paths of the files that they are part of."""

    def __init__(self, image: sqlite3.Connection) -> None:
        self._db = image

    def of_inode(self, ino: int) -> tuple[str, ...]:
        """Every path of an inode; its number when it has none."""
        rows = self._db.execute("SELECT parent, name FROM entries WHERE ino=?", (ino,)).fetchall()
        return tuple(sorted(self._path(parent, name) for parent, name in rows)) or (f"(inode {ino}, without a name)",)

    def _path(self, parent: int, name: bytes) -> str:
        parts, seen = [name], set[int]()
        while parent != ROOT and parent not in seen:
            seen.add(parent)
            row = self._db.execute("SELECT parent, name FROM entries WHERE ino=?", (parent,)).fetchone()
            if row is None:
                parts.append(b"?")
                break
            parent, folder = row
            parts.append(folder)
        return "/" + "/".join(os.fsdecode(part) for part in reversed(parts))

    def of_object(self, oid: int) -> tuple[str, ...]:
        """Files that show an object, or fall back to it."""
        rows = self._db.execute("SELECT ino FROM inodes WHERE oid=?1 OR durable_oid=?1", (oid,)).fetchall()
        return tuple(path for (ino,) in rows for path in self.of_inode(ino))

    def of_block(self, bid: int) -> tuple[str, ...]:
        """Files that a block is part of."""
        rows = self._db.execute("SELECT DISTINCT oid FROM object_blocks WHERE bid=?", (bid,)).fetchall()
        return tuple(sorted({path for (oid,) in rows for path in self.of_object(oid)}))


def check_namespace(image: sqlite3.Connection, report: Report) -> None:
    """Names lead to inodes, link counts are right, every folder is reached from the root exactly once."""
    paths = Paths(image)
    inodes = {ino: (mode, links) for ino, mode, links in image.execute("SELECT ino, mode, nlink FROM inodes")}
    parents: dict[int, list[int]] = {}
    subfolders: dict[int, int] = {}
    for parent, name, ino in image.execute("SELECT parent, name, ino FROM entries"):
        if ino not in inodes or parent not in inodes or not stat.S_ISDIR(inodes[parent][0]):
            what = f"the name {os.fsdecode(name)!r} in folder {parent} leads to inode {ino}; one of the two is no more"
            report.add("names", what, (), "remove_name", parent, name)
            continue
        parents.setdefault(ino, []).append(parent)
        if stat.S_ISDIR(inodes[ino][0]):
            subfolders[parent] = subfolders.get(parent, 0) + 1
    if ROOT not in inodes or not stat.S_ISDIR(inodes[ROOT][0]):
        report.add("names", "the root folder is missing: run cascadefs rebuild-index")
        return
    for ino, (mode, links) in inodes.items():
        _check_links(ino, mode, links, len(parents.get(ino, ())), subfolders.get(ino, 0), paths, report)
    _check_loops({ino: found for ino, found in parents.items() if stat.S_ISDIR(inodes[ino][0])}, report)
    for (ino,) in image.execute("SELECT DISTINCT ino FROM xattrs WHERE ino NOT IN (SELECT ino FROM inodes)"):
        report.add("names", f"attributes of inode {ino}, which is no more", (), "remove_xattrs", ino)


def _check_links(ino: int, mode: int, links: int, names: int, subfolders: int, paths: Paths, report: Report) -> None:
    if stat.S_ISDIR(mode):
        wanted = 2 + subfolders if names or ino == ROOT else 0
        if names > 1 or (ino == ROOT and names):
            report.add("names", f"folder {ino} has {names} names", paths.of_inode(ino))
    else:
        wanted = names
    if links == 0 and names == 0 and ino != ROOT:
        report.notes.append(f"inode {ino} has no name: the next mount deletes it")
    elif names == 0 and ino != ROOT:
        report.add("names", f"inode {ino} has {links} links but no name", (), "to_lost_and_found", ino)
    elif links != wanted:
        report.add("names", f"link count is {links}, not {wanted}", paths.of_inode(ino), "set_links", ino, wanted)


def _check_loops(parents: dict[int, list[int]], report: Report) -> None:
    good = {ROOT}
    for start in parents:
        chain, at = list[int](), start
        while at not in good and at not in chain and at in parents:
            chain.append(at)
            at = parents[at][0]
        if at in good:
            good.update(chain)
        elif at in chain:
            report.add("names", f"folder {at} lies inside itself", (), "to_lost_and_found", at)
            good.update(chain)


def check_counts(image: sqlite3.Connection, report: Report) -> None:
    """References of objects and blocks, sizes, durability and live bytes of extents, against a full recount."""
    paths = Paths(image)
    shown: dict[int, int] = {}
    for ino, oid, durable_oid in image.execute("SELECT ino, oid, durable_oid FROM inodes"):
        for found in (oid, durable_oid):
            if found:  # 0: falls back to no bytes
                shown[found] = shown.get(found, 0) + 1
                if image.execute("SELECT 1 FROM objects WHERE oid=?", (found,)).fetchone() is None:
                    report.add("counts", f"inode {ino} shows object {found}, which is no more", paths.of_inode(ino))
    for oid, refs in image.execute("SELECT oid, refs FROM objects").fetchall():
        if refs != shown.get(oid, 0) or refs == 0:
            what = f"object {oid} counts {refs} references, there are {shown.get(oid, 0)}"
            report.add("counts", what, paths.of_object(oid), "recount")
    _check_blocks(image, paths, report)
    _check_extents(image, report)


def _check_blocks(image: sqlite3.Connection, paths: Paths, report: Report) -> None:
    count = "(SELECT count(*) FROM object_blocks o WHERE o.bid=b.bid)"
    for bid, refs, there in image.execute(f"SELECT bid, refs, {count} FROM blocks b WHERE refs<>{count} OR refs=0"):
        report.add("counts", f"block {bid} counts {refs} references, there are {there}", paths.of_block(bid), "recount")
    lonely = "SELECT oid, bid FROM object_blocks WHERE bid NOT IN (SELECT bid FROM blocks)"
    for oid, bid in image.execute(lonely):
        report.add("counts", f"object {oid} needs block {bid}, which is no more", paths.of_object(oid))
    lonely = "SELECT oid, bid FROM object_blocks WHERE oid NOT IN (SELECT oid FROM objects)"
    for oid, bid in image.execute(lonely):
        report.add("counts", f"block {bid} is held for object {oid}, which is no more", (), "recount")
    sizes = (
        "SELECT o.oid, o.size, coalesce(sum(b.length), 0) AS there FROM objects o LEFT JOIN object_blocks x ON x.oid=o.oid "
        "LEFT JOIN blocks b ON b.bid=x.bid GROUP BY o.oid HAVING o.size<>there"
    )
    for oid, size, there in image.execute(sizes):
        report.add("counts", f"object {oid} is {size} bytes long, its blocks {there}", paths.of_object(oid))
    early = (
        "SELECT DISTINCT o.oid FROM objects o JOIN object_blocks x ON x.oid=o.oid JOIN blocks b ON b.bid=x.bid "
        "WHERE o.durable=1 AND b.extent IS NULL"
    )
    for (oid,) in image.execute(early):
        report.add("counts", f"object {oid} is called durable, but has blocks without a place", paths.of_object(oid), "recount")


def _check_extents(image: sqlite3.Connection, report: Report) -> None:
    query = "SELECT extent, sum((length + ?) / ? * ?) FROM blocks WHERE extent IS NOT NULL GROUP BY extent"
    live = dict(image.execute(query, (HEADER + ALIGN - 1, ALIGN, ALIGN)))
    known = set()
    for number, told in image.execute("SELECT number, live FROM extents"):
        known.add(number)
        if told != live.get(number, 0):
            report.add("counts", f"extent {number} counts {told} live bytes, there are {live.get(number, 0)}", (), "recount")
    for number in set(live) - known:
        report.add("counts", f"blocks lie in extent {number}, of which the index knows nothing")
