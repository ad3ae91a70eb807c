"""Overlapping transfers: order, errors, and that nothing is under way afterwards."""

import errno
import os
import threading
import time

import pytest

from cascadefs.ext import hashing
from cascadefs.formats.record import record_bytes
from cascadefs.media import file_io
from cascadefs.media.transfers import DEPTH, KEPT, KEPT_BYTES, LANES, Buffers, Writes, in_lanes
from cascadefs.tiers import extents as cold_module
from cascadefs.tiers.extents import ColdTier, Piece


def test_buffers_come_back_and_every_byte_arrives(tmp_path):
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    seen = set()
    with Writes(fd, Buffers()) as writes:
        for i in range(9):
            data = writes.buffer(1 << 20)
            seen.add(id(data))
            data[: 1 << 20] = bytes([i]) * (1 << 20)
            writes.put(data, 1 << 20, i << 20)
        writes.finish()
    assert (tmp_path / "f").read_bytes() == b"".join(bytes([i]) * (1 << 20) for i in range(9))
    assert len(seen) <= DEPTH + 1
    os.close(fd)


def test_buffers_are_large_enough_and_few_are_kept():
    buffers = Buffers()
    taken = [buffers.take(size) for size in (1, 5 << 20, KEPT_BYTES, KEPT_BYTES + 1)]
    assert [len(data) for data in taken] == [1, KEPT_BYTES, KEPT_BYTES, KEPT_BYTES + 1]
    for data in [*taken, *(buffers.take(KEPT_BYTES) for _ in range(KEPT))]:
        buffers.give(data)
    assert taken[0].closed and not taken[1].closed and taken[3].closed
    assert sum(len(data) for data in buffers._free) == KEPT * KEPT_BYTES


def test_a_failed_write_is_told_and_nothing_is_under_way_afterwards(monkeypatch):
    running, lock = [0], threading.Lock()

    def failing(fd, data, position):
        with lock:
            running[0] += 1
        time.sleep(0.02)
        with lock:
            running[0] -= 1
        if position == 1:
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(file_io, "write_fully", failing)
    with pytest.raises(OSError) as caught, Writes(-1, Buffers()) as writes:
        for position in range(10):
            writes.put(writes.buffer(10), 10, position)
        writes.finish()
    assert caught.value.errno == errno.ENOSPC and running == [0]


def nobody():
    """Is told that all are begun."""


def test_results_come_in_order_whatever_the_lanes_do():
    seen, lock = set(), threading.Lock()

    def slow(number):
        with lock:
            seen.add(threading.get_ident())
        time.sleep(0.01 * (number % 3))
        return number * number

    assert in_lanes(range(20), slow, nobody) == [number * number for number in range(20)]
    assert threading.get_ident() in seen and 1 < len(seen) <= LANES
    assert in_lanes([], slow, nobody) == []
    assert in_lanes([5], lambda number: threading.get_ident(), nobody) == [threading.get_ident()]


def test_it_is_told_that_all_are_begun_while_the_last_is_under_way():
    told = threading.Event()
    assert in_lanes([1, 2, 3], lambda number: number == 1 or told.wait(10), told.set) == [True] * 3
    for few in ([], [1]):
        told.clear()
        in_lanes(few, lambda number: told.is_set(), told.set)
        assert told.is_set()


def test_after_an_error_nothing_is_under_way_and_nothing_more_is_begun():
    running, begun, lock = [0], [0], threading.Lock()

    def failing(number):
        with lock:
            running[0] += 1
            begun[0] += 1
        time.sleep(0.02)
        with lock:
            running[0] -= 1
        if number in (1, 2):
            raise OSError(errno.ENOSPC, f"full at {number}")

    with pytest.raises(OSError, match="full at 1"):
        in_lanes(range(50), failing, nobody)
    assert running == [0] and begun[0] <= 2 * LANES


@pytest.fixture
def many(tmp_path, database, monkeypatch):
    """An extent tier whose writes hold two records, and pieces for five writes: sizes that leave every length of padding."""
    monkeypatch.setattr(cold_module, "WRITE_BYTES", 8192)
    tier = ColdTier(tmp_path / "extents", database.identity.store_id, database.identity.secret)
    sizes = [5000, 1, 4032, 8000, 100, 4033, 12_000, 7, 4000, 1]
    data = [os.urandom(size) for size in sizes]
    (tmp_path / "data").write_bytes(b"".join(data))
    fd = os.open(tmp_path / "data", os.O_RDONLY)
    prints = [hashing.fingerprint(part, tier.secret) for part in data]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    yield tier, data, [Piece(i, prints[i], fd, offsets[i], sizes[i]) for i in range(len(sizes))]
    os.close(fd)


def test_records_of_many_writes_are_read_back_with_clean_padding(many):
    tier, data, pieces = many
    start = tier.create(1)
    placed, end = tier.append(1, start, pieces)
    assert [bid for bid, _ in placed] == list(range(len(pieces)))
    assert end - start == sum(record_bytes(piece.length) for piece in pieces) == os.path.getsize(tier.path(1)) - start
    for (_, at), piece, part in zip(placed, pieces, data, strict=True):
        tier.verify(at, piece.fingerprint)  # the padding, too: buffers are used again
        buffer, payload = tier.read(at, piece.fingerprint)
        assert payload == part
        payload.release()
        buffer.close()


def test_an_extent_is_cut_back_after_one_of_many_writes_failed(many, monkeypatch):
    tier, _, pieces = many
    start, real, calls = tier.create(1), file_io.write_fully, [0]

    def third_fails(fd, data, position):
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(errno.ENOSPC, "full")
        real(fd, data, position)

    monkeypatch.setattr(file_io, "write_fully", third_fails)
    with pytest.raises(OSError, match="full"):
        tier.append(1, start, pieces)
    assert os.path.getsize(tier.path(1)) == start
    monkeypatch.setattr(file_io, "write_fully", real)
    assert tier.append(1, start, pieces)[1] == os.path.getsize(tier.path(1))
