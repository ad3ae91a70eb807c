"""Heals what can be healed without guessing: one method for each kind of finding.

Owns: the order (index files first, then rows, then records) and the search for a good copy of a block. Invariants:
(1) A byte is only changed to what a checksum, a recount or a verified copy says that it must be.
(2) A damaged block is rewritten elsewhere and then relocated; its old record is punched only after the index was synced.
(3) The database is open only between open() and close(), and close() leaves right checksums.
"""

import contextlib
import logging
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from cascadefs.errors import CorruptRecord
from cascadefs.ext import hashing
from cascadefs.integrity.fsck.extents import HEAD, PAGE, frame, header_page, record_size
from cascadefs.integrity.fsck.report import Finding, Places
from cascadefs.media import file_io
from cascadefs.metadata.bulk import Bulk
from cascadefs.metadata.namespace import ROOT
from cascadefs.metadata.objects import Index, recount_objects
from cascadefs.metadata.sqlite import Database
from cascadefs.tiers import scan
from cascadefs.tiers.extents import ColdTier, Piece
from cascadefs.types import Location

log = logging.getLogger(__name__)
BEFORE_OPENING = ("rewrite_identity", "flip_bit", "rewrite_sums")
FLIP_BYTES_MAX = 64 << 10  # looking for one bit in a payload costs its length squared: a second for 64 KiB
Source = tuple[int, int, str]  # descriptor, offset, path


class Repairer:
    """Repairs one store, whose lock the caller does not hold."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._dead: list[Location] = []
        self._records: dict[tuple[bytes, int], list[tuple[int, int]]] | None = None

    def files(self, findings: list[Finding]) -> None:
        """What must be right before the index can be opened."""
        self._apply(findings, BEFORE_OPENING)

    def rows_and_records(self, findings: list[Finding]) -> None:
        """The rest, through an open database. StoreError when it cannot be opened."""
        rest = {f.heal[0] for f in findings if f.heal} - set(BEFORE_OPENING)
        if not rest:
            return
        self.database = Database(self.places.store)
        try:
            identity = self.database.identity
            self.index = Index(self.database)
            self.bulk = Bulk(self.database, self.index)
            self.cold = ColdTier(self.places.extents, identity.store_id, identity.secret)
            self._apply(findings, tuple(rest))
            self.database.connection.execute("UPDATE manifests SET snapshot=snapshot & 1")  # what they say may be old
            self.database.sync()
            self.cold.punch(self._dead)
        finally:
            self.database.close()

    def _apply(self, findings: list[Finding], names: tuple[str, ...]) -> None:
        done = set[tuple[str, tuple[object, ...]]]()
        for finding in findings:
            if finding.heal is not None and finding.heal[0] in names and finding.heal not in done:
                done.add(finding.heal)
                name, arguments = finding.heal
                try:
                    getattr(self, name)(*arguments)
                except OSError as e:  # the second check tells what is left
                    log.info("%s could not be healed: %s", finding.what, e)

    # --- files of the index

    def rewrite_identity(self, text: str) -> None:
        """store.json."""
        self._write(self.places.store / "store.json", 0, text.encode())

    def flip_bit(self, name: str, bit: int) -> None:
        """One bit of a file of the index."""
        path = self.places.store / name
        with path.open("rb") as file:
            file.seek(bit // 8)
            byte = file.read(1)[0]
        self._write(path, bit // 8, bytes([byte ^ 1 << bit % 8]))

    def rewrite_sums(self) -> None:
        """Without a sidecar the next opening makes one; SQLite's own check has found nothing."""
        file_io.rename(self.places.store / "index.sums", self.places.store / "index.sums.damaged")

    @staticmethod
    def _write(path: Path, at: int, data: bytes) -> None:
        fd = file_io.open_file(path, os.O_RDWR)
        try:
            file_io.write_fully(fd, data, at)
            file_io.sync_file(fd)
        finally:
            os.close(fd)

    # --- rows

    def remove_name(self, parent: int, name: bytes) -> None:
        """A name that leads nowhere."""
        self.database.connection.execute("DELETE FROM entries WHERE parent=? AND name=?", (parent, name))

    def remove_xattrs(self, ino: int) -> None:
        """Attributes of nothing."""
        self.database.connection.execute("DELETE FROM xattrs WHERE ino=?", (ino,))

    def set_links(self, ino: int, links: int) -> None:
        """The link count, as counted."""
        self.database.connection.execute("UPDATE inodes SET nlink=? WHERE ino=?", (links, ino))

    def to_lost_and_found(self, ino: int) -> None:
        """An inode that no path leads to gets one; counts are put right with it."""
        db = self.database.connection
        with self.database.transaction():
            folder = self._lost_and_found()
            db.execute("DELETE FROM entries WHERE ino=?", (ino,))
            (entry,) = db.execute("SELECT coalesce(max(id), 0) + 1 FROM entries").fetchone()
            db.execute("INSERT INTO entries VALUES(?,?,?,?)", (folder, entry, b"inode-%d" % ino, ino))
            links = (
                "CASE WHEN mode & 61440 = 16384 THEN 2 + (SELECT count(*) FROM entries e JOIN inodes c ON c.ino=e.ino WHERE "
                "e.parent=inodes.ino AND c.mode & 61440 = 16384) ELSE (SELECT count(*) FROM entries WHERE ino=inodes.ino) END"
            )
            db.execute(f"UPDATE inodes SET nlink={links} WHERE nlink>0")

    def _lost_and_found(self) -> int:
        db = self.database.connection
        row = db.execute("SELECT ino FROM entries WHERE parent=? AND name=?", (ROOT, b"lost+found")).fetchone()
        if row is not None:
            return int(row[0])
        (ino,) = db.execute("SELECT max(ino) + 1 FROM inodes").fetchone()
        (entry,) = db.execute("SELECT coalesce(max(id), 0) + 1 FROM entries").fetchone()
        now, mode = time.time_ns(), stat.S_IFDIR | 0o700
        owner = (os.getuid(), os.getgid())
        columns = "ino, mode, uid, gid, nlink, rdev, size, atime_ns, mtime_ns, ctime_ns"
        db.execute(f"INSERT INTO inodes({columns}) VALUES(?,?,?,?,2,0,0,?,?,?)", (ino, mode, *owner, now, now, now))
        db.execute("INSERT INTO entries VALUES(?,?,?,?)", (ROOT, entry, b"lost+found", ino))
        return int(ino)

    def recount(self) -> None:
        """Every count from what is there; what nothing refers to goes."""
        db = self.database.connection
        with self.database.transaction():
            recount_objects(db)
            db.execute("DELETE FROM objects WHERE refs=0")
            db.execute("DELETE FROM object_blocks WHERE oid NOT IN (SELECT oid FROM objects)")
            db.execute("UPDATE blocks SET refs=(SELECT count(*) FROM object_blocks o WHERE o.bid=blocks.bid)")
            for extent, offset, length in db.execute("SELECT extent, offset, length FROM blocks WHERE refs=0"):
                self._dead += [Location(extent, offset, length)] if extent is not None else []
            db.execute("DELETE FROM blocks WHERE refs=0")
            db.execute(
                "UPDATE objects SET durable=0 WHERE oid IN (SELECT oid FROM object_blocks o JOIN blocks b ON b.bid=o.bid "
                "WHERE b.extent IS NULL)"
            )
            size = f"(length + {HEAD.size + PAGE - 1}) / {PAGE} * {PAGE}"
            db.execute(f"UPDATE extents SET live=(SELECT coalesce(sum({size}), 0) FROM blocks WHERE extent=number)")

    def drop_manifest(self, seq: int) -> None:
        """Its record becomes dead; the mount writes a snapshot, because no manifest is marked as the last word."""
        row = self.database.connection.execute("SELECT extent, offset, length FROM manifests WHERE seq=?", (seq,)).fetchone()
        self.database.connection.execute("DELETE FROM manifests WHERE seq=?", (seq,))
        if row is not None:
            self._dead.append(Location(*row))

    # --- records

    def rewrite_header(self, number: int) -> None:
        """The first page of an extent says nothing that store.json and its name do not say."""
        self._write(self.cold.path(number), 0, header_page(self.database.identity.store_id, number))

    def rewrite_frame(self, number: int, at: int, kind: bytes, fingerprint: bytes, length: int) -> None:
        """Header and padding of a record whose payload is good."""
        self._write(self.cold.path(number), at, frame(kind, fingerprint, length, at))
        end = at + HEAD.size + length
        self._write(self.cold.path(number), end, bytes(at + record_size(length) - end))

    def rewrite_footer(self, number: int, at: int) -> None:
        """Seal the extent once more, with the records that the index knows."""
        self.index.seal_extent(number, self.cold.seal(number, at, self.index.extent_records(number)))

    def punch(self, number: int, at: int, length: int) -> None:
        """Bytes that belong to no record read as zeros again, on filesystems without holes, too."""
        self._write(self.cold.path(number), at, bytes(length))
        fd = file_io.open_file(self.cold.path(number), os.O_RDWR)
        try:
            file_io.punch_hole(fd, at, length)
        finally:
            os.close(fd)

    def cut(self, number: int, size: int) -> None:
        """A sealed extent ends with its tail."""
        file_io.truncate(self.cold.path(number), size)

    def drop_copy(self, path: str) -> None:
        """A damaged copy of what the extents have."""
        file_io.remove(path)

    # --- blocks

    def heal_block(self, bid: int) -> None:
        """Write a good copy to the open extent and read from there. CorruptRecord when there is none."""
        query = "SELECT fingerprint, length, extent, offset FROM blocks WHERE bid=?"
        fingerprint, length, extent, offset = self.database.connection.execute(query, (bid,)).fetchone()
        for fd, at, _ in self._sources(bid, fingerprint, length, extent, offset):
            with contextlib.suppress(CorruptRecord):
                found = self.index.open_extent()
                number = self.index.next_extent() if found is None else found[0]
                position = self.cold.create(number) if found is None else found[1]
                placed, end = self.cold.append(number, position, [Piece(bid, fingerprint, fd, at, length)])
                self._dead += self.bulk.relocate(bid, placed[0][1], end)
                return
        raise CorruptRecord(f"block {bid} has no good copy")

    def _sources(self, bid: int, fingerprint: bytes, length: int, extent: int, offset: int) -> Iterator[Source]:
        """Open files that may hold the block: copies in the tiers, other records, the record itself with a bit put right."""
        for digest, offset_there in self.index.holders(bid, -1):
            for _, folder, _ in self.places.tiers():
                yield from self._opened(folder / "objects" / digest.hex(), offset_there)
        for number, at in self._good_records().get((fingerprint, length), ()):
            yield from self._opened(self.cold.path(number), at + HEAD.size)
        if length <= FLIP_BYTES_MAX:
            yield from self._flipped(self.cold.path(extent), offset + HEAD.size, length, fingerprint)

    @staticmethod
    def _opened(path: Path, at: int) -> Iterator[Source]:
        try:
            fd = file_io.open_file(path, os.O_RDONLY)
        except OSError:
            return
        try:
            yield fd, at, str(path)
        finally:
            os.close(fd)

    def _flipped(self, path: Path, at: int, length: int, fingerprint: bytes) -> Iterator[Source]:
        payload = bytearray(length)
        with contextlib.suppress(OSError):
            fd = file_io.open_file(path, os.O_RDONLY)
            try:
                file_io.read_fully(fd, memoryview(payload), at)
            finally:
                os.close(fd)
        bit = hashing.flipped_bit(payload, self.database.identity.secret, fingerprint)
        if bit < 0:
            return
        payload[bit // 8] ^= 1 << bit % 8
        fd = os.memfd_create("cascadefs-healed")
        try:
            os.write(fd, payload)
            yield fd, 0, "memory"
        finally:
            os.close(fd)

    def _good_records(self) -> dict[tuple[bytes, int], list[tuple[int, int]]]:
        """Every good record of every extent; looked for once, when the first damaged block has no copy in a tier."""
        if self._records is None:
            self._records = {}
            for number, path in scan.extents(self.places.extents):
                for found in scan.records(path, number, self.database.identity.secret):
                    if not isinstance(found, int):
                        key = (found.header.fingerprint, found.header.length)
                        self._records.setdefault(key, []).append((number, found.header.offset))
        return self._records
