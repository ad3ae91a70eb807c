"""The one SQLite database of a store: opening, schema, transactions, durability.

Owns: the connection and the file index.db. Knows no meaning of the rows: namespace.py and objects.py do. Invariants:
(1) One process holds the store (flock on the folder, exclusive SQLite lock), one thread uses the connection.
(2) A committed transaction survives the death of the process (WAL, written before COMMIT returns); it survives power
    loss once sync() has run after it. sync() only needs `wal_fd` and may run in any thread.
(3) A statement outside `transaction()` is a transaction of its own.
(4) A transaction that raised has changed nothing and is over, whatever the medium did; what sqlite3 raises is an OSError here.
(5) After a sync that failed, none succeeds before renew() has written everything again: the kernel reports a lost write once
    and forgets it.
(6) Only checkpoint() copies the WAL into index.db, and only after index.sums tells the sums that the pages will have.
(7) A store whose index is damaged is not opened and not touched.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from cascadefs.config import MIB
from cascadefs.crash import point
from cascadefs.errors import StoreError, from_sqlite, os_error
from cascadefs.media import file_io
from cascadefs.media.health import Health
from cascadefs.media.private_files import check_file, check_owner, private_folder
from cascadefs.media.reserve import Reserve
from cascadefs.metadata import page_sums

log = logging.getLogger(__name__)
FORMAT = 1
BLOCK_BYTES = 4 * MIB  # a Lustre stripe, and large enough that one record header costs 0.1 %
SECRET_BYTES = 192
NO_STORE_YET = ("lost+found", "store.new")  # a folder with nothing else is empty; store.new: a creation that a crash ended
RETRY_S = 10.0  # after a checkpoint that failed
WAL_FRAMES = 32000  # checkpoint from here on: 32 MB, read back at an opening in 20 ms
SHRINK_BYTES = 64 << 10  # less is not worth it
_STORE_ID = re.compile("[0-9a-f]{32}")  # it becomes part of a path

LATER_COLUMNS = {"last_op": "INTEGER NOT NULL DEFAULT 0", "born_ns": "INTEGER"}  # of inodes: older stores get them
SCHEMA = """
CREATE TABLE inodes(ino INTEGER PRIMARY KEY, mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL,
  nlink INTEGER NOT NULL, rdev INTEGER NOT NULL, size INTEGER NOT NULL, atime_ns INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
  ctime_ns INTEGER NOT NULL, home INTEGER NOT NULL DEFAULT 0, oid INTEGER, durable_oid INTEGER, target BLOB,
  blocks INTEGER NOT NULL DEFAULT 0, last_op INTEGER NOT NULL DEFAULT 0, born_ns INTEGER);
CREATE INDEX inodes_oid ON inodes(oid) WHERE oid IS NOT NULL;
CREATE INDEX inodes_home ON inodes(home) WHERE home > 0;
CREATE INDEX inodes_orphan ON inodes(nlink) WHERE nlink = 0;
CREATE TABLE entries(parent INTEGER NOT NULL, id INTEGER NOT NULL, name BLOB NOT NULL, ino INTEGER NOT NULL,
  PRIMARY KEY(parent, id)) WITHOUT ROWID;
CREATE UNIQUE INDEX entries_name ON entries(parent, name);
CREATE INDEX entries_ino ON entries(ino);
CREATE TABLE xattrs(ino INTEGER NOT NULL, name BLOB NOT NULL, value BLOB NOT NULL, PRIMARY KEY(ino, name)) WITHOUT ROWID;
CREATE TABLE objects(oid INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB NOT NULL UNIQUE, size INTEGER NOT NULL,
  refs INTEGER NOT NULL, durable INTEGER NOT NULL, sha256 TEXT);
CREATE INDEX objects_dirty ON objects(oid) WHERE durable = 0;
CREATE INDEX objects_sha256 ON objects(sha256) WHERE sha256 IS NOT NULL;
CREATE TABLE object_blocks(oid INTEGER NOT NULL, seq INTEGER NOT NULL, bid INTEGER NOT NULL,
  PRIMARY KEY(oid, seq)) WITHOUT ROWID;
CREATE INDEX object_blocks_bid ON object_blocks(bid);
CREATE TABLE blocks(bid INTEGER PRIMARY KEY AUTOINCREMENT, fingerprint BLOB NOT NULL, length INTEGER NOT NULL,
  refs INTEGER NOT NULL, extent INTEGER, offset INTEGER);
CREATE INDEX blocks_fingerprint ON blocks(fingerprint);
CREATE INDEX blocks_extent ON blocks(extent) WHERE extent IS NOT NULL;
CREATE TABLE extents(number INTEGER PRIMARY KEY, size INTEGER NOT NULL, live INTEGER NOT NULL, sealed INTEGER NOT NULL);
"""
# Later than the first stores: made when missing.
ADDITIONS = """
CREATE TABLE IF NOT EXISTS manifests(seq INTEGER PRIMARY KEY, extent INTEGER NOT NULL, offset INTEGER NOT NULL,
  length INTEGER NOT NULL, fingerprint BLOB NOT NULL, snapshot INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS patch_logs(ino INTEGER PRIMARY KEY, number INTEGER NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class StoreIdentity:
    """store.json: what must never change in the life of a store. `secret` keys the fingerprints."""

    store_id: str
    secret: bytes
    block_bytes: int


def claim(folder: Path, changes: bool = True) -> int:
    """A descriptor of `folder`, made when missing, that holds its exclusive lock. StoreError when a mount has it, or when it
    cannot be changed though the caller `changes` it."""
    check_store_folder(folder)
    if changes:
        _make_writable_folder(folder)
    fd = file_io.open_file(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        check_owner(folder, os.fstat(fd))
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except StoreError:
        os.close(fd)
        raise
    except BlockingIOError:
        os.close(fd)
        raise StoreError(f"the store {folder} is in use by a live mount; unmount that one or give another --store") from None
    return fd


def _make_writable_folder(folder: Path) -> None:
    try:
        if os.statvfs(folder if folder.exists() else folder.parent).f_flag & os.ST_RDONLY:
            raise os_error(errno.EROFS)
        if file_io.make_folder(folder):
            file_io.sync_folder(folder.parent)
    except OSError as e:
        raise StoreError(f"the store {folder} cannot be written: {e.strerror}; see to that or give another --store") from e


def read_identity(path: Path) -> StoreIdentity:
    """What store.json says. StoreError when it is missing, of another format or damaged."""
    try:
        text = path.read_text()
        known = json.loads(text)
        version = known["format"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise StoreError(f"{path} cannot be read ({e}); give another --store, or try cascadefs fsck --repair") from e
    damaged = not identity_is_whole(text)
    if version != FORMAT:
        what = f"{path.parent} has store format {version}, this cascadefs reads format {FORMAT}"
        if damaged and "sum" in known:
            raise StoreError(f"{what}; its checksum is wrong, too: run cascadefs fsck --repair {path.parent}")
        raise StoreError(f"{what}; use a matching version")
    if damaged:
        raise StoreError(f"{path} is damaged: its checksum is wrong; run cascadefs fsck --repair {path.parent}")
    return _identity(path, known)


def _identity(path: Path, known: dict[str, Any]) -> StoreIdentity:
    try:
        found = StoreIdentity(str(known["store_id"]), bytes.fromhex(known["secret"]), known["block_bytes"])
    except (ValueError, KeyError, TypeError) as e:
        raise StoreError(f"{path} cannot be read ({e}); this is no cascadefs store, give another --store") from e
    if not _STORE_ID.fullmatch(found.store_id) or len(found.secret) != SECRET_BYTES or not 0 < found.block_bytes <= 64 * MIB:
        raise StoreError(f"{path} makes no sense; this is no cascadefs store, give another --store")
    return found


def identity_text(identity: StoreIdentity) -> str:
    """What store.json holds: the last key is the XXH3-64 of the same document without it."""
    known: dict[str, object] = {
        "format": FORMAT,
        "store_id": identity.store_id,
        "secret": identity.secret.hex(),
        "block_bytes": identity.block_bytes,
    }
    return _with_sum(known)


def _with_sum(known: dict[str, object]) -> str:
    return json.dumps({**known, "sum": xxhash.xxh3_64_hexdigest(json.dumps(known).encode())}) + "\n"


def identity_is_whole(text: str) -> bool:
    """Whether store.json is to the byte what was written. Stores made before it had a sum have none: nothing to check."""
    try:
        known = json.loads(text)
        if "sum" not in known:
            return set(known) == {"format", "store_id", "secret", "block_bytes"}
        return text == _with_sum({key: value for key, value in known.items() if key != "sum"})
    except (ValueError, TypeError):
        return False


def _make_identity(path: Path) -> StoreIdentity:
    identity = StoreIdentity(secrets.token_hex(16), secrets.token_bytes(SECRET_BYTES), BLOCK_BYTES)
    partial = path.with_suffix(".new")
    fd = file_io.open_file(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        file_io.write_fully(fd, identity_text(identity).encode(), 0)
        file_io.sync_file(fd)
    finally:
        os.close(fd)
    file_io.rename(partial, path)
    file_io.sync_folder(path.parent)
    return identity


def check_store_folder(folder: Path) -> None:
    """Raise StoreError when `folder` can be neither opened nor made as a store. Touches nothing."""
    if folder.exists():
        if not folder.is_dir():
            raise StoreError(f"the store {folder} is not a folder; give another --store")
        if not (folder / "store.json").exists() and any(p.name not in NO_STORE_YET for p in folder.iterdir()):
            raise StoreError(f"{folder} is not empty and not a cascadefs store; give an empty folder or another --store")
    elif not folder.parent.is_dir():
        raise StoreError(f"the store {folder} cannot be made: {folder.parent} is missing; create it or give another --store")


class _Connection(sqlite3.Connection):
    """Errors of the medium leave as OSError with its errno, and are told to `health`."""

    health: Health
    is_full: Callable[[], bool]

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        try:
            return super().execute(sql, parameters)
        except sqlite3.DatabaseError as e:
            if (found := self._told(e)) is None:
                raise
            raise found from e

    def executemany(self, sql: str, parameters: Any, /) -> sqlite3.Cursor:
        try:
            return super().executemany(sql, parameters)
        except sqlite3.DatabaseError as e:
            if (found := self._told(e)) is None:
                raise
            raise found from e

    def _told(self, e: sqlite3.DatabaseError) -> OSError | None:
        """An error of the medium. None: it is a fault of ours."""
        found = from_sqlite(e)
        if found is None:
            return None
        if found.errno == errno.EIO and self.is_full():  # SQLite keeps no errno of a sync that failed
            found = OSError(errno.ENOSPC, str(e))
        self.health.failed("index", found)
        return found


class Database:
    """An open store database. `identity` never changes; `connection` belongs to the thread that opened it.

    `undo`: functions called at the begin of a transaction; what they return is called when it is rolled back.
    """

    def __init__(self, folder: Path, claim_fd: int | None = None) -> None:
        """Open or create. Raises StoreError. Holds the lock of the store until close(); one that was claimed before is used."""
        self._claim_fd = claim(folder) if claim_fd is None else os.dup(claim_fd)
        self.folder, self.health, self.reserve = folder, Health(), Reserve(folder)
        self.undo: list[Callable[[], Callable[[], None]]] = []
        self.notes: list[str] = []  # what the opening met that is worth a line in the log
        self._suspect: OSError | None = None
        try:
            private_folder(folder, follow=True)
            for name in ("store.json", "index.db", "index.db-wal", "index.db-shm", "index.sums", "cascadefs.log"):
                check_file(folder / name)
            self._own_files()
            path = folder / "store.json"
            self.identity = read_identity(path) if path.exists() else _make_identity(path)
            known = self._judged()
            self.connection = self._connect(folder / "index.db", self.health)
            try:
                self.wal_fd = file_io.open_file(folder / "index.db-wal", os.O_RDWR | os.O_CREAT)
                self._sums = self._first_sums() if known is None else known
            except BaseException:
                self.connection.close()
                raise
        except BaseException:
            os.close(self._claim_fd)
            raise
        self.reserve.listen(self)
        self.changed: set[int] = set()  # inodes that differ from what the last manifest says of them
        self.unlisted: set[int] = set()  # objects that no manifest lists yet
        self._copied_salts, self._next_checkpoint = b"", 0.0

    def space(self) -> os.statvfs_result:
        """Of the disk, also when somebody took the store's folder away."""
        return os.statvfs(self._claim_fd)

    def _own_files(self) -> None:
        """What is written in place must not be a copy's, too, that was made by hard links. Extents: tiers/extents.py."""
        staged = self.folder / "parking" / "staged"
        names = [self.folder / name for name in ("index.db", "index.db-wal", "index.db-shm", "cascadefs.log")]
        try:
            index = self.folder / "index.db"
            is_linked = index.exists() and os.lstat(index).st_nlink > 1
            if is_linked and staged.is_dir():  # else two names of a file there are ours
                names += staged.iterdir()
            for path in names:
                file_io.make_own(path)
        except OSError as e:
            what = f"the store {self.folder} shares files with a copy (hard links), and they cannot be copied: {e.strerror}"
            raise StoreError(f"{what}; free space, or make the copy with cp -a") from e

    def _judged(self) -> page_sums.Sums | None:
        """The sums of the pages of index.db; None: there is no sidecar yet. StoreError when something is damaged."""
        if not (self.folder / "index.db").exists():
            if list((self.folder / "extents").glob("*.cfx")):
                raise StoreError(f"the index of {self.folder} is missing; run cascadefs rebuild-index {self.folder}")
            return None
        found = page_sums.judge(self.folder)
        if found.damaged:
            parts = (
                ("index.db-wal", found.wal.header_bad or found.wal_flipped),
                ("index.sums", found.sums_damaged),
                ("index.db", bool(found.bad_pages) or found.size_bad),
            )
            names = ", ".join(name for name, bad in parts if bad)
            raise StoreError(
                f"the index of {self.folder} is damaged ({names}); run cascadefs fsck --repair {self.folder}, "
                f"or if that does not heal it, cascadefs rebuild-index {self.folder}"
            )
        if found.torn:
            self.notes.append(f"{found.wal.stray} frames behind the last transaction of the WAL are dropped: never finished")
        return found.sums

    def _first_sums(self) -> page_sums.Sums | None:
        """Sums of what is there, for a store without a sidecar. None: the disk is full, or fails; the next checkpoint tries
        again, and until then the pages have no sums."""
        try:
            self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            page_bytes = self._page_bytes()
            found, _ = page_sums.of_file(self.folder / "index.db", page_bytes)
            page_sums.write(self.folder, page_bytes, found)
        except (OSError, sqlite3.OperationalError) as e:
            log.warning("the index has no checksums for now: %s", e)
            return None
        return found

    def _page_bytes(self) -> int:
        return int(self.connection.execute("PRAGMA page_size").fetchone()[0])

    @staticmethod
    def _connect(path: Path, health: Health) -> sqlite3.Connection:
        # Pages of 1 KiB: a commit writes whole pages to the WAL, and a create touches six of them.
        new = not path.exists()
        try:
            connection = sqlite3.connect(path, isolation_level=None, timeout=0, cached_statements=256, factory=_Connection)
        except sqlite3.DatabaseError as e:
            raise (from_sqlite(e) or e) from e
        connection.health = health
        connection.is_full = partial(file_io.is_full, path.parent)
        try:
            connection.executescript(
                "PRAGMA page_size=1024; PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;"
                "PRAGMA wal_autocheckpoint=0; PRAGMA cache_size=-65536; PRAGMA temp_store=MEMORY;"
            )
            tables = sqlite3.Connection.execute(connection, "SELECT count(*) FROM sqlite_master").fetchone()[0]
            if new or not tables:
                connection.executescript("BEGIN;" + SCHEMA + "COMMIT;")
            else:
                _add_columns(connection)
            connection.executescript(ADDITIONS)
        except sqlite3.DatabaseError as e:
            connection.close()
            if getattr(e, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                why = f"the index of {path.parent} is damaged ({e}); run cascadefs rebuild-index {path.parent}"
                raise StoreError(why) from e
            raise (from_sqlite(e) or e) from e
        return connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All statements inside happen, or none. Nesting joins the outer transaction. Never await inside."""
        if self.connection.in_transaction:
            yield self.connection
            return
        undo, before = [begin() for begin in self.undo], self.connection.total_changes
        self.connection.execute("BEGIN")
        try:
            yield self.connection
            point("commit")
            self.connection.execute("COMMIT")
        except BaseException:
            self._roll_back()
            for back in undo:
                back()
            raise
        point("committed")
        if self.health.troubles and not self._suspect and self.connection.total_changes > before:
            self.health.worked("index")

    def has_function(self, name: str) -> bool:
        """Whether SQL knows a function of that name."""
        return self.connection.execute("SELECT 1 FROM pragma_function_list WHERE name=?", (name,)).fetchone() is not None

    def _roll_back(self) -> None:
        """After some errors SQLite has done it itself; after others the transaction is open, and the next would join it."""
        if self.connection.in_transaction:
            with contextlib.suppress(OSError):  # memory is rolled back all the same, and the WAL has no commit
                self.connection.execute("ROLLBACK")

    def sync(self) -> None:
        """Make every committed transaction survive power loss. Safe in any thread; blocks for one fsync."""
        if self._suspect:
            raise self._still_suspect()
        try:
            file_io.sync_file(self.wal_fd)
        except OSError as e:
            self._suspect = e
            self.health.failed("index", e)
            raise

    def renew(self) -> None:
        """After a failed sync: bring everything into index.db, from the pages that SQLite and the kernel still hold."""
        if not self._suspect:
            return
        try:
            busy, _, _ = self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except OSError as e:
            raise self._still_suspect() from e
        if busy:
            raise self._still_suspect()
        self._suspect = None
        self._sums = self._first_sums()
        self.health.worked("index")

    def _still_suspect(self) -> OSError:
        """With the errno of the sync that failed: a full disk is told as one."""
        return OSError(self._suspect.errno if self._suspect else None, "index: an earlier sync failed and is not made good yet")

    def tend(self) -> None:
        """Checkpoint when the WAL has grown large. After a restart of the WAL older frames lie behind its end: the salts of
        the frame at the limit tell whether this generation has come that far."""
        self.reserve.fill()
        if self._suspect or time.monotonic() < self._next_checkpoint:
            return
        at = page_sums.WAL_HEADER + WAL_FRAMES * (page_sums.FRAME_HEADER + self._page_bytes()) + 8
        try:
            salts = os.pread(self.wal_fd, 8, 16)
            if salts and salts != self._copied_salts and os.pread(self.wal_fd, 8, at) == salts:
                self.checkpoint()
        except OSError as e:
            self._next_checkpoint = time.monotonic() + RETRY_S
            log.warning("the WAL could not be copied into the index: %s; it is tried again", e)

    def checkpoint(self) -> None:
        """Copy the WAL into index.db. The sums come first: until SQLite starts the WAL anew, which it does at a write after
        this, the pages that differ from their sums have frames in it (invariant 1 of page_sums.py)."""
        point("checkpoint")
        self.sync()
        wal = page_sums.read_wal((self.folder / "index.db-wal").read_bytes())
        if not wal.committed:
            return
        if self._sums is None:
            self._sums = self._first_sums()
            return
        self._sums = page_sums.updated(self._sums, wal)
        page_sums.write(self.folder, wal.page_bytes, self._sums)
        try:
            busy, frames, copied = self.connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except sqlite3.OperationalError:
            return  # a cursor is open: the frames stay where they are until the next try
        if not busy and frames == copied:
            self._copied_salts = wal.data[16:24]

    def reuse_space(self) -> None:
        """On a full disk: the next transactions are written over what the WAL has, which takes no space."""
        if not self.connection.in_transaction and not self._suspect:
            with contextlib.suppress(OSError):
                self.checkpoint()

    def shrink(self) -> bool:
        """When not even a reserve is left: the WAL goes into index.db, which mostly has these pages. The sums, which need
        space of their own, go first and come back with the next checkpoint. Whether there is more space."""
        is_small = os.fstat(self.wal_fd).st_size < SHRINK_BYTES
        if is_small or self.connection.in_transaction or self._suspect or not file_io.is_full(self.folder):
            return False
        try:
            self._sums = None
            file_io.remove(self.folder / "index.sums")
            busy, _, _ = self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except (OSError, sqlite3.OperationalError) as e:
            log.warning("the WAL could not be copied into the index: %s", e)
            return False
        return not busy

    def close(self) -> None:
        """Checkpoint, release the lock. The object is of no use afterwards."""
        try:
            self.checkpoint()
        except OSError as e:
            log.error("the index stays in its WAL: %s", e)
            with contextlib.suppress(OSError):  # SQLite may yet copy the WAL: then the sidecar would be wrong
                file_io.remove(self.folder / "index.sums")
        self.connection.close()
        os.close(self.wal_fd)
        os.close(self._claim_fd)


def _add_columns(connection: sqlite3.Connection) -> None:
    known = {row[1] for row in connection.execute("PRAGMA table_info(inodes)")}
    for name, kind in LATER_COLUMNS.items():
        if name not in known:
            connection.executescript(f"ALTER TABLE inodes ADD COLUMN {name} {kind}")
