"""The one SQLite database of a store: opening, schema, transactions, durability.

Owns: the connection and the file index.db. Knows no meaning of the rows: namespace.py and index.py do. Invariants:
(1) One process holds the store (flock on the folder, exclusive SQLite lock), one thread uses the connection.
(2) A committed transaction survives the death of the process (WAL, written before COMMIT returns); it survives power
    loss once sync() has run after it. sync() only needs `wal_fd` and may run in any thread.
(3) A statement outside `transaction()` is a transaction of its own.
(4) A transaction that raised has changed nothing and is over, whatever the medium did; what sqlite3 raises is an OSError here.
(5) After a sync that failed, none succeeds before renew() has written everything again: the kernel reports a lost write once
    and forgets it.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cascadefs import media
from cascadefs.config import MIB
from cascadefs.crash import point
from cascadefs.errors import StoreError, from_sqlite
from cascadefs.health import Health
from cascadefs.reserve import Reserve

log = logging.getLogger(__name__)
FORMAT = 1
BLOCK_BYTES = 4 * MIB  # a Lustre stripe, and large enough that one record header costs 0.1 %
SECRET_BYTES = 192
NO_STORE_YET = ("lost+found", "store.new")  # a folder with nothing else is empty; store.new: a creation that a crash ended

SCHEMA = """
CREATE TABLE inodes(ino INTEGER PRIMARY KEY, mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL,
  nlink INTEGER NOT NULL, rdev INTEGER NOT NULL, size INTEGER NOT NULL, atime_ns INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
  ctime_ns INTEGER NOT NULL, home INTEGER NOT NULL DEFAULT 0, oid INTEGER, durable_oid INTEGER, target BLOB,
  blocks INTEGER NOT NULL DEFAULT 0, last_op INTEGER NOT NULL DEFAULT 0);
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


@dataclass(frozen=True, slots=True)
class StoreIdentity:
    """store.json: what must never change in the life of a store. `secret` keys the fingerprints."""

    store_id: str
    secret: bytes
    block_bytes: int


def claim(folder: Path) -> int:
    """A descriptor of `folder`, made when missing, that holds its exclusive lock. Raises StoreError."""
    check_store_folder(folder)
    if media.make_folder(folder):
        media.sync_folder(folder.parent)
    fd = media.open_file(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StoreError(f"the store {folder} is in use by a live mount; unmount that one or give another --store") from None
    return fd


def _read_identity(path: Path) -> StoreIdentity:
    try:
        known = json.loads(path.read_text())
        version = known["format"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise StoreError(f"{path} cannot be read ({e}); this is no cascadefs store, give another --store") from e
    if version != FORMAT:
        raise StoreError(
            f"{path.parent} has store format {version}, this cascadefs reads format {FORMAT}; use a matching version"
        )
    return StoreIdentity(known["store_id"], bytes.fromhex(known["secret"]), known["block_bytes"])


def _make_identity(path: Path) -> StoreIdentity:
    identity = StoreIdentity(secrets.token_hex(16), secrets.token_bytes(SECRET_BYTES), BLOCK_BYTES)
    text = json.dumps(
        {
            "format": FORMAT,
            "store_id": identity.store_id,
            "secret": identity.secret.hex(),
            "block_bytes": identity.block_bytes,
        }
    )
    partial = path.with_suffix(".new")
    fd = media.open_file(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        media.write_fully(fd, text.encode() + b"\n", 0)
        media.sync_file(fd)
    finally:
        os.close(fd)
    media.rename(partial, path)
    media.sync_folder(path.parent)
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
            found = from_sqlite(e)
            if found is None:
                raise
            if found.errno == errno.EIO and self.is_full():  # SQLite keeps no errno of a sync that failed
                found = OSError(errno.ENOSPC, str(e))
            self.health.failed("index", found)
            raise found from e


class Database:
    """An open store database. `identity` never changes; `connection` belongs to the thread that opened it.

    `undo`: functions called at the begin of a transaction; what they return is called when it is rolled back.
    """

    def __init__(self, folder: Path, claim_fd: int | None = None) -> None:
        """Open or create. Raises StoreError. Holds the lock of the store until close(); one that was claimed before is used."""
        self._claim_fd = claim(folder) if claim_fd is None else os.dup(claim_fd)
        self.folder, self.health, self.reserve = folder, Health(), Reserve(folder)
        self.undo: list[Callable[[], Callable[[], None]]] = []
        self._suspect: OSError | None = None
        try:
            path = folder / "store.json"
            self.identity = _read_identity(path) if path.exists() else _make_identity(path)
            self.connection = self._connect(folder / "index.db", self.health)
            try:
                self.wal_fd = media.open_file(folder / "index.db-wal", os.O_RDWR | os.O_CREAT)
            except BaseException:
                self.connection.close()
                raise
        except BaseException:
            os.close(self._claim_fd)
            raise

    @staticmethod
    def _connect(path: Path, health: Health) -> sqlite3.Connection:
        # Pages of 1 KiB: a commit writes whole pages to the WAL, and a create touches six of them.
        new = not path.exists()
        try:
            connection = sqlite3.connect(path, isolation_level=None, timeout=0, cached_statements=256, factory=_Connection)
        except sqlite3.DatabaseError as e:
            raise (from_sqlite(e) or e) from e
        connection.health = health
        connection.is_full = partial(media.is_full, path.parent)
        try:
            connection.executescript(
                "PRAGMA page_size=1024; PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;"
                "PRAGMA wal_autocheckpoint=32000; PRAGMA cache_size=-65536; PRAGMA temp_store=MEMORY;"
            )
            tables = sqlite3.Connection.execute(connection, "SELECT count(*) FROM sqlite_master").fetchone()[0]
            if new or not tables:
                connection.executescript("BEGIN;" + SCHEMA + "COMMIT;")
            elif "last_op" not in {row[1] for row in connection.execute("PRAGMA table_info(inodes)")}:
                connection.executescript("ALTER TABLE inodes ADD COLUMN last_op INTEGER NOT NULL DEFAULT 0")  # older stores
        except sqlite3.DatabaseError as e:
            connection.close()
            if getattr(e, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise StoreError(f"{path} is damaged ({e}); restore it from a copy") from e
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
            media.sync_file(self.wal_fd)
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
        self.health.worked("index")

    def _still_suspect(self) -> OSError:
        """With the errno of the sync that failed: a full disk is told as one."""
        return OSError(self._suspect.errno if self._suspect else None, "index: an earlier sync failed and is not made good yet")

    def close(self) -> None:
        """Checkpoint, release the lock. The object is of no use afterwards."""
        point("checkpoint")
        try:
            self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except OSError as e:
            log.error("the index stays in its WAL: %s", e)
        self.connection.close()
        os.close(self.wal_fd)
        os.close(self._claim_fd)
