"""Gathers manifests: what changed since the last one, or everything. The mover writes them behind the blocks of a batch.

Owns: which inodes and objects the extents do not yet tell of (`Database.changed` and `unlisted`, kept by namespace.py and
objects.py), and when a snapshot is worth its size. Reads rows only. Invariants:
(1) What a manifest takes is given back when it could not be written: nothing is forgotten while the process lives.
(2) After a process that did not close the store, what had changed is not known: then the next snapshot tells everything.
(3) A file is told with content that is durable once the manifest is; without any it is not told yet.
(4) An inode whose bytes are being captured is told with them, in the manifest that is written behind them.
(5) Rows are read in pages with a turn of the scheduler between them, of a snapshot that nobody waits for with a pause; what
    changes meanwhile is in the next manifest.
"""

import itertools
import stat
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from cascadefs.formats.manifest import Listed, Manifest, Told, encode
from cascadefs.metadata.bulk import Bulk, marks
from cascadefs.metadata.objects import Index
from cascadefs.metadata.sqlite import Database
from cascadefs.types import EMPTY_OID, Block, Location, Object

PAGE = 256  # inodes read between two turns of the scheduler: about a millisecond
SLICE, SLICE_PAUSE_S = 32, 0.001  # the same of a snapshot: a few hundred microseconds, then requests have the thread
# A snapshot costs as much as it is long: it is written when the manifests since the last one have come to twice that.
SNAPSHOT_AT, GROWTH = 256 << 10, 2
INLINE_INODES = 16  # a manifest of so many is written down in 50 us; handing it to a thread would cost the control thread more
PAUSE_S = 5e-5  # of that thread after each few rows: requests that came meanwhile get the GIL
SNAPSHOT, CLEAN = 1, 2  # bits of manifests.snapshot; CLEAN: nothing changed afterwards, the store was closed

_ROWS = (
    "SELECT i.ino, i.mode, i.uid, i.gid, i.rdev, i.atime_ns, i.mtime_ns, i.ctime_ns, i.target, i.nlink, i.home, i.oid, "
    "o.digest, o.durable, d.digest, i.durable_oid FROM inodes i LEFT JOIN objects o ON o.oid=i.oid "
    "LEFT JOIN objects d ON d.oid=i.durable_oid "
)


@dataclass(frozen=True, slots=True)
class Taken:
    """A manifest, and what to give back if it is not written. `drafts`: of inodes whose content is not known yet."""

    manifest: Manifest
    inodes: set[int]
    objects: set[int]
    drafts: dict[int, Told] = field(default_factory=dict)


class Journal:
    """The manifests of one open store."""

    def __init__(self, database: Database, index: Index) -> None:
        self._database, self._db, self._index = database, database.connection, index
        self._bulk = Bulk(database, index)
        self._under_way = set[int]()  # inodes of a manifest that is being written
        last = self._db.execute("SELECT seq, snapshot FROM manifests ORDER BY seq DESC LIMIT 1").fetchone()
        empty = self._db.execute("SELECT 1 FROM entries LIMIT 1").fetchone() is None
        self.incomplete = not empty and not (last is not None and last[1] & CLEAN)
        if last is not None and last[1] & CLEAN:
            self._db.execute("UPDATE manifests SET snapshot=? WHERE seq=?", (last[1] & ~CLEAN, last[0]))

    # --- when

    def has_news(self) -> bool:
        """Whether a manifest would say anything."""
        return bool(self._database.changed or self._database.unlisted)

    def has_news_of(self, ino: int) -> bool:
        """Whether the extents may lack something of an inode, its names and the folders that lead to them."""
        new = self._database.changed | self._under_way if self._under_way else self._database.changed
        return self.incomplete or (bool(new) and not new.isdisjoint(self._lineage((ino,))))

    def wants_snapshot(self) -> bool:
        """Whether the next manifest should tell everything."""
        whole, since = self._index.manifest_bytes()
        return self.incomplete or since > max(SNAPSHOT_AT, GROWTH * whole) or self._index.only_manifests_hold_an_extent()

    # --- what

    async def changes(self, batch: Sequence[Object], synced: Iterable[int] = (), captured: Iterable[int] = ()) -> Taken:
        """What the extents do not tell yet; `batch` are the objects that become durable with it. Somebody waits for `synced`,
        which are durable, and `captured`, whose bytes are about to be read: they are told in any case."""
        inodes, objects = self._take()
        try:
            ready, drafts = {found.oid for found in batch}, set(captured)
            wanted = inodes | self._bulk.inodes_of(ready) | drafts
            if self.incomplete:
                wanted |= self._lineage([*synced, *drafts])
            told, gone, listed = list[Told](), list[int](), list[Listed]()
            for page in _pages(sorted(wanted)):
                rows = self._told(f"WHERE i.ino IN ({marks(page)})", page, ready, drafts)
                told += [row for row in rows if row is not None]
                gone += self._gone(page)
                await _turn_after(page)
            for page in _pages(sorted(objects | ready)):
                found = self._listed(f"oid IN ({marks(page)})", page, ready)
                listed += found.values()
                self._database.unlisted |= {oid for oid in page if oid not in found and self._index.find_oid(oid)}
                await _turn_after(page)
        except BaseException:
            self._give_back(inodes, objects)
            raise
        complete = [row for row in told if row.ino not in drafts]
        manifest = Manifest(self._index.next_manifest(), False, complete, gone, listed)
        return Taken(manifest, inodes, objects, {row.ino: row for row in told if row.ino in drafts})

    async def everything(self, hurried: Callable[[], bool] = lambda: True) -> Taken:
        """A snapshot: every inode with a name, every durable object. Slowly unless `hurried`: somebody waits for it."""
        inodes, objects = self._take()
        try:
            told, listed, at = list[Told](), list[Listed](), 0
            while rows := self._told(f"WHERE i.ino>? ORDER BY i.ino LIMIT {SLICE}", (at,), set()):
                told += [row for row in rows if row is not None]
                at = self._last_ino(at)
                await _leave_room(hurried())
            at = 0
            while oids := self._db.execute(f"SELECT oid FROM objects WHERE oid>? ORDER BY oid LIMIT {SLICE}", (at,)).fetchall():
                listed += self._listed("oid BETWEEN ? AND ?", (oids[0][0], oids[-1][0]), set()).values()
                at = oids[-1][0]
                await _leave_room(hurried())
            dirty = self._db.execute("SELECT oid FROM objects WHERE durable=0")
            self._database.unlisted |= {oid for (oid,) in dirty}
        except BaseException:
            self._give_back(inodes, objects)
            raise
        return Taken(Manifest(self._index.next_manifest(), True, told, [], listed), inodes, objects)

    def written(self, taken: Taken, at: Location, fingerprint: bytes) -> list[Location]:
        """The manifest is in an extent and synced; commits that. Returns records that died."""
        if taken.manifest.snapshot:
            self.incomplete = False
        self._under_way = set()
        return self._index.add_manifest(taken.manifest.seq, at, fingerprint, taken.manifest.snapshot)

    def not_written(self, taken: Taken) -> None:
        """It is still to be told."""
        self._give_back(taken.inodes, taken.objects)

    def close(self) -> None:
        """Nothing changes any more: the next opening may trust that the extents tell everything."""
        if not self.incomplete and not self.has_news():
            last = "(SELECT max(seq) FROM manifests)"
            self._db.execute(f"UPDATE manifests SET snapshot=snapshot|{CLEAN} WHERE seq={last}")

    # --- rows

    def _take(self) -> tuple[set[int], set[int]]:
        inodes, objects = set(self._database.changed), set(self._database.unlisted)
        self._database.changed.clear()  # in place: the namespace holds the same set
        self._database.unlisted.clear()
        self._under_way = inodes
        return inodes, objects

    def _give_back(self, inodes: Iterable[int], objects: Iterable[int]) -> None:
        self._database.changed.update(inodes)
        self._database.unlisted.update(objects)
        self._under_way = set()

    def _lineage(self, inos: Iterable[int]) -> set[int]:
        """These, and the folders on all their ways to the root."""
        found, todo = set[int](), set(inos)
        while todo:
            found |= todo
            rows = self._db.execute(f"SELECT parent FROM entries WHERE ino IN ({marks([*todo])})", [*todo])
            todo = {parent for (parent,) in rows} - found
        return found

    def _told(
        self, where: str, parameters: Sequence[int], ready: set[int], drafts: Container[int] = ()
    ) -> list[Told | None]:
        """One entry for each row; None for an inode that has no name, or no content yet and is none of the `drafts`."""
        rows = self._db.execute(_ROWS + where, parameters).fetchall()
        if not rows:
            return []
        inos = [row[0] for row in rows]
        asked = marks(inos)
        names: dict[int, list[tuple[int, bytes]]] = {}
        for ino, parent, name in self._db.execute(f"SELECT ino, parent, name FROM entries WHERE ino IN ({asked})", inos):
            names.setdefault(ino, []).append((parent, name))
        xattrs: dict[int, list[tuple[bytes, bytes]]] = {}
        for ino, name, value in self._db.execute(f"SELECT ino, name, value FROM xattrs WHERE ino IN ({asked})", inos):
            xattrs.setdefault(ino, []).append((name, value))
        logs = self._index.logs
        return [
            _as_told(row, names.get(row[0], []), xattrs.get(row[0], []), ready, row[0] in drafts, logs) for row in rows
        ]

    def _gone(self, page: Sequence[int]) -> list[int]:
        rows = self._db.execute(f"SELECT ino FROM inodes WHERE ino IN ({marks(page)}) AND nlink>0", page)
        here = {row[0] for row in rows}
        return [ino for ino in page if ino not in here]

    def _last_ino(self, at: int) -> int:
        rows = self._db.execute(f"SELECT ino FROM inodes WHERE ino>? ORDER BY ino LIMIT {SLICE}", (at,)).fetchall()
        return int(rows[-1][0]) if rows else at

    def _listed(self, where: str, parameters: Sequence[int], ready: set[int]) -> dict[int, Listed]:
        """Objects that are durable, or will be."""
        rows = self._db.execute(f"SELECT oid, digest, size, durable FROM objects WHERE {where}", parameters).fetchall()
        whole = {row[0]: row for row in rows if row[3] or row[0] in ready}
        blocks = self._bulk.blocks_of(list(whole))
        return {
            oid: Listed(digest, size, [block.fingerprint for block in blocks[oid]], self._step(blocks[oid]))
            for oid, digest, size, _ in whole.values()
        }

    def _step(self, blocks: Sequence[Block]) -> int:
        is_usual = len(blocks) < 2 or blocks[0].length == self._index.block_bytes
        return 0 if is_usual else blocks[0].length


def _as_told(
    row: Any,
    names: list[tuple[int, bytes]],
    xattrs: list[tuple[bytes, bytes]],
    ready: set[int],
    is_draft: bool,
    logs: Mapping[int, int],
) -> Told | None:
    """`row` as _ROWS has it. A draft has no content yet."""
    ino, mode, uid, gid, rdev, atime, mtime, ctime, target, links, home, oid, digest, durable, fallback, fallback_oid = row
    is_shown = durable or oid in ready
    content = digest if is_shown else fallback
    empty = is_draft or (not home and oid is None) or (content is None and fallback_oid == EMPTY_OID)
    if not links or (stat.S_ISREG(mode) and not empty and content is None):
        return None
    shown = None if empty else content
    number = 0 if shown is None or is_shown else logs.get(ino, 0)
    return Told(ino, mode, uid, gid, rdev, atime, mtime, ctime, target, shown, names, xattrs, number)


async def encoded(manifest: Manifest, hurried: Callable[[], bool] = lambda: True) -> bytes:
    """The document; a long one is written down in a thread, which lets requests run unless `hurried`."""
    if len(manifest.inodes) <= INLINE_INODES:
        return encode(manifest)

    def let_requests_run() -> None:
        if not hurried():
            time.sleep(PAUSE_S)

    return await trio.to_thread.run_sync(encode, manifest, let_requests_run)


async def _leave_room(hurried: bool) -> None:
    """Between two slices. A request takes several turns of the scheduler: slices without a pause would delay each of them."""
    await (trio.lowlevel.checkpoint() if hurried else trio.sleep(SLICE_PAUSE_S))


async def _turn_after(page: Sequence[int]) -> None:
    """A turn of the scheduler between two pages; not for the few rows of one fsync, which somebody waits for."""
    if len(page) == PAGE:
        await trio.lowlevel.checkpoint()


def _pages(numbers: Iterable[int]) -> Iterator[list[int]]:
    source = iter(numbers)
    while page := list(itertools.islice(source, PAGE)):
        yield page
