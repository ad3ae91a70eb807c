"""Extended attributes of inodes. Reads and writes rows; never awaits.

Owns: table xattrs. Does not know which names mean something (mount/). Invariant: a change moves the inode's time of change.
"""

import errno
import time

from cascadefs.config import NAME_MAX, XATTR_VALUE_MAX
from cascadefs.errors import os_error
from cascadefs.metadata.sqlite import Database

XATTR_CREATE, XATTR_REPLACE = 1, 2


class Xattrs:
    """Those of one Database."""

    def __init__(self, database: Database) -> None:
        self._database, self._db, self._changed = database, database.connection, database.changed

    def get(self, ino: int, name: bytes) -> bytes:
        """The value; ENODATA when there is none."""
        row = self._db.execute("SELECT value FROM xattrs WHERE ino=? AND name=?", (ino, name)).fetchone()
        if row is None:
            raise os_error(errno.ENODATA, name)
        return bytes(row[0])

    def has(self, ino: int, name: bytes) -> bool:
        """Whether the inode has an attribute of that name."""
        return self._db.execute("SELECT 1 FROM xattrs WHERE ino=? AND name=?", (ino, name)).fetchone() is not None

    def any_has(self, name: bytes) -> bool:
        """Whether any inode has an attribute of that name."""
        return self._db.execute("SELECT 1 FROM xattrs WHERE name=? LIMIT 1", (name,)).fetchone() is not None

    def names(self, ino: int) -> list[bytes]:
        """Names, sorted."""
        return [row[0] for row in self._db.execute("SELECT name FROM xattrs WHERE ino=? ORDER BY name", (ino,))]

    def put(self, ino: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """setxattr(2) with XATTR_CREATE and XATTR_REPLACE."""
        if len(name) > NAME_MAX:
            raise os_error(errno.ERANGE, name)
        if len(value) > XATTR_VALUE_MAX:
            raise os_error(errno.E2BIG, name)
        self._changed.add(ino)
        with self._database.transaction():
            known = self._db.execute("SELECT 1 FROM xattrs WHERE ino=? AND name=?", (ino, name)).fetchone()
            if known and flags & XATTR_CREATE:
                raise os_error(errno.EEXIST, name)
            if not known and flags & XATTR_REPLACE:
                raise os_error(errno.ENODATA, name)
            self._db.execute("INSERT OR REPLACE INTO xattrs VALUES(?,?,?)", (ino, name, value))
            self._db.execute("UPDATE inodes SET ctime_ns=? WHERE ino=?", (time.time_ns(), ino))

    def remove(self, ino: int, name: bytes, op: int = 0) -> None:
        """ENODATA when there is none."""
        self._changed.add(ino)
        with self._database.transaction():
            if self._db.execute("DELETE FROM xattrs WHERE ino=? AND name=?", (ino, name)).rowcount == 0:
                raise os_error(errno.ENODATA, name)
            self._db.execute("UPDATE inodes SET ctime_ns=?, last_op=max(last_op, ?) WHERE ino=?", (time.time_ns(), op, ino))

    def drop(self, ino: int) -> None:
        """All of an inode that goes."""
        self._db.execute("DELETE FROM xattrs WHERE ino=?", (ino,))
