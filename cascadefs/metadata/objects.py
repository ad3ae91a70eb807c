"""Objects, blocks, extents: which content lies where, and who refers to it. Rows only: never awaits, never touches bytes.

Owns: tables objects, object_blocks, blocks, extents and the content columns of inodes. Invariants:
(1) objects.refs = number of inodes.oid and inodes.durable_oid that name it; an object with 0 references does not exist
    outside a transaction. blocks.refs = number of object_blocks rows that name it; the same holds.
(2) An object is durable exactly when each of its blocks has a location and that was committed after the data was synced.
(3) inodes.durable_oid is what the inode falls back to when memory is lost; it names a durable object, EMPTY_OID
    (no bytes, durable) or nothing (absent).
(4) extents.live = bytes of the records that blocks point to.
(5) patch_logs names the log, if any, whose patches belong on top of what an inode falls back to: whatever sets that, be it to
    the same object, takes the log away.
"""

import sqlite3
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import xxhash

from cascadefs.formats.record import record_bytes
from cascadefs.media.file_io import ALIGN
from cascadefs.metadata.sqlite import Database
from cascadefs.types import EMPTY_OID, Block, Home, Location, Object

_OBJECT = "oid, digest, size, durable"
ASKED = 256  # values in one question; SQLite takes 32766, but every number of marks is a statement of its own to prepare


def digest_of(size_bytes: int, fingerprints: Iterable[bytes], salt: int = 0) -> bytes:
    """16 bytes that name an object. `salt` > 0 only after a fingerprint collision was found by comparing bytes."""
    return xxhash.xxh3_128_digest(struct.pack("<QQ", size_bytes, salt) + b"".join(fingerprints))


def recount_objects(db: sqlite3.Connection) -> None:
    """References of objects, from the inodes; grouped, because nothing finds the inodes that fall back to an object."""
    db.execute("UPDATE objects SET refs=0")
    db.execute(
        "UPDATE objects SET refs=uses FROM (SELECT used, count(*) AS uses FROM "
        "(SELECT oid AS used FROM inodes UNION ALL SELECT durable_oid FROM inodes) GROUP BY used) WHERE used=oid"
    )


class Index:
    """The content side of one Database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._db = database.connection
        self.block_bytes = database.identity.block_bytes
        self.gone: set[bytes] = set()  # digests of objects that were deleted: their copies are to go
        self.logs: dict[int, int] = dict(self._db.execute("SELECT ino, number FROM patch_logs"))
        self._stale_logs = list[tuple[int, int, int]]()  # (inode, number, changes of rows until then): files that are to go
        database.undo.append(self._keep_logs)

    # --- objects and their blocks

    def find(self, digest: bytes) -> Object | None:
        """The object of that name."""
        row = self._db.execute(f"SELECT {_OBJECT} FROM objects WHERE digest=?", (digest,)).fetchone()
        return Object(row[0], row[1], row[2], bool(row[3])) if row else None

    def states(self, digests: Sequence[bytes]) -> dict[bytes, bool]:
        """Digest -> whether it is durable, of those that name an object."""
        found: dict[bytes, bool] = {}
        for at in range(0, len(digests), ASKED):
            part = digests[at : at + ASKED]
            marks = ",".join("?" * len(part))
            found.update(self._db.execute(f"SELECT digest, durable<>0 FROM objects WHERE digest IN ({marks})", part))
        return found

    def object(self, oid: int) -> Object:
        """The object; it must exist (invariant 1)."""
        row = self._db.execute(f"SELECT {_OBJECT} FROM objects WHERE oid=?", (oid,)).fetchone()
        if row is None:
            raise LookupError(f"object {oid} is not in the index")
        return Object(row[0], row[1], row[2], bool(row[3]))

    def find_oid(self, oid: int) -> Object | None:
        """The object, if it still exists."""
        row = self._db.execute(f"SELECT {_OBJECT} FROM objects WHERE oid=?", (oid,)).fetchone()
        return Object(row[0], row[1], row[2], bool(row[3])) if row else None

    def durable_after(self, oid: int, limit: int) -> list[Object]:
        """Durable objects in the order in which they were sealed, which is that of their blocks in the extents, after one."""
        rows = self._db.execute(f"SELECT {_OBJECT} FROM objects WHERE oid>? AND durable<>0 ORDER BY oid LIMIT ?", (oid, limit))
        return [Object(r[0], r[1], r[2], True) for r in rows]

    def newest_object(self) -> int:
        """The highest number given to an object so far."""
        return int(self._db.execute("SELECT coalesce(max(oid), 0) FROM objects").fetchone()[0])

    def staged_inodes(self) -> list[int]:
        """Inodes whose bytes are staged."""
        return [row[0] for row in self._db.execute("SELECT ino FROM inodes WHERE home > 0")]

    def count_staged(self, home: int) -> int:
        """How many have them in that home."""
        count: int = self._db.execute("SELECT count(*) FROM inodes WHERE home=?", (home,)).fetchone()[0]
        return count

    def inodes_of(self, oid: int, limit: int = -1) -> list[int]:
        """Inodes that show an object; not more than `limit`."""
        return [row[0] for row in self._db.execute("SELECT ino FROM inodes WHERE oid=? LIMIT ?", (oid, limit))]

    def shown_by(self, ino: int) -> Object | None:
        """The object that an inode shows, if it is there and shows one."""
        row = self._db.execute("SELECT oid FROM inodes WHERE ino=? AND home=0", (ino,)).fetchone()
        return self.find_oid(row[0]) if row and row[0] is not None else None

    def copies(self, durable: bool) -> dict[bytes, int]:
        """Digest -> bytes that a copy of it takes in memory, of every object that is durable, or is not: for recovery."""
        size = f"(size+{ALIGN - 1})/{ALIGN}*{ALIGN}"
        return dict(self._db.execute(f"SELECT digest, {size} FROM objects WHERE durable{'<>' if durable else '='}0"))

    def refs(self, oid: int) -> int:
        """Number of references to an object."""
        row = self._db.execute("SELECT refs FROM objects WHERE oid=?", (oid,)).fetchone()
        return row[0] if row else 0

    def blocks(self, oid: int) -> list[Block]:
        """In order of their place in the object."""
        rows = self._db.execute(
            "SELECT b.bid, fingerprint, length, extent, offset FROM object_blocks o JOIN blocks b ON b.bid=o.bid "
            "WHERE o.oid=? ORDER BY seq",
            (oid,),
        )
        return [Block(r[0], r[1], r[2], Location(r[3], r[4], r[2]) if r[3] is not None else None) for r in rows]

    def block_at(self, oid: int, seq: int) -> Block | None:
        """The block at place `seq` of an object."""
        r = self._db.execute(
            "SELECT b.bid, fingerprint, length, extent, offset FROM object_blocks o JOIN blocks b ON b.bid=o.bid "
            "WHERE o.oid=? AND seq=?",
            (oid, seq),
        ).fetchone()
        return Block(r[0], r[1], r[2], Location(r[3], r[4], r[2]) if r[3] is not None else None) if r else None

    def next_place(self, oid: int, seq: int, prints: Sequence[bytes], among: bool) -> int | None:
        """The first place of an object, from `seq` on, whose block is `among` those of these fingerprints, or is not."""
        marks = ",".join("?" * len(prints))
        row = self._db.execute(
            f"SELECT seq FROM object_blocks WHERE oid=? AND seq>=? AND bid {'' if among else 'NOT'} IN "
            f"(SELECT bid FROM blocks WHERE fingerprint IN ({marks})) ORDER BY seq LIMIT 1",
            (oid, seq, *prints),
        ).fetchone()
        return row[0] if row else None

    def bytes_besides(self, oid: int, prints: Sequence[bytes]) -> int:
        """Bytes of the blocks of an object, each as often as it is there, without those of these fingerprints."""
        marks = ",".join("?" * len(prints))
        row = self._db.execute(
            "SELECT coalesce(sum(length), 0) FROM object_blocks o JOIN blocks b ON b.bid=o.bid WHERE o.oid=? AND o.bid NOT IN "
            f"(SELECT bid FROM blocks WHERE fingerprint IN ({marks}))",
            (oid, *prints),
        ).fetchone()
        return int(row[0])

    def holders(self, bid: int, limit: int = 4) -> list[tuple[bytes, int]]:
        """(digest, offset in the object) of some objects that contain a block."""
        first = "SELECT length FROM object_blocks f JOIN blocks g ON g.bid=f.bid WHERE f.oid=b.oid AND f.seq=0"
        return self._db.execute(
            f"SELECT digest, seq * ({first}) FROM object_blocks b JOIN objects o ON o.oid=b.oid WHERE bid=? LIMIT ?",
            (bid, limit),
        ).fetchall()

    def step(self, oid: int) -> int:
        """Length of the blocks of an object, but for the last."""
        first = self.block_at(oid, 0)
        return first.length if first is not None else self.block_bytes

    def block(self, bid: int) -> Block | None:
        """The block of that number, if it still exists."""
        r = self._db.execute("SELECT bid, fingerprint, length, extent, offset FROM blocks WHERE bid=?", (bid,)).fetchone()
        return Block(r[0], r[1], r[2], Location(r[3], r[4], r[2]) if r[3] is not None else None) if r else None

    def doubles(self, block: Block) -> list[Location]:
        """Where other blocks of the same fingerprint lie: contents that differ in an object's salt, which is next to never."""
        rows = self._db.execute(
            "SELECT extent, offset, length FROM blocks WHERE fingerprint=? AND length=? AND bid<>? AND extent IS NOT NULL",
            (block.fingerprint, block.length, block.bid),
        )
        return [Location(*row) for row in rows]

    def placed_after(self, extent: int, offset: int, limit: int) -> list[Block]:
        """Blocks with a place after the given one, in the order of their places."""
        rows = self._db.execute(
            "SELECT bid, fingerprint, length, extent, offset FROM blocks WHERE extent>=?1 AND (extent>?1 OR offset>?2) "
            "ORDER BY extent, offset LIMIT ?3",
            (extent, offset, limit),
        )
        return [Block(r[0], r[1], r[2], Location(r[3], r[4], r[2])) for r in rows]

    def owners(self, bid: int) -> list[int]:
        """Inodes that show or fall back to an object with this block."""
        rows = self._db.execute(
            "SELECT DISTINCT ino FROM object_blocks b JOIN inodes i ON i.oid=b.oid OR i.durable_oid=b.oid WHERE bid=?", (bid,)
        )
        return [row[0] for row in rows]

    def dirty(self, limit: int) -> list[Object]:
        """Objects that are not yet durable, oldest first."""
        rows = self._db.execute(f"SELECT {_OBJECT} FROM objects WHERE durable=0 ORDER BY oid LIMIT ?", (limit,))
        return [Object(r[0], r[1], r[2], False) for r in rows]

    def all_dirty(self) -> list[Object]:
        """Every object that is not yet durable: for recovery."""
        return self.dirty(-1)

    # --- references

    def _ref(self, oid: int) -> None:
        """LookupError when there is no such object: a row that shows one that is gone could not even be deleted."""
        if self._db.execute("UPDATE objects SET refs=refs+1 WHERE oid=?", (oid,)).rowcount != 1 and oid != EMPTY_OID:
            raise LookupError(f"object {oid} is not in the index")

    def fall_back_all(self, oids: Mapping[int, int]) -> list[Location]:
        """set_fallback() for many (inode -> object): none of these objects goes in between, though the only inode that fell
        back to one of them may come before the one that is going to."""
        dead = list[Location]()
        with self._database.transaction():
            for oid in set(oids.values()):
                self._ref(oid)
            for ino, oid in oids.items():
                dead += self.set_fallback(ino, oid)
            for oid in set(oids.values()):
                dead += self._unref(oid)
        return dead

    def _unref(self, oid: int) -> list[Location]:
        """Drop a reference; returns the records nothing points to any more."""
        if oid == EMPTY_OID:
            return []
        self._db.execute("UPDATE objects SET refs=refs-1 WHERE oid=?", (oid,))
        if self.refs(oid) > 0:
            return []
        self.gone.add(self.object(oid).digest)
        uses = Counter(row[0] for row in self._db.execute("SELECT bid FROM object_blocks WHERE oid=?", (oid,)))
        self._db.execute("DELETE FROM object_blocks WHERE oid=?", (oid,))
        self._db.execute("DELETE FROM objects WHERE oid=?", (oid,))
        self._db.executemany("UPDATE blocks SET refs=refs-? WHERE bid=?", [(count, bid) for bid, count in uses.items()])
        return self._drop_unused(list(uses))

    def _drop_unused(self, bids: Sequence[int]) -> list[Location]:
        """Those of some blocks that nothing refers to any more go; their records."""
        dead, live = list[Location](), Counter[int]()
        for at in range(0, len(bids), ASKED):
            part = bids[at : at + ASKED]
            unused = f"bid IN ({','.join('?' * len(part))}) AND refs<=0"
            rows = self._db.execute(f"DELETE FROM blocks WHERE {unused} RETURNING extent, offset, length", part).fetchall()
            dead += [Location(*row) for row in rows if row[0] is not None]
        for location in dead:
            live[location.extent] += record_bytes(location.length)
        self._db.executemany("UPDATE extents SET live=live-? WHERE number=?", [(n, extent) for extent, n in live.items()])
        return dead

    def set_content(self, ino: int, home: Home, oid: int | None, size_bytes: int, keep_fallback: bool = True) -> list[Location]:
        """Point an inode at staged bytes (`home`), an object, or nothing. Returns the records that died.

        The durable fallback stays until the new content is durable. Without `keep_fallback` it becomes the empty content.
        """
        with self._database.transaction():
            row = self._db.execute("SELECT oid, durable_oid FROM inodes WHERE ino=?", (ino,)).fetchone()
            if row is None:
                return []
            if oid is not None:
                self._ref(oid)
            self._database.changed.add(ino)
            self._db.execute("UPDATE inodes SET home=?, oid=?, size=? WHERE ino=?", (home, oid, size_bytes, ino))
            dead = self._unref(row[0]) if row[0] is not None else []
            if oid is not None and self.object(oid).durable:
                dead += self.set_fallback(ino, oid)
            elif not keep_fallback:
                dead += self.set_fallback(ino, EMPTY_OID)
        return dead

    def set_fallback(self, ino: int, oid: int | None) -> list[Location]:
        """Make a durable object (or EMPTY_OID) what the inode falls back to."""
        with self._database.transaction():
            if ino in self.logs:
                self._drop_log(ino)
            row = self._db.execute("SELECT durable_oid FROM inodes WHERE ino=?", (ino,)).fetchone()
            if row is None or row[0] == oid:
                return []
            if oid is not None:
                self._ref(oid)
            self._database.changed.add(ino)
            self._db.execute("UPDATE inodes SET durable_oid=? WHERE ino=?", (oid, ino))
            return self._unref(row[0]) if row[0] is not None else []

    # --- logs of patches

    def add_log(self, ino: int, number: int) -> None:
        """A log that is there and synced has what the inode falls back to besides its object."""
        with self._database.transaction():
            self._db.execute("INSERT OR REPLACE INTO patch_logs VALUES(?,?)", (ino, number))
            self.logs[ino] = number
            self._database.changed.add(ino)

    def drop_lost_logs(self) -> None:
        """Of inodes that are gone: a repair of the index took them."""
        for ino in [ino for ino in self.logs if not self._db.execute("SELECT 1 FROM inodes WHERE ino=?", (ino,)).fetchone()]:
            self._drop_log(ino)

    def _drop_log(self, ino: int) -> None:
        self._db.execute("DELETE FROM patch_logs WHERE ino=?", (ino,))
        self._database.changed.add(ino)
        self.drop_file(ino, self.logs.pop(ino))

    def drop_file(self, ino: int, number: int) -> None:
        """No row names this log any more, or ever did."""
        self._stale_logs.append((ino, number, self._db.total_changes))

    def take_stale_logs(self, synced: int, has_news_of: Callable[[int], bool]) -> list[tuple[int, int]]:
        """(inode, number) of logs that an index does not know that was synced when it had so many changes of rows, and that the
        extents do not tell of either."""
        gone = [one for one in self._stale_logs if one[2] <= synced and not has_news_of(one[0])]
        if gone:
            self._stale_logs = [one for one in self._stale_logs if one not in gone]
        return [(ino, number) for ino, number, _ in gone]

    def _keep_logs(self) -> Callable[[], None]:
        """As they were, when a transaction is rolled back."""
        logs, stale = dict(self.logs), list(self._stale_logs)

        def restore() -> None:
            self.logs, self._stale_logs = logs, stale

        return restore

    # --- extents

    def open_extent(self) -> tuple[int, int] | None:
        """(number, size in bytes) of the extent that still grows."""
        row = self._db.execute("SELECT number, size FROM extents WHERE sealed=0 ORDER BY number DESC LIMIT 1").fetchone()
        return (row[0], row[1]) if row else None

    def next_extent(self) -> int:
        """The number for a new extent; numbers are never used twice in a database."""
        row = self._db.execute("SELECT value FROM (SELECT max(number) AS value FROM extents)").fetchone()
        return (row[0] or 0) + 1

    def seal_extent(self, number: int, size: int) -> None:
        """The extent has its footer and is `size` bytes long."""
        self._db.execute("UPDATE extents SET sealed=1, size=? WHERE number=?", (size, number))

    def extent_records(self, number: int) -> list[tuple[bytes, int, int]]:
        """(fingerprint, offset, length) of the live records of an extent, by offset."""
        return self._db.execute(
            "SELECT fingerprint, offset, length FROM blocks WHERE extent=?1 "
            "UNION ALL SELECT fingerprint, offset, length FROM manifests WHERE extent=?1 ORDER BY offset",
            (number,),
        ).fetchall()

    def dead_extents(self) -> list[int]:
        """Sealed extents without a live record."""
        held = "SELECT extent FROM manifests"
        rows = self._db.execute(f"SELECT number FROM extents WHERE sealed=1 AND live<=0 AND size>0 AND number NOT IN ({held})")
        return [row[0] for row in rows]

    # --- manifests that a rebuild of the index would read

    def next_manifest(self) -> int:
        """The number for the next manifest: higher than any in the extents, those that this index forgot included."""
        return max(time.time_ns(), int(self._db.execute("SELECT coalesce(max(seq), 0) + 1 FROM manifests").fetchone()[0]))

    def add_manifest(self, seq: int, at: Location, fingerprint: bytes, snapshot: bool) -> list[Location]:
        """A manifest was written and synced. A snapshot says all that those before it say: returns their records, now dead."""
        dead = []
        with self._database.transaction():
            if snapshot:
                rows = self._db.execute("SELECT extent, offset, length FROM manifests").fetchall()
                dead = [Location(*row) for row in rows]
                self._db.execute("DELETE FROM manifests")
            row = (seq, at.extent, at.offset, at.length, fingerprint, snapshot)
            self._db.execute("INSERT INTO manifests VALUES(?,?,?,?,?,?)", row)
        return dead

    def manifests(self) -> list[tuple[int, Location, bytes]]:
        """(number, place, fingerprint) of the manifests that a rebuild needs."""
        rows = self._db.execute("SELECT seq, extent, offset, length, fingerprint FROM manifests ORDER BY seq")
        return [(row[0], Location(*row[1:4]), row[4]) for row in rows]

    def manifest_bytes(self) -> tuple[int, int]:
        """(length of the last snapshot, sum of the lengths of the manifests after it)."""
        row = self._db.execute(
            "SELECT coalesce(sum(length) FILTER (WHERE snapshot & 1), 0), "
            "coalesce(sum(length) FILTER (WHERE NOT snapshot & 1), 0) FROM manifests"
        ).fetchone()
        return row[0], row[1]

    def only_manifests_hold_an_extent(self) -> bool:
        """Whether some sealed extent has no block any more, but a manifest that a new snapshot would free."""
        held = "SELECT extent FROM manifests"
        query = f"SELECT 1 FROM extents WHERE sealed=1 AND live<=0 AND size>0 AND number IN ({held}) LIMIT 1"
        return self._db.execute(query).fetchone() is not None

    def forget_extent(self, number: int) -> None:
        """Its file is about to go; the row stays (size 0) so that the number is not used again."""
        self._db.execute("UPDATE extents SET size=0, live=0 WHERE number=?", (number,))

    # --- totals and addresses

    def totals(self) -> dict[str, int]:
        """objects, unique_bytes (each block once), cold_bytes, extents, live_bytes."""
        objects, dirty = self._db.execute(
            "SELECT count(*), coalesce(sum(CASE durable WHEN 0 THEN size END), 0) FROM objects"
        ).fetchone()
        unique, cold_objects = self._db.execute(
            "SELECT coalesce(sum(length), 0), (SELECT count(*) FROM objects WHERE durable=1) FROM blocks"
        ).fetchone()
        extents, size, live = self._db.execute(
            "SELECT count(*), coalesce(sum(size), 0), coalesce(sum(live), 0) FROM extents WHERE size>0"
        ).fetchone()
        return {
            "objects": objects,
            "dirty_bytes": dirty,
            "unique_bytes": unique,
            "cold_objects": cold_objects,
            "extents": extents,
            "extent_bytes": size,
            "live_bytes": live,
        }

    def sha256(self, oid: int) -> str | None:
        """The remembered public address."""
        row = self._db.execute("SELECT sha256 FROM objects WHERE oid=?", (oid,)).fetchone()
        return row[0] if row else None

    def remember_sha256(self, oid: int, address: str) -> None:
        """Keep the public address of an object."""
        self._db.execute("UPDATE objects SET sha256=? WHERE oid=?", (address, oid))

    def addresses(self) -> list[str]:
        """Public addresses known so far, sorted."""
        return [row[0] for row in self._db.execute("SELECT sha256 FROM objects WHERE sha256 IS NOT NULL ORDER BY sha256")]

    def by_address(self, address: str) -> Object | None:
        """An object whose public address was computed before."""
        row = self._db.execute(f"SELECT {_OBJECT} FROM objects WHERE sha256=?", (address,)).fetchone()
        return Object(row[0], row[1], row[2], bool(row[3])) if row else None
