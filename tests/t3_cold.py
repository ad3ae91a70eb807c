"""Index and tiers together: blocks packed into an extent, placed, read back verified, dropped."""

import os
import stat

import pytest

from cascadefs.errors import CorruptRecord
from cascadefs.ext import hashing
from cascadefs.formats.record import record_bytes
from cascadefs.media.file_io import lease_is_free
from cascadefs.metadata.bulk import Bulk, NewObject, Shown
from cascadefs.metadata.namespace import ROOT
from cascadefs.metadata.objects import digest_of
from cascadefs.placement.decisions import MemoryState, may_promote, plan_eviction, stage_in_memory
from cascadefs.placement.policies.lru import Lru
from cascadefs.tiers.extents import ColdTier, Piece, holes_of
from cascadefs.tiers.folder import FileTier
from cascadefs.tiers.packer import Capture, Subject
from cascadefs.types import Home, Location

SIZES = [1, 4032, 4033, 300_000]


@pytest.fixture
def cold(tmp_path, database):
    return ColdTier(tmp_path / "extents", database.identity.store_id, database.identity.secret)


def stored(index, namespace, cold, database, tmp_path):
    """A durable object of SIZES blocks shown by one inode: (ino, object)."""
    data = [os.urandom(size) for size in SIZES]
    (tmp_path / "data").write_bytes(b"".join(data))
    fd = os.open(tmp_path / "data", os.O_RDONLY)
    prints = [hashing.fingerprint(d, database.identity.secret) for d in data]
    ino = namespace.make(ROOT, b"f", stat.S_IFREG | 0o644, 0, 0).ino
    digest, bulk = digest_of(sum(SIZES), prints), Bulk(database, index)
    new = NewObject(digest, sum(SIZES), list(zip(prints, SIZES, strict=True)), True)
    assert bulk.show([Shown(ino, new, 1, 1, 0)]) == []
    found = index.find(digest)
    blocks, at, pieces = index.blocks(found.oid), 0, []
    for block in blocks:
        pieces.append(Piece(block.bid, block.fingerprint, fd, at, block.length))
        at += block.length
    placed, end = cold.append(1, cold.create(1), pieces)
    os.close(fd)
    assert bulk.place(placed, 1, end) == []
    assert bulk.mark_durable([found.oid]) == []
    return ino, found


def mostly_zeros():
    """4 MiB with three pages that are not; the last byte is zero, too."""
    data = bytearray(4 << 20)
    for at in (5, 1 << 20, (3 << 20) - 1):
        data[at : at + 3000] = os.urandom(3000)
    return bytes(data)


def read_back(cold, location, data, secret):
    buffer, payload = cold.read(location, hashing.fingerprint(data, secret))
    assert payload == data
    payload.release()
    buffer.close()


@pytest.mark.parametrize("count", [1, 5])  # one write, and several in threads
def test_zeros_take_no_space_in_an_extent(cold, database, tmp_path, count):
    data, secret = mostly_zeros(), database.identity.secret
    (tmp_path / "data").write_bytes(data)
    fd = os.open(tmp_path / "data", os.O_RDONLY)
    pieces = [Piece(n, hashing.fingerprint(data, secret), fd, 0, len(data)) for n in range(count)]
    placed, end = cold.append(1, cold.create(1), pieces)
    os.close(fd)
    state = os.stat(cold.path(1))
    assert state.st_size == end and state.st_blocks * 512 < count * (256 << 10)
    for _, location in placed:
        read_back(cold, location, data, secret)


def test_nor_when_files_go_straight_there(cold, database, tmp_path):
    data, secret = mostly_zeros() * 3, database.identity.secret
    (tmp_path / "data").write_bytes(data)
    fd, start = os.open(tmp_path / "data", os.O_RDONLY), cold.create(1)
    os.pwrite(other := os.open(cold.path(1), os.O_WRONLY), b"rubbish of a crash" * 100_000, start)
    os.close(other)
    subject = Subject(fd, len(data), False, {})
    end = Capture(cold, 4 << 20, 1, start, set).run([subject], lambda: b"a manifest")
    os.close(fd)
    state = os.stat(cold.path(1))
    assert state.st_size == end and state.st_blocks * 512 < 1 << 20
    (location,) = subject.places.values()
    read_back(cold, location, data[: 4 << 20], secret)


def test_what_was_packed_is_read_back(index, namespace, cold, database, tmp_path):
    ino, found = stored(index, namespace, cold, database, tmp_path)
    whole = b""
    for block in index.blocks(found.oid):
        buffer, payload = cold.read(block.location, block.fingerprint)
        whole += bytes(payload)
        payload.release()
        buffer.close()
    assert whole == (tmp_path / "data").read_bytes()
    assert namespace.get(ino).durable_oid == found.oid and index.refs(found.oid) == 2


def test_a_flipped_byte_is_an_error_and_its_neighbour_is_not(index, namespace, cold, database, tmp_path):
    _, found = stored(index, namespace, cold, database, tmp_path)
    first, second, *_ = index.blocks(found.oid)
    for at in (first.location.offset + 3, first.location.offset + 64):
        with open(cold.path(1), "r+b") as f:
            f.seek(at)
            byte = f.read(1)
            f.seek(at)
            f.write(bytes([byte[0] ^ 1]))
            f.flush()
            with pytest.raises(CorruptRecord):
                cold.read(first.location, first.fingerprint)
            f.seek(at)
            f.write(byte)
    for block in (first, second):
        buffer, payload = cold.read(block.location, block.fingerprint)
        payload.release()
        buffer.close()


def test_the_last_reference_takes_object_and_blocks_along(index, namespace, cold, database, tmp_path):
    ino, found = stored(index, namespace, cold, database, tmp_path)
    dead = index.set_content(ino, Home.NONE, None, 0, keep_fallback=False)
    assert sorted(at.length for at in dead) == sorted(SIZES)
    assert index.find(found.digest) is None and index.totals()["unique_bytes"] == 0 and index.totals()["live_bytes"] == 0
    before = cold.allocated_bytes()
    cold.punch(dead)
    assert cold.allocated_bytes() < before


def test_dead_neighbours_are_one_hole():
    step = record_bytes(100)
    dead = [Location(1, step * at, 100) for at in (7, 3, 2, 4)] + [Location(2, 0, 100)]
    assert holes_of(dead) == {1: [(2 * step, 5 * step), (7 * step, 8 * step)], 2: [(0, step)]}
    assert holes_of([]) == {}


def test_a_piece_that_changed_is_not_written(cold, tmp_path, database):
    (tmp_path / "p").write_bytes(b"new bytes")
    fd = os.open(tmp_path / "p", os.O_RDONLY)
    with pytest.raises(CorruptRecord, match="changed"):
        cold.append(1, cold.create(1), [Piece(1, hashing.fingerprint(b"old bytes", database.identity.secret), fd, 0, 9)])
    os.close(fd)


def test_adoption_keeps_the_bytes_and_the_lease_tells_writers(tmp_path):
    tier = FileTier(tmp_path / "tier")
    fd = tier.create_staged(5)
    writer = os.open(tier.staged_path(5), os.O_WRONLY)
    os.write(writer, b"content")
    assert not lease_is_free(fd)
    os.close(writer)
    assert lease_is_free(fd)
    tier.adopt(5, bytes(16))
    tier.drop_staged(5)
    assert tier.staged() == [] and list(FileTier(tmp_path / "tier").objects) == [bytes(16)]
    copy = tier.open_object(bytes(16))
    assert os.pread(copy, 99, 0) == b"content"
    tier.drop(bytes(16))
    os.close(copy)
    os.close(fd)
    assert tier.objects == {} and tier.used_bytes() == 0


def test_eviction_takes_the_oldest_that_may_go():
    policy = Lru()
    for key in (b"a", b"b", b"c", b"d", b"a"):
        policy.touched(key)
    clean = {b"a": 10, b"b": 10, b"d": 10}
    state = MemoryState(100, 90, clean, (), 30)
    assert plan_eviction(state, policy.victims()) == [b"b", b"d"]
    assert plan_eviction(MemoryState(100, 90, clean, {b"b"}, 20), policy.victims()) == [b"d", b"a"]
    assert plan_eviction(MemoryState(100, 80, clean, (), 30), policy.victims()) == []
    assert stage_in_memory(100, 89) and not stage_in_memory(100, 90)
    assert may_promote(state, 40) and not may_promote(state, 41) and not may_promote(MemoryState(100, 0, {}, (), 0), 51)
