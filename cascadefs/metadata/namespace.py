"""Inodes and entries: what `ls` sees. Reads and writes rows; never awaits, never touches file bytes.

Owns: tables inodes, entries. Does not know objects (content columns are handed through) nor lookup counts.
Invariants:
(1) nlink equals the number of entries of a file, and 2 + the number of sub-folders of a folder.
(2) Every method is one transaction; a method that raises OSError has changed nothing.
(3) A folder has exactly one entry; no entry leads into its own subtree.
(4) A number of an inode or an entry is not used again while the process lives; with `first_ino`, while a mount lives.
    A name keeps its entry, and so its place in listings, until it is removed: also when another file takes it over, and
    when it becomes another name of the same folder.
(5) An inode with nlink 0 is an orphan: the caller deletes it when nobody holds it, recovery does otherwise.
(6) `op` numbers of changes grow; inodes.last_op is the highest whose change touched that row (of a folder: a change of its
    names). A change of number n on a row is committed exactly when its last_op is at least n: see is_done().
"""

import errno
import os
import stat
import time
from collections.abc import Iterator, Sequence

from cascadefs.config import NAME_MAX, SYMLINK_MAX
from cascadefs.errors import os_error
from cascadefs.formats.name_ring import Change, Created, Moved
from cascadefs.metadata.sqlite import Database
from cascadefs.metadata.xattrs import Xattrs
from cascadefs.types import Home, Inode

ROOT = 1
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
LINK_MAX = 65000  # as ext4
HOLDER = b"holder"
NO_BOUND = (1 << 63) - 1  # of cookies
ONE_BYTES = 512  # room for one packed entry

_COLUMNS = "ino, mode, uid, gid, nlink, rdev, size, atime_ns, mtime_ns, ctime_ns, home, oid, durable_oid, target, blocks"
_PACKED = "id, name, ino, mode, uid, gid, nlink, rdev, size, atime_ns, mtime_ns, ctime_ns, home, blocks"
_PREFIXED = ", ".join("i." + column for column in _COLUMNS.split(", "))


class Namespace:
    """The tree of names over one Database."""

    def __init__(self, database: Database, uid: int = 0, gid: int = 0, first_ino: int = 0) -> None:
        self._database = database
        self._db = database.connection
        self._changed = database.changed  # every method says here which inodes it touches
        self.xattrs = Xattrs(database)
        if self.find(ROOT) is None:
            now = time.time_ns()
            self._insert(ROOT, stat.S_IFDIR | 0o755, uid, gid, 2, 0, now, None)
            self._changed.discard(ROOT)  # an empty store has nothing to tell
        # Counted here, not by SQLite: its own counter is one more page in every commit.
        self.first_ino: int = max(first_ino, 1 + self._db.execute("SELECT max(ino) FROM inodes").fetchone()[0])
        self._next_ino: int = self.first_ino
        self._last_entry: int = self._db.execute("SELECT coalesce(max(id), 0) FROM entries").fetchone()[0]

    # --- reading

    def find(self, ino: int) -> Inode | None:
        """The inode, or None."""
        row = self._db.execute(f"SELECT {_COLUMNS} FROM inodes WHERE ino=?", (ino,)).fetchone()
        return Inode(*row) if row else None

    def get(self, ino: int) -> Inode:
        """The inode; ESTALE when there is none."""
        found = self.find(ino)
        if found is None:
            raise os_error(errno.ESTALE, f"inode {ino}")
        return found

    def born_ns(self, ino: int) -> int | None:
        """When the inode was made; None: before there was a column for it."""
        row = self._db.execute("SELECT born_ns FROM inodes WHERE ino=?", (ino,)).fetchone()
        return row[0] if row else None

    def lookup(self, parent: int, name: bytes) -> Inode | None:
        """What `name` means in folder `parent`; None when nothing does."""
        if len(name) > NAME_MAX:
            raise os_error(errno.ENAMETOOLONG, name)
        if name == b".":
            return self.get(parent)
        if name == b"..":
            row = self._db.execute("SELECT parent FROM entries WHERE ino=?", (parent,)).fetchone()
            return self.get(row[0] if row else ROOT)
        row = self._db.execute(
            f"SELECT {_PREFIXED} FROM entries e JOIN inodes i ON i.ino=e.ino WHERE e.parent=? AND e.name=?",
            (parent, name),
        ).fetchone()
        return Inode(*row) if row else None

    def last_entry(self) -> int:
        """The highest cookie so far: a name that is made later has a higher one."""
        return self._last_entry

    def listing(self, parent: int, after: int, last: int = NO_BOUND) -> Iterator[tuple[int, bytes, Inode]]:
        """(cookie, name, inode) of the entries with `after` < cookie <= `last`, in stable order, in pages of bounded size."""
        page = 256
        while True:
            rows = self._db.execute(
                f"SELECT e.id, e.name, {_PREFIXED} FROM entries e JOIN inodes i ON i.ino=e.ino "
                "WHERE e.parent=? AND e.id>? AND e.id<=? ORDER BY e.id LIMIT ?",
                (parent, after, last, page),
            ).fetchall()
            for row in rows:
                yield row[0], row[1], Inode(*row[2:])
            if len(rows) < page:
                return
            after = rows[-1][0]

    def packed_listing(self, function: str, parent: int, after: int, last: int, room: int, most: int) -> bytes:
        """What an aggregate function of SQL's makes of the same entries, the first `most`."""
        row = self._db.execute(
            f"SELECT {function}(?, {_PACKED}) FROM (SELECT e.id, e.name, {_PREFIXED} FROM entries e JOIN inodes i "
            "ON i.ino=e.ino WHERE e.parent=? AND e.id>? AND e.id<=? ORDER BY e.id LIMIT ?)",
            (room, parent, after, last, most),
        ).fetchone()
        return bytes(row[0])

    def packed(self, function: str, ino: int, name: bytes, cookie: int) -> bytes:
        """The same of one inode under a name and cookie of its own."""
        statement = f"SELECT {function}(?, {_PACKED}) FROM (SELECT ? id, ? name, * FROM inodes WHERE ino=?)"
        return bytes(self._db.execute(statement, (ONE_BYTES, cookie, name, ino)).fetchone()[0])

    def all_names(self, page: int = 1024) -> Iterator[list[tuple[int, bytes]]]:
        """(folder, name) of every entry that is there when its page is read; between pages the tree may change."""
        folder, entry = 0, 0
        while rows := self._db.execute(
            "SELECT parent, id, name FROM entries WHERE (parent, id) > (?, ?) ORDER BY parent, id LIMIT ?",
            (folder, entry, page),
        ).fetchall():
            yield [(parent, name) for parent, _, name in rows]
            folder, entry = rows[-1][0], rows[-1][1]

    def parent_of(self, ino: int) -> int:
        """The folder that holds folder `ino`; the root is its own parent."""
        row = self._db.execute("SELECT parent FROM entries WHERE ino=?", (ino,)).fetchone()
        return row[0] if row else ROOT

    def paths(self, ino: int) -> list[str]:
        """Every path of an inode, for people: names that are no UTF-8 are shown as Python shows them."""
        found = []
        for parent, name in self._db.execute("SELECT parent, name FROM entries WHERE ino=?", (ino,)).fetchall():
            parts = [name]
            while parent != ROOT:
                row = self._db.execute("SELECT parent, name FROM entries WHERE ino=?", (parent,)).fetchone()
                if row is None:
                    break
                parent = row[0]
                parts.append(row[1])
            found.append("/" + "/".join(os.fsdecode(part) for part in reversed(parts)))
        return found

    def count_files(self) -> tuple[int, int]:
        """(number of regular files, sum of their sizes in bytes as last recorded)."""
        row = self._db.execute(
            "SELECT count(*), coalesce(sum(size), 0) FROM inodes WHERE mode & 61440 = 32768 AND nlink > 0"
        ).fetchone()
        return row[0], row[1]

    def entries(self) -> int:
        """Number of names."""
        return int(self._db.execute("SELECT count(*) FROM entries").fetchone()[0])

    # --- making

    def reserve_ino(self) -> int:
        """A number for an inode that somebody makes before there is a row of it."""
        self._next_ino += 1
        return self._next_ino - 1

    def keep_clear_of(self, ino: int) -> None:
        """Before any inode was made: that number and lower ones are taken."""
        self.first_ino = self._next_ino = max(self._next_ino, ino + 1)

    def enter(self, changes: Sequence[Change], numbers: Sequence[int]) -> dict[int, int]:
        """Rows and names of files that exist, staged in memory, and names that are gone or moved, as they came; `numbers` are
        those of the operations. Returns {place of a removal or move: inode that lost the name}. OSError: nothing was done."""
        folders, gone = dict[int, tuple[int, int]](), dict[int, int]()
        with self._database.transaction():
            for one, op in zip(changes, numbers, strict=True):
                folders[one.folder] = one.time_ns, op
                if isinstance(one, Created):
                    self._insert(one.ino, one.mode, one.uid, one.gid, 1, 0, one.time_ns, None, Home.MEMORY)
                    self._enter(one.folder, one.name, one.ino)
                elif isinstance(one, Moved):
                    if self._move(one):
                        gone[one.at] = one.ino
                        folders[one.new_folder] = one.time_ns, op
                elif (ino := self._remove(one.folder, one.name, one.time_ns)) is not None:
                    gone[one.at] = ino
            for folder, (time_ns, op) in folders.items():
                self._touch_folder(folder, time_ns, 0, op)
        return gone

    def _move(self, one: Moved) -> bool:
        """As rename(); the caller touches both folders. False: the old name is not the file's, or the new one is taken."""
        found = self.lookup(one.folder, one.name)
        if found is None or found.ino != one.ino or self.lookup(one.new_folder, one.new_name) is not None:
            return False
        self._changed.add(one.ino)
        self._move_entry(one.folder, one.name, one.ino, one.new_folder, one.new_name, is_taken=False)
        self._db.execute("UPDATE inodes SET ctime_ns=? WHERE ino=?", (one.time_ns, one.ino))
        return True

    def _remove(self, folder: int, name: bytes, time_ns: int) -> int | None:
        """A name of a file goes; its folder is touched by the caller. None: there is no such name."""
        row = self._db.execute("DELETE FROM entries WHERE parent=? AND name=? RETURNING ino", (folder, name)).fetchone()
        if row is None:
            return None
        self._changed.add(row[0])
        self._db.execute("UPDATE inodes SET nlink=nlink-1, ctime_ns=? WHERE ino=?", (time_ns, row[0]))
        return int(row[0])

    def _insert(
        self,
        ino: int | None,
        mode: int,
        uid: int,
        gid: int,
        nlink: int,
        rdev: int,
        now: int,
        target: bytes | None,
        home: int = 0,
    ) -> int:
        ino = self.reserve_ino() if ino is None else ino
        self._changed.add(ino)
        self._db.execute(
            "INSERT INTO inodes(ino, mode, uid, gid, nlink, rdev, size, atime_ns, mtime_ns, ctime_ns, home, target, born_ns) "
            "VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (ino, mode, uid, gid, nlink, rdev, len(target or b""), now, now, now, home, target, now),
        )
        return ino

    def _fit_for_new(self, folder: Inode, name: bytes) -> Inode:
        """The folder, if it can take a new `name`."""
        if len(name) > NAME_MAX:
            raise os_error(errno.ENAMETOOLONG, name)
        if not stat.S_ISDIR(folder.mode):
            raise os_error(errno.ENOTDIR, name)
        if folder.nlink < 2:
            raise os_error(errno.ENOENT, name)
        return folder

    def make(self, parent: int, name: bytes, mode: int, uid: int, gid: int, home: int = 0) -> Inode:
        """As make_in(), without the folder."""
        return self.make_in(parent, name, mode, uid, gid, home=home)[0]

    def make_in(
        self,
        parent: int,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        rdev: int = 0,
        target: bytes | None = None,
        home: int = 0,
        op: int = 0,
    ) -> tuple[Inode, Inode]:
        """(a new inode under a new name, its folder afterwards); `mode` holds type and permissions, umask already applied."""
        if target is not None and len(target) > SYMLINK_MAX:
            raise os_error(errno.ENAMETOOLONG, target)
        now = time.time_ns()
        is_folder = stat.S_ISDIR(mode)
        with self._database.transaction():
            folder = self._fit_for_new(self._touch_folder(parent, now, 1 if is_folder else 0, op), name)
            if folder.mode & stat.S_ISGID:
                gid = folder.gid
                mode |= stat.S_ISGID if is_folder else 0
            ino = self._insert(None, mode, uid, gid, 2 if is_folder else 1, rdev, now, target, home)
            self._enter(parent, name, ino)
        size = len(target or b"")
        return Inode(ino, mode, uid, gid, 2 if is_folder else 1, rdev, size, now, now, now, home, None, None, target, 0), folder

    def make_nameless(self, parent: int, mode: int, uid: int, gid: int, home: int) -> Inode:
        """A new file that has no name in folder `parent` yet: see `link`."""
        folder = self._fit_for_new(self.get(parent), b"")
        if folder.mode & stat.S_ISGID:
            gid = folder.gid
        now = time.time_ns()
        with self._database.transaction():
            ino = self._insert(None, mode, uid, gid, 0, 0, now, None, home)
        return Inode(ino, mode, uid, gid, 0, 0, 0, now, now, now, home, None, None, None, 0)

    def make_holder(self, mode: int, home: int) -> Inode:
        """An inode that never has a name: it holds content for a while. Its target tells it from others."""
        with self._database.transaction():
            ino = self._insert(None, mode, 0, 0, 0, 0, time.time_ns(), HOLDER, home)
        return self.get(ino)

    def _enter(self, parent: int, name: bytes, ino: int) -> None:
        self._changed.add(ino)
        self._last_entry += 1
        cursor = self._db.execute("INSERT OR IGNORE INTO entries VALUES(?,?,?,?)", (parent, self._last_entry, name, ino))
        if cursor.rowcount == 0:
            raise os_error(errno.EEXIST, name)

    def _touch_folder(self, ino: int, now: int, links: int, op: int) -> Inode:
        """The folder after a change in it; one statement instead of three, because every create waits for it."""
        self._changed.add(ino)
        row = self._db.execute(
            "UPDATE inodes SET mtime_ns=?, ctime_ns=?, nlink=nlink+?, last_op=max(last_op, ?) WHERE ino=? "
            f"RETURNING {_COLUMNS}",
            (now, now, links, op, ino),
        ).fetchone()
        if row is None:
            raise os_error(errno.ESTALE, f"inode {ino}")
        return Inode(*row)

    def link(self, ino: int, parent: int, name: bytes, op: int = 0, may_be_first: bool = False) -> Inode:
        """Another name for a file; `may_be_first`: also for one that has none."""
        now = time.time_ns()
        with self._database.transaction():
            inode = self.get(ino)
            self._fit_for_new(self.get(parent), name)
            if stat.S_ISDIR(inode.mode):
                raise os_error(errno.EPERM, name)
            if inode.nlink >= LINK_MAX:
                raise os_error(errno.EMLINK, name)
            if inode.nlink == 0 and not may_be_first:
                raise os_error(errno.ENOENT, name)
            self._enter(parent, name, ino)
            self._touch_folder(parent, now, 0, op)
            self._db.execute("UPDATE inodes SET nlink=nlink+1, ctime_ns=? WHERE ino=?", (now, ino))
        return self.get(ino)

    # --- taking away

    def _leave(self, parent: int, name: bytes, inode: Inode, now: int, op: int = 0) -> None:
        """Remove an entry and what it counts for."""
        self._db.execute("DELETE FROM entries WHERE parent=? AND name=?", (parent, name))
        self._lose_name(parent, inode, now, op)

    def _lose_name(self, parent: int, inode: Inode, now: int, op: int = 0) -> None:
        """Count for an inode that one of its names in `parent` is no longer its own."""
        is_folder = stat.S_ISDIR(inode.mode)
        self._changed.add(inode.ino)
        self._touch_folder(parent, now, -1 if is_folder else 0, op)
        links = 0 if is_folder else inode.nlink - 1
        self._db.execute("UPDATE inodes SET nlink=?, ctime_ns=? WHERE ino=?", (links, now, inode.ino))

    def _is_empty(self, ino: int) -> bool:
        return self._db.execute("SELECT 1 FROM entries WHERE parent=? LIMIT 1", (ino,)).fetchone() is None

    def unlink(self, parent: int, name: bytes, op: int = 0) -> Inode:
        """Remove a name; returns the inode as it is afterwards (nlink 0: an orphan)."""
        with self._database.transaction():
            inode = self.lookup(parent, name)
            if inode is None:
                raise os_error(errno.ENOENT, name)
            if stat.S_ISDIR(inode.mode):
                raise os_error(errno.EISDIR, name)
            self._leave(parent, name, inode, time.time_ns(), op)
        return self.get(inode.ino)

    def rmdir(self, parent: int, name: bytes, op: int = 0) -> Inode:
        """Remove an empty folder."""
        with self._database.transaction():
            inode = self.lookup(parent, name)
            if inode is None:
                raise os_error(errno.ENOENT, name)
            if not stat.S_ISDIR(inode.mode):
                raise os_error(errno.ENOTDIR, name)
            if not self._is_empty(inode.ino):
                raise os_error(errno.ENOTEMPTY, name)
            self._leave(parent, name, inode, time.time_ns(), op)
        return self.get(inode.ino)

    def delete_inode(self, ino: int) -> None:
        """Forget an orphan for good (its content references have been dropped by the caller)."""
        self._changed.add(ino)
        with self._database.transaction():
            self.xattrs.drop(ino)
            self._db.execute("DELETE FROM inodes WHERE ino=? AND nlink=0", (ino,))

    def names_of(self, ino: int) -> list[tuple[int, bytes]]:
        """(folder, name) of each."""
        return self._db.execute("SELECT parent, name FROM entries WHERE ino=?", (ino,)).fetchall()

    def remove_all_names(self, ino: int) -> None:
        """Recovery: a file whose content was never durable is absent after the loss of memory."""
        with self._database.transaction():
            for parent, name in self._db.execute("SELECT parent, name FROM entries WHERE ino=?", (ino,)).fetchall():
                self._leave(parent, name, self.get(ino), time.time_ns())

    def orphans(self) -> list[int]:
        """Inodes without a name."""
        return [row[0] for row in self._db.execute("SELECT ino FROM inodes WHERE nlink=0")]

    def is_done(self, ino: int, op: int) -> bool:
        """Whether change `op`, which touches row `ino`, was committed. Only before any later change of that row."""
        row = self._db.execute("SELECT last_op FROM inodes WHERE ino=?", (ino,)).fetchone()
        return row is not None and row[0] >= op

    # --- moving

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, op: int = 0
    ) -> tuple[bool, Inode | None]:
        """rename(2) with flags; (whether the old name is gone, the inode that lost its name to the move)."""
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE) or flags == RENAME_NOREPLACE | RENAME_EXCHANGE:
            raise os_error(errno.EINVAL, new_name)
        now = time.time_ns()
        with self._database.transaction():
            source = self.lookup(parent, name)
            if source is None:
                raise os_error(errno.ENOENT, name)
            self._fit_for_new(self.get(new_parent), new_name)
            target = self.lookup(new_parent, new_name)
            self._refuse_loops(source, new_parent)
            if flags & RENAME_EXCHANGE:
                self._exchange(parent, name, source, new_parent, new_name, target, now, op)
                return False, None
            if target is not None and target.ino == source.ino:
                return False, None
            if target is not None:
                self._refuse_replacing(source, target, new_name, flags)
                self._lose_name(new_parent, target, now)
            self._move_entry(parent, name, source.ino, new_parent, new_name, target is not None)
            self._count_move(parent, source, new_parent, now, op)
        return True, self.find(target.ino) if target else None

    def _refuse_loops(self, source: Inode, new_parent: int) -> None:
        """A folder cannot move into its own subtree."""
        at = new_parent
        while stat.S_ISDIR(source.mode) and at != ROOT:
            if at == source.ino:
                raise os_error(errno.EINVAL)
            at = self.parent_of(at)

    def _refuse_replacing(self, source: Inode, target: Inode, new_name: bytes, flags: int) -> None:
        if flags & RENAME_NOREPLACE:
            raise os_error(errno.EEXIST, new_name)
        if stat.S_ISDIR(target.mode):
            if not stat.S_ISDIR(source.mode):
                raise os_error(errno.EISDIR, new_name)
            if not self._is_empty(target.ino):
                raise os_error(errno.ENOTEMPTY, new_name)
        elif stat.S_ISDIR(source.mode):
            raise os_error(errno.ENOTDIR, new_name)

    def _move_entry(self, parent: int, name: bytes, ino: int, new_parent: int, new_name: bytes, is_taken: bool) -> None:
        """As few new entries as possible: a listing that goes on meanwhile would meet what it has told, and might never end."""
        here, there = (parent, name), (new_parent, new_name)
        if parent == new_parent and not is_taken:
            self._db.execute("UPDATE entries SET name=? WHERE parent=? AND name=?", (new_name, *here))
            return
        self._db.execute("DELETE FROM entries WHERE parent=? AND name=?", here)
        if is_taken:
            self._db.execute("UPDATE entries SET ino=? WHERE parent=? AND name=?", (ino, *there))
        else:
            self._enter(new_parent, new_name, ino)

    def _count_move(self, parent: int, source: Inode, new_parent: int, now: int, op: int) -> None:
        links = 1 if stat.S_ISDIR(source.mode) else 0
        self._changed.add(source.ino)
        self._touch_folder(parent, now, -links, 0)
        self._touch_folder(new_parent, now, links, op)
        self._db.execute("UPDATE inodes SET ctime_ns=? WHERE ino=?", (now, source.ino))

    def _exchange(
        self,
        parent: int,
        name: bytes,
        source: Inode,
        new_parent: int,
        new_name: bytes,
        target: Inode | None,
        now: int,
        op: int,
    ) -> None:
        if target is None:
            raise os_error(errno.ENOENT, new_name)
        self._refuse_loops(target, parent)
        self._changed.update((source.ino, target.ino))
        difference = stat.S_ISDIR(target.mode) - stat.S_ISDIR(source.mode)
        self._db.execute("UPDATE entries SET ino=? WHERE parent=? AND name=?", (target.ino, parent, name))
        self._db.execute("UPDATE entries SET ino=? WHERE parent=? AND name=?", (source.ino, new_parent, new_name))
        self._touch_folder(parent, now, difference, 0)
        self._touch_folder(new_parent, now, -difference, op)
        self._db.execute("UPDATE inodes SET ctime_ns=? WHERE ino IN (?,?)", (now, source.ino, target.ino))

    # --- attributes

    def update(self, ino: int, **columns: int | None) -> None:
        """Set columns of one inode. Column names come from this package, never from users."""
        self._changed.add(ino)
        assignments = ", ".join(f"{column}=?" for column in columns)
        self._db.execute(f"UPDATE inodes SET {assignments} WHERE ino=?", (*columns.values(), ino))
