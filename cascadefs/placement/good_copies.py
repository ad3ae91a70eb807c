"""Damaged records: whether the block is to be had elsewhere, what is served meanwhile, what is counted and logged.

Owns: the search for a good copy while a store is open. mover.py writes what is found to a new place. Methods that read block
run in worker threads of trio and ask the index through it. Invariants:
(1) What read() returns has the fingerprint of the block, wherever it came from; otherwise it raises CorruptRecord (EIO).
(2) Each damaged record is logged once, with the paths of the files it hurts, and counted at each read.
"""

import logging
import mmap
import os
from collections.abc import Callable, Sequence

import trio

from cascadefs.errors import CorruptRecord
from cascadefs.ext import hashing
from cascadefs.formats.record import HEADER_BYTES
from cascadefs.media import file_io
from cascadefs.metadata.objects import Index
from cascadefs.tiers.extents import ColdTier, Piece
from cascadefs.tiers.folder import FileTier
from cascadefs.types import Block, Location

log = logging.getLogger(__name__)
HOLDERS = 8  # objects that are looked through for a block
FLIP_BYTES_MAX = 64 << 10  # looking for one flipped bit costs the square of the length: a second for 64 KiB
Source = tuple[int, int, str]  # descriptor, offset, where it is


class Healer:
    """Counts since the store was opened: `corrupt_reads`, `healed`; `damaged` holds blocks without a good copy."""

    def __init__(
        self, index: Index, tiers: Sequence[FileTier], cold: ColdTier, paths_of: Callable[[int], list[str]]
    ) -> None:
        """`paths_of`: the files that have a block, for the log."""
        self._index, self._tiers, self._cold, self.paths_of = index, tiers, cold, paths_of
        self.corrupt_reads = self.healed = 0
        self.damaged: dict[int, Location] = {}
        self._healable: set[int] = set()

    def read(self, block: Block) -> tuple[mmap.mmap, memoryview]:
        """As ColdTier.read(); a damaged record is replaced by a good copy, if there is one. In a worker thread."""
        assert block.location is not None
        try:
            return self._cold.read(block.location, block.fingerprint)
        except CorruptRecord as e:
            piece = self.good_piece(block)
            trio.from_thread.run_sync(self._note, block, piece is not None)
            if piece is None:
                raise e
        try:
            buffer = mmap.mmap(-1, HEADER_BYTES + block.length)
            payload = memoryview(buffer)[HEADER_BYTES:]
            hashing.read_into(piece.fd, piece.offset, payload)
            if hashing.fingerprint(payload, self._cold.secret) == block.fingerprint:
                return buffer, payload
            payload.release()
            buffer.close()
            raise CorruptRecord(f"the copy of block {block.bid} changed while it was read")
        finally:
            os.close(piece.fd)

    def good_piece(self, block: Block) -> Piece | None:
        """An open file that has the block, verified; the caller closes it. In a worker thread."""
        sources = trio.from_thread.run_sync(self._open_sources, block)
        chosen: Piece | None = None
        buffer = memoryview(bytearray(block.length))
        for fd, offset, where in sources:
            if chosen is None and self._holds(fd, offset, buffer, block):
                log.info("block %d is to be had from %s", block.bid, where)
                chosen = Piece(block.bid, block.fingerprint, fd, offset, block.length)
            else:
                os.close(fd)
        return chosen or self._flipped(block)

    def _holds(self, fd: int, offset: int, buffer: memoryview, block: Block) -> bool:
        try:
            return hashing.read_fingerprint(fd, offset, buffer, self._cold.secret) == block.fingerprint
        except OSError:
            return False

    def _open_sources(self, block: Block) -> list[Source]:
        """Candidates, opened: the record itself (perhaps only its header is damaged), copies in the tiers, doubles."""
        found = list[Source]()
        assert block.location is not None
        for at in [block.location, *self._index.doubles(block)]:
            _open(found, str(self._cold.path(at.extent)), at.offset + HEADER_BYTES)
        for digest, offset in self._index.holders(block.bid, HOLDERS):
            for tier in self._tiers:
                if digest in tier.objects:
                    _open(found, tier.object_path(digest), offset)
        return found

    def _flipped(self, block: Block) -> Piece | None:
        """The record's own payload with the one bit put right that was flipped."""
        if block.length > FLIP_BYTES_MAX or block.location is None:
            return None
        payload = bytearray(block.length)
        try:
            fd = file_io.open_file(self._cold.path(block.location.extent), os.O_RDONLY)
        except OSError:
            return None
        try:
            file_io.read_fully(fd, memoryview(payload), block.location.offset + HEADER_BYTES)
        except OSError:
            return None
        finally:
            os.close(fd)
        bit = hashing.flipped_bit(payload, self._cold.secret, block.fingerprint)
        if bit < 0:
            return None
        payload[bit // 8] ^= 1 << bit % 8
        fd = os.memfd_create("cascadefs-healed")
        os.write(fd, payload)
        return Piece(block.bid, block.fingerprint, fd, 0, block.length)

    # --- what is known of damage

    def _note(self, block: Block, has_copy: bool) -> None:
        """A read met a damaged record."""
        self.corrupt_reads += 1
        if has_copy:
            self._healable.add(block.bid)
        self.note_damage(block, has_copy)

    def note_damage(self, block: Block, has_copy: bool) -> None:
        """Log it once; remember it while there is no good copy."""
        at = block.location
        assert at is not None
        if self.damaged.get(block.bid) == at:
            return
        files = ", ".join(self.paths_of(block.bid)) or "no file any more"
        outcome = "a good copy is served and written elsewhere" if has_copy else "there is no good copy: reading it is EIO"
        log.error("record %d:%d is damaged; it belongs to %s; %s", at.extent, at.offset, files, outcome)
        self.damaged[block.bid] = at

    def take_healable(self) -> list[int]:
        """Blocks that were served from a copy and wait to be written to a new place."""
        taken, self._healable = list(self._healable), set()
        return taken

    def is_healed(self, block: Block) -> None:
        """It has a good record again."""
        self.damaged.pop(block.bid, None)
        self.healed += 1

    def still_damaged(self) -> dict[int, Location]:
        """Blocks without a good record; those that were deleted or moved since are forgotten."""
        now = {bid: self._index.block(bid) for bid in self.damaged}
        self.damaged = {bid: at for bid, at in self.damaged.items() if (b := now[bid]) is not None and b.location == at}
        return self.damaged


def _open(found: list[Source], path: str, offset: int) -> None:
    try:
        found.append((file_io.open_file(path, os.O_RDONLY), offset, path))
    except OSError:
        return  # it went meanwhile: the others are asked
