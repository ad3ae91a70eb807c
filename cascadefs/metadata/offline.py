"""The rows of an index that is made from nothing, for a store that nobody has open.

Owns: which table and column each value goes to. Knows no extent and no manifest. Everything is part of the caller's
transaction.
"""

import sqlite3
from collections.abc import Iterable

from cascadefs.metadata.objects import recount_objects
from cascadefs.types import Home, Location, Print


class NewIndex:
    """Of one database, whose tables are empty."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    def add_object(self, oid: int, digest: bytes, size_bytes: int) -> None:
        """A durable object, of which no inode is known yet."""
        self._db.execute("INSERT INTO objects VALUES(?,?,?,0,1,NULL)", (oid, digest, size_bytes))

    def add_block(self, bid: int, block: Print, at: Location) -> None:
        """A block and its record; no object is known to have it yet."""
        self._db.execute("INSERT INTO blocks VALUES(?,?,?,?,?,?)", (bid, *block, 0, at.extent, at.offset))

    def add_block_of(self, oid: int, seq: int, bid: int) -> None:
        """The block at place `seq` of an object."""
        self._db.execute("INSERT INTO object_blocks VALUES(?,?,?)", (oid, seq, bid))

    def add_extents(self, rows: Iterable[tuple[int, int, int]]) -> None:
        """(number, size, bytes of its live records) of sealed extents."""
        self._db.executemany("INSERT INTO extents VALUES(?,?,?,1)", rows)

    def add_manifest(self, seq: int, at: Location, fingerprint: bytes, is_snapshot: bool) -> None:
        """A manifest and its record."""
        row = (seq, at.extent, at.offset, at.length, fingerprint, int(is_snapshot))
        self._db.execute("INSERT OR REPLACE INTO manifests VALUES(?,?,?,?,?,?)", row)

    def add_inode(
        self, ino: int, state: tuple[int, ...], home: Home, contents: tuple[int | None, int | None], target: bytes | None
    ) -> None:
        """`state`: mode, uid, gid, nlink, rdev, size, atime, mtime, ctime. `contents`: the object that it shows, and the one
        that it falls back to."""
        blocks = -(-state[5] // 512)
        row = (ino, *state, home, *contents, target, blocks, 0, None)
        self._db.execute(f"INSERT INTO inodes VALUES({','.join('?' * 17)})", row)

    def add_xattrs(self, ino: int, xattrs: Iterable[tuple[bytes, bytes]]) -> None:
        """Extended attributes of an inode."""
        self._db.executemany("INSERT INTO xattrs VALUES(?,?,?)", [(ino, name, value) for name, value in xattrs])

    def add_entries(self, rows: Iterable[tuple[int, int, bytes, int]]) -> None:
        """(folder, number of the entry, name, inode)."""
        self._db.executemany("INSERT INTO entries VALUES(?,?,?,?)", rows)

    def add_logs(self, rows: Iterable[tuple[int, int]]) -> None:
        """(inode, number) of logs of patches."""
        self._db.executemany("INSERT INTO patch_logs VALUES(?,?)", rows)

    def count_references(self) -> None:
        """Of blocks and objects, once all rows are there."""
        self._db.execute("UPDATE blocks SET refs=(SELECT count(*) FROM object_blocks o WHERE o.bid=blocks.bid)")
        recount_objects(self._db)
