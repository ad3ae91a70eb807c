"""The index for many rows at once: what sealing and flushing change in one transaction, in few statements for a whole batch.

Owns: the same tables as objects.py, under the same invariants; a batch is as good as its members one by one. Never
awaits, never touches bytes. Invariants:
(1) Every method is one transaction, or part of the caller's.
(2) A question about n rows is asked in at most n/ASKED + 1 statements; a change is one statement, prepared once.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

from cascadefs.formats.record import record_bytes
from cascadefs.metadata.objects import ASKED, Index
from cascadefs.metadata.sqlite import Database
from cascadefs.types import EMPTY_OID, Block, Location, Print

T = TypeVar("T")


class Waiting(NamedTuple):
    """What sealing must know of a staged inode."""

    ino: int
    home: int
    uid: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class NewObject:
    """Content that no object has yet. `shares`: whether blocks of other objects may be its own."""

    digest: bytes
    size_bytes: int
    prints: Sequence[Print]
    shares: bool


@dataclass(frozen=True, slots=True)
class Shown:
    """What a staged inode shows from now on: a new object, or nothing when that has no bytes; and its attributes."""

    ino: int
    content: NewObject
    mtime_ns: int
    ctime_ns: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Captured:
    """What a staged inode held, and where blocks of it were written: all that had no place."""

    ino: int
    content: NewObject
    places: Mapping[Print, Location]


class Placed(NamedTuple):
    """Records that died; those of the objects that are durable now; the places that a block was given."""

    dead: list[Location]
    durable: set[int]
    used: set[Location]


class Unplaced(Exception):
    """A block has no place, or has lost it since somebody asked."""


class Bulk:
    """Batches for one Index."""

    def __init__(self, database: Database, index: Index) -> None:
        self._database, self._db, self._index = database, database.connection, index

    # --- questions

    def staged(self, inos: Iterable[int]) -> dict[int, Waiting]:
        """Those of some inodes that are staged and have a name. Many times cheaper than whole inodes."""
        found: dict[int, Waiting] = {}
        for part in _parts(inos):
            where = f"ino IN ({marks(part)}) AND home>0 AND nlink>0"
            rows = self._db.execute(f"SELECT ino, home, uid, mtime_ns, ctime_ns FROM inodes WHERE {where}", part)
            found.update((row[0], Waiting(*row)) for row in rows)
        return found

    def known(self, digests: Sequence[bytes]) -> set[bytes]:
        """Those that name an object."""
        return set(self._index.states(digests))

    def numbers(self, digests: Iterable[bytes]) -> dict[bytes, int]:
        """Digest -> number, of those that name an object."""
        found = dict[bytes, int]()
        for part in _parts(digests):
            found.update(self._db.execute(f"SELECT digest, oid FROM objects WHERE digest IN ({marks(part)})", part))
        return found

    def blocks_of(self, oids: Sequence[int]) -> dict[int, list[Block]]:
        """The blocks of each object, in order of their place in it."""
        found: dict[int, list[Block]] = {oid: [] for oid in oids}
        for part in _parts(oids):
            rows = self._db.execute(
                "SELECT o.oid, b.bid, fingerprint, length, extent, offset FROM object_blocks o JOIN blocks b ON b.bid=o.bid "
                f"WHERE o.oid IN ({marks(part)}) ORDER BY o.oid, seq",
                part,
            )
            for oid, bid, fingerprint, length, extent, offset in rows:
                at = None if extent is None else Location(extent, offset, length)
                found[oid].append(Block(bid, fingerprint, length, at))
        return found

    def inodes_of(self, oids: Iterable[int]) -> set[int]:
        """Inodes that show one of these objects."""
        found = set[int]()
        for part in _parts(oids):
            found.update(row[0] for row in self._db.execute(f"SELECT ino FROM inodes WHERE oid IN ({marks(part)})", part))
        return found

    def placed_whole(self, oids: Sequence[int]) -> set[int]:
        """Objects that exist and whose blocks all have a place."""
        found = set[int]()
        for part in _parts(oids):
            rows = self._db.execute(
                f"SELECT oid FROM objects WHERE oid IN ({marks(part)}) AND NOT EXISTS (SELECT 1 FROM object_blocks o "
                "JOIN blocks b ON b.bid=o.bid WHERE o.oid=objects.oid AND b.extent IS NULL)",
                part,
            )
            found.update(row[0] for row in rows)
        return found

    def _known_blocks(self, prints: Iterable[Print]) -> dict[Print, tuple[int, bool]]:
        """(number, whether it has a place) of the blocks that are there already."""
        found: dict[Print, tuple[int, bool]] = {}
        for part in _parts({fingerprint for fingerprint, _ in prints}):
            rows = self._db.execute(
                f"SELECT bid, fingerprint, length, extent IS NOT NULL FROM blocks WHERE fingerprint IN ({marks(part)})", part
            )
            for bid, fingerprint, length, placed in rows:
                if placed or (fingerprint, length) not in found:
                    found[fingerprint, length] = bid, bool(placed)
        return found

    def lacking(self, prints: Sequence[Print]) -> set[Print]:
        """Those of which no block has a place in the cold tier."""
        known = self._known_blocks(prints)
        return {one for one in prints if not known.get(one, (0, False))[1]}

    # --- sealing

    def show(self, shown: Sequence[Shown]) -> list[Location]:
        """Each inode, staged so far, shows its new object. Returns the records that died."""
        dead = list[Location]()
        with self._database.transaction():
            oids = self._add([one.content for one in shown if one.content.size_bytes], 1)
            rows = []
            for one in shown:
                size = one.content.size_bytes
                oid = oids[one.content.digest][0] if size else None
                rows.append((oid, size, one.mtime_ns, one.ctime_ns, one.blocks, one.ino))
            self._database.changed.update(one.ino for one in shown)
            self._db.executemany("UPDATE inodes SET home=0, oid=?, size=?, mtime_ns=?, ctime_ns=?, blocks=? WHERE ino=?", rows)
            for one in shown:
                oid, durable = oids[one.content.digest] if one.content.size_bytes else (EMPTY_OID, True)
                if durable:
                    dead += self._index.set_fallback(one.ino, oid)
        return dead

    def _add(self, contents: Sequence[NewObject], refs: int) -> dict[bytes, tuple[int, bool]]:
        """New objects with so many references each: digest -> (number, whether every block has its place already)."""
        known = self._known_blocks(one for content in contents if content.shares for one in content.prints)
        oid, bid = self._last("objects"), self._last("blocks")
        result: dict[bytes, tuple[int, bool]] = {}
        objects, fresh, members = list[tuple[object, ...]](), list[tuple[int, Print]](), list[tuple[int, int, int]]()
        for content in contents:
            oid += 1
            own: dict[Print, tuple[int, bool]] = known if content.shares else {}
            durable = True
            for seq, one in enumerate(content.prints):
                if one not in own:
                    bid += 1
                    own[one] = bid, False
                    fresh.append((bid, one))
                members.append((oid, seq, own[one][0]))
                durable = durable and own[one][1]
            objects.append((oid, content.digest, content.size_bytes, refs, durable))
            result[content.digest] = oid, durable
        self._insert(objects, fresh, members)
        return result

    def _insert(
        self,
        objects: Sequence[tuple[object, ...]],
        fresh: Sequence[tuple[int, Print]],
        members: Sequence[tuple[int, int, int]],
    ) -> None:
        uses, new = Counter(bid for _, _, bid in members), {bid for bid, _ in fresh}
        self._database.unlisted.update(row[0] for row in objects if isinstance(row[0], int))
        self._db.executemany("INSERT INTO objects(oid, digest, size, refs, durable) VALUES(?,?,?,?,?)", objects)
        self._db.executemany(
            "INSERT INTO blocks(bid, fingerprint, length, refs) VALUES(?,?,?,?)", [(b, f, n, uses[b]) for b, (f, n) in fresh]
        )
        self._db.executemany("INSERT INTO object_blocks VALUES(?,?,?)", members)
        shared = [(count, bid) for bid, count in uses.items() if bid not in new]
        self._db.executemany("UPDATE blocks SET refs=refs+? WHERE bid=?", shared)

    def _last(self, table: str) -> int:
        """The highest number that a row of a table ever had: what AUTOINCREMENT goes by."""
        row = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name=?", (table,)).fetchone()
        return row[0] if row else 0

    # --- flushing

    def place(self, placed: Sequence[tuple[int, Location]], extent: int, extent_size: int) -> list[Location]:
        """Record where blocks were written and how far the extent reaches. Returns records of blocks that died meanwhile, or
        have a place already."""
        with self._database.transaction():
            self._db.execute(
                "INSERT INTO extents VALUES(?,?,0,0) ON CONFLICT(number) DO UPDATE SET size=max(size, excluded.size)",
                (extent, extent_size),
            )
            waiting = self._unplaced([bid for bid, _ in placed])
            dead, rows, live = list[Location](), list[tuple[int, int, int]](), 0
            for bid, at in placed:
                if bid in waiting:
                    waiting.discard(bid)
                    rows.append((at.extent, at.offset, bid))
                    live += record_bytes(at.length)
                else:
                    dead.append(at)
            self._db.executemany("UPDATE blocks SET extent=?, offset=? WHERE bid=?", rows)
            self._db.execute("UPDATE extents SET live=live+? WHERE number=?", (live, extent))
        return dead

    def keep(
        self, captured: Sequence[Captured], written: set[Location], extent: int, extent_size: int
    ) -> list[Location]:
        """What staged inodes held becomes what they fall back to; it was written and synced. Returns the records that died, and
        those of `written` that nothing needs. Unplaced, and nothing has changed, when the cold tier does not hold all of it."""
        with self._database.transaction():
            oids = self._objects_of([one.content for one in captured if one.content.size_bytes])
            places = {oids[one.content.digest]: one.places for one in captured if one.content.size_bytes}
            placed = self.place_captured(places, extent, extent_size)
            if placed.durable != places.keys():
                raise Unplaced
            dead = placed.dead + list(written - placed.used)
            dead += self._index.fall_back_all({one.ino: oids.get(one.content.digest, EMPTY_OID) for one in captured})
        return dead

    def place_captured(self, places: Mapping[int, Mapping[Print, Location]], extent: int, extent_size: int) -> Placed:
        """Blocks of objects that had no place lie where they were written, if they were. `places`: by object."""
        placed = dict[int, Location]()
        with self._database.transaction():
            for oid, blocks in self.blocks_of(list(places)).items():
                for block in blocks:
                    at = places[oid].get((block.fingerprint, block.length))
                    if block.location is None and at is not None:
                        placed.setdefault(block.bid, at)
            dead = self.place(list(placed.items()), extent, extent_size)
            whole = self.placed_whole(list(places))
            dead += self.mark_durable(sorted(whole))
        return Placed(dead, whole, set(placed.values()))

    def _objects_of(self, contents: Sequence[NewObject]) -> dict[bytes, int]:
        """Digest -> number; objects that are missing are made, without a reference."""
        unique = {content.digest: content for content in contents}
        known = self.known(list(unique))
        self._add([content for digest, content in unique.items() if digest not in known], 0)
        return self.numbers(unique)

    def _unplaced(self, bids: Sequence[int]) -> set[int]:
        found = set[int]()
        for part in _parts(bids):
            rows = self._db.execute(f"SELECT bid FROM blocks WHERE bid IN ({marks(part)}) AND extent IS NULL", part)
            found.update(row[0] for row in rows)
        return found

    def relocate(self, bid: int, at: Location, extent_size: int) -> list[Location]:
        """A good copy of a block was written to `at` and synced: it is read from there. Returns the record that it leaves."""
        with self._database.transaction():
            row = self._db.execute("SELECT extent, offset, length FROM blocks WHERE bid=?", (bid,)).fetchone()
            if row is not None and row[0] is not None:
                self._db.execute("UPDATE blocks SET extent=NULL WHERE bid=?", (bid,))
                self._db.execute("UPDATE extents SET live=live-? WHERE number=?", (record_bytes(row[2]), row[0]))
            left = [Location(*row)] if row is not None and row[0] is not None else []
            return left + self.place([(bid, at)], at.extent, extent_size)

    def mark_durable(self, oids: Sequence[int]) -> list[Location]:
        """All blocks of these objects are located and synced: each becomes the fallback of the inodes that show it."""
        dead = list[Location]()
        with self._database.transaction():
            for part in _parts(oids):
                self._db.execute(f"UPDATE objects SET durable=1 WHERE oid IN ({marks(part)})", part)
                rows = self._db.execute(
                    f"SELECT ino, oid, durable_oid FROM inodes WHERE oid IN ({marks(part)}) AND home=0 "
                    "AND durable_oid IS NOT oid",
                    part,
                ).fetchall()
                dead += self._fall_back(rows)
        return dead

    def _fall_back(self, rows: Sequence[tuple[int, int, int | None]]) -> list[Location]:
        """(inode, object, former fallback). The inodes are told by the manifest that went out with the objects."""
        told = {ino for ino, _, _ in rows} - self._database.changed
        first = [(oid, ino) for ino, oid, former in rows if former is None]
        self._db.executemany("UPDATE inodes SET durable_oid=? WHERE ino=?", first)
        uses = Counter(oid for oid, _ in first)
        self._db.executemany("UPDATE objects SET refs=refs+? WHERE oid=?", [(count, oid) for oid, count in uses.items()])
        dead = [at for ino, oid, former in rows if former is not None for at in self._index.set_fallback(ino, oid)]
        self._database.changed -= told
        return dead


def marks(values: Sequence[object]) -> str:
    """Question marks for as many values."""
    return ",".join("?" * len(values))


def _parts(values: Iterable[T]) -> Iterator[list[T]]:
    """In lists of at most ASKED."""
    rest = iter(values)
    while part := list(islice(rest, ASKED)):
        yield part
