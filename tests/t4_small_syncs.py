"""A large file that stays open and is synced again and again: what is written is in proportion to what changed."""

import os
import random
import subprocess
import sys
import threading

import pytest
import trio
import trio.testing
from recount import recount
from stores import memory_of, opened, wipe_memory, written

from cascadefs import fsck
from cascadefs.config import MIB
from cascadefs.ext import hashing
from cascadefs.fsyncs import PARTS, SYNCS
from cascadefs.namespace import ROOT
from cascadefs.rebuild import rebuild
from cascadefs.types import EMPTY_OID

KIB = 1024
SIZE = 9 * MIB + 12_345


def path_of(store, ino):
    return store.files.staged_path(store.namespace.get(ino))


async def changed_and_synced(store, ino, data, places):
    """Bytes at each place change, and it is synced; what the extents grew by."""
    number, before = store.index.open_extent() or (1, 0)
    with open(path_of(store, ino), "r+b") as file:
        for at in places:
            data[at : at + 100] = os.urandom(100)
            file.seek(at)
            file.write(data[at : at + 100])
    await store.mover.fsync(ino)
    now, end = store.index.open_extent()
    assert now == number
    return int(end - before)


@pytest.mark.parametrize("way", ["index", "rebuilt"])
async def test_little_is_written_for_little_that_changed_and_all_of_it_is_there(slow_seal, way):
    data, chance = bytearray(os.urandom(SIZE)), random.Random(1)
    async with opened(slow_seal) as store:
        with written(store, "f", bytes(data)) as ino:
            await store.mover.fsync(ino)
            assert await changed_and_synced(store, ino, data, [5]) < 5 * MIB
            for _ in range(SYNCS - 1):  # its blocks get short
                await changed_and_synced(store, ino, data, [5])
            small = store.index.block_bytes // PARTS
            for _ in range(5):
                assert await changed_and_synced(store, ino, data, [chance.randrange(SIZE - 100)]) < 3 * small
            os.truncate(path_of(store, ino), SIZE - 3 * MIB)
            del data[SIZE - 3 * MIB :]
            await store.mover.fsync(ino)
    (memory,) = memory_of(slow_seal)
    assert recount(slow_seal.store, memory) == []
    wipe_memory(slow_seal)
    if way == "rebuilt":
        (slow_seal.store / "index.db").unlink()
        assert rebuild(slow_seal.store, slow_seal.shm_dir, lambda *_: None).lost_and_found == 0
    assert fsck.run(slow_seal.store, slow_seal.shm_dir, False, lambda *_: None).exit_code == 0
    async with opened(slow_seal) as store:
        ino = store.find("f").ino
        for at in (0, small - 7, 5 * small + 1, len(data) - 10):
            assert await store.streams.read(ino, at, 3 * small) == data[at : at + 3 * small]
        assert await store.get("f") == data


async def test_a_damaged_short_block_is_healed_from_a_copy(slow_seal):
    data = bytearray(os.urandom(SIZE))
    async with opened(slow_seal) as store:
        with written(store, "f", bytes(data)) as ino:
            for _ in range(SYNCS + 1):
                await changed_and_synced(store, ino, data, [5])
    wipe_memory(slow_seal)
    async with opened(slow_seal) as store:
        assert await store.get("f") == data  # it is in memory now
        found = store.index.object(store.find("f").oid)
        block = store.index.blocks(found.oid)[7]
        with open(store.residency.cold.path(block.location.extent), "r+b") as file:
            file.seek(block.location.offset + 5000)
            file.write(b"damage!!")
        assert await store.mover.heal(block.bid)
        store.residency.drop(store.residency.memory, found.digest)
        assert await store.get("f") == data


async def test_a_sync_does_not_wait_for_holes_that_are_punched(slow_seal):
    begun, may_end = threading.Event(), threading.Event()
    async with opened(slow_seal) as store, trio.open_nursery() as nursery:
        punch = store.residency.cold.punch

        def slowly(dead):
            begun.set()
            assert may_end.wait(60)
            punch(dead)

        store.residency.cold.punch = slowly
        await store.put("gone", b"g" * 5000)
        await store.flush()
        store.files.forget_if_gone(store.namespace.unlink(ROOT, b"gone").ino)
        nursery.start_soon(store.mover.flush_batch, ())
        assert await trio.to_thread.run_sync(begun.wait, 60)
        with written(store, "f", b"new") as ino:
            await store.mover.fsync(ino)
        assert not may_end.is_set() and store.namespace.get(ino).durable_oid
        nursery.cancel_scope.cancel()  # the lock is taken again all the same
        may_end.set()
    assert not store.mover.extent.lock.locked()


@pytest.mark.parametrize("step", [4096, 100_000, 1 << 22])
def test_prints_of_a_mapping_are_those_of_what_is_read(tmp_path, step):
    data, secret = os.urandom(1_234_567), bytes(range(192))
    (tmp_path / "f").write_bytes(data)
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    parts = [data[at : at + step] for at in range(0, len(data), step)]
    assert hashing.mapped_fingerprints(fd, 0, len(data), step, secret) == [hashing.fingerprint(p, secret) for p in parts]
    assert hashing.mapped_fingerprints(fd, 0, 0, step, secret) == []
    tail = hashing.fingerprint(data[8192:], secret)
    assert hashing.mapped_fingerprints(fd, 8192, len(data) - 8192, 1 << 22, secret) == [tail]
    os.close(fd)


def test_a_mapped_file_that_shrinks_is_an_error_and_other_faults_stay_fatal(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(MIB))
    fd = os.open(path, os.O_RDONLY)
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output"):
            hashing.mapped_fingerprints(fd, 0, 3 * MIB, 4096, bytes(192))
    os.close(fd)
    code = (
        "import mmap, os, sys; from cascadefs.ext import hashing; fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "m = mmap.mmap(fd, 1 << 20, prot=mmap.PROT_READ)\n"
        "hashing.mapped_fingerprints(fd, 0, 1 << 20, 4096, bytes(192)); os.truncate(sys.argv[1], 0); m[5000]"
    )
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == -7  # SIGBUS


async def test_what_one_file_lets_go_of_another_falls_back_to_in_the_same_sync(slow_seal):
    """Both are synced by one commit; the object that only the first fell back to went before the second named it."""
    async with opened(slow_seal) as store:
        with written(store, "first", b"x" * 5000) as first, written(store, "second", b"y" * 5000) as second:
            await store.mover.fsync(first)
            shared = store.namespace.get(first).durable_oid
            assert store.index.fall_back_all({first: EMPTY_OID, second: shared}) == []
            assert store.index.refs(shared) == 1 and store.namespace.get(second).durable_oid == shared
            with pytest.raises(LookupError):
                store.index.set_fallback(second, shared + 100)
            assert store.namespace.get(second).durable_oid == shared


async def test_a_file_takes_in_one_sync_what_another_has_left(slow_seal):
    async with opened(slow_seal) as store:
        with (
            written(store, "ahead", b"z" * 5000) as ahead,
            written(store, "first", b"x" * 5000) as first,
            written(store, "second", b"x" * 5000) as second,
        ):
            await store.mover.fsync(first)
            with open(path_of(store, first), "r+b") as file:
                file.write(b"changed")
            async with trio.open_nursery() as nursery:
                for ino in (ahead, first, second):  # while the first is synced the others wait, for the same turn
                    nursery.start_soon(store.mover.fsync, ino)
                    await trio.testing.wait_all_tasks_blocked(0.0)
            assert store.index.object(store.namespace.get(second).durable_oid).size_bytes == 5000
    assert recount(slow_seal.store, memory_of(slow_seal)[0]) == []
