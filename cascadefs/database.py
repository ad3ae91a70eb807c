"""The one SQLite database of a store: opening, schema, transactions, durability.

Owns: the connection and the file index.db. Knows no meaning of the rows: namespace.py and index.py do. Invariants:
(1) One process holds the store (flock on the folder, exclusive SQLite lock), one thread uses the connection.
(2) A committed transaction survives the death of the process (WAL, written before COMMIT returns); it survives power
    loss once sync() has run after it. sync() only needs `wal_fd` and may run in any thread.
(3) A statement outside `transaction()` is a transaction of its own.
"""

import fcntl
import json
import os
import re
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascadefs.config import MIB
from cascadefs.doors import check_file, private_folder
from cascadefs.errors import StoreError

FORMAT = 1
BLOCK_BYTES = 4 * MIB  # a Lustre stripe, and large enough that one record header costs 0.1 %
SECRET_BYTES = 192
_STORE_ID = re.compile("[0-9a-f]{32}")  # it becomes part of a path

SCHEMA = """
CREATE TABLE inodes(ino INTEGER PRIMARY KEY, mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL,
  nlink INTEGER NOT NULL, rdev INTEGER NOT NULL, size INTEGER NOT NULL, atime_ns INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
  ctime_ns INTEGER NOT NULL, home INTEGER NOT NULL DEFAULT 0, oid INTEGER, durable_oid INTEGER, target BLOB,
  blocks INTEGER NOT NULL DEFAULT 0);
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


def _claim(folder: Path) -> int:
    """A descriptor of `folder` that holds its exclusive lock."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
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
        if version == FORMAT:
            return _identity(known)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise StoreError(f"{path} cannot be read ({e}); this is no cascadefs store, give another --store") from e
    raise StoreError(f"{path.parent} has store format {version}, this cascadefs reads format {FORMAT}; use a matching version")


def _identity(known: dict[str, Any]) -> StoreIdentity:
    found = StoreIdentity(str(known["store_id"]), bytes.fromhex(known["secret"]), known["block_bytes"])
    if not _STORE_ID.fullmatch(found.store_id) or len(found.secret) != SECRET_BYTES or found.block_bytes != BLOCK_BYTES:
        raise ValueError("its values make no sense")
    return found


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
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "w") as f:
        f.write(text + "\n")
        f.flush()
        os.fsync(f.fileno())
    partial.rename(path)
    return identity


def check_store_folder(folder: Path) -> None:
    """Raise StoreError when `folder` can be neither opened nor made as a store. Touches nothing."""
    if folder.exists():
        if not folder.is_dir():
            raise StoreError(f"the store {folder} is not a folder; give another --store")
        if not (folder / "store.json").exists() and any(p.name != "lost+found" for p in folder.iterdir()):
            raise StoreError(f"{folder} is not empty and not a cascadefs store; give an empty folder or another --store")
    elif not folder.parent.is_dir():
        raise StoreError(f"the store {folder} cannot be made: {folder.parent} is missing; create it or give another --store")


class Database:
    """An open store database. `identity` never changes; `connection` belongs to the thread that opened it."""

    def __init__(self, folder: Path) -> None:
        """Open or create. Raises StoreError. Holds the lock of the store until close()."""
        check_store_folder(folder)
        private_folder(folder, follow=True)
        for name in ("store.json", "index.db", "index.db-wal", "index.db-shm", "cascadefs.log"):
            check_file(folder / name)
        self.folder = folder
        self._claim_fd = _claim(folder)
        try:
            path = folder / "store.json"
            self.identity = _read_identity(path) if path.exists() else _make_identity(path)
            self.connection = self._connect(folder / "index.db")
        except BaseException:
            os.close(self._claim_fd)
            raise
        self.wal_fd = os.open(folder / "index.db-wal", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @staticmethod
    def _connect(path: Path) -> sqlite3.Connection:
        # Pages of 1 KiB: a commit writes whole pages to the WAL, and a create touches six of them.
        new = not path.exists()
        connection = sqlite3.connect(path, isolation_level=None, timeout=0, cached_statements=256)
        connection.executescript(
            "PRAGMA page_size=1024; PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;"
            "PRAGMA wal_autocheckpoint=32000; PRAGMA cache_size=-65536; PRAGMA temp_store=MEMORY;"
        )
        try:
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        except sqlite3.DatabaseError as e:
            raise StoreError(f"{path} is damaged ({e}); restore it from a copy") from e
        if new or not tables:
            connection.executescript("BEGIN;" + SCHEMA + "COMMIT;")
        return connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All statements inside happen, or none. Nesting joins the outer transaction. Never await inside."""
        if self.connection.in_transaction:
            yield self.connection
            return
        self.connection.execute("BEGIN")
        try:
            yield self.connection
        except BaseException:
            self.connection.execute("ROLLBACK")
            raise
        self.connection.execute("COMMIT")

    def sync(self) -> None:
        """Make every committed transaction survive power loss. Safe in any thread; blocks for one fsync."""
        os.fsync(self.wal_fd)

    def close(self) -> None:
        """Checkpoint, release the lock. The object is of no use afterwards."""
        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.connection.close()
        os.close(self.wal_fd)
        os.close(self._claim_fd)
