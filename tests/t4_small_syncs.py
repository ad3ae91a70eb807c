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

from cascadefs.config import MIB
from cascadefs.ext import hashing
from cascadefs.integrity import fsck
from cascadefs.integrity.rebuild import rebuild
from cascadefs.metadata.namespace import ROOT
from cascadefs.tiers import patch_log
from cascadefs.types import EMPTY_OID
from cascadefs.writeback import patches
from cascadefs.writeback.fsync import PARTS, SYNCS

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


@pytest.fixture
def whole(monkeypatch):
    """Without patches: as the first syncs of a file."""
    monkeypatch.setattr(patches, "FROM_BYTES", 1 << 60)


@pytest.mark.usefixtures("whole")
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


@pytest.mark.usefixtures("whole")
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


def logs_of(settings):
    return patch_log.known(settings.store / patch_log.FOLDER)


def durable(store, ino):
    """What would come back if memory were lost now: base and patches, put together by hand."""
    inode = store.namespace.get(ino)
    data = bytearray()
    for block in store.index.blocks(inode.durable_oid):
        buffer = bytearray(block.length)
        with open(store.residency.cold.path(block.location.extent), "rb") as extent:
            extent.seek(block.location.offset + 64)
            extent.readinto(buffer)
        data += buffer
    if ino in store.index.logs:
        path = patch_log.path_of(store.settings.store / patch_log.FOLDER, ino, store.index.logs[ino])
        for patch in patch_log.read(path, store.database.identity.secret):
            size = patch.header.size_bytes
            data = data[:size] + bytes(max(0, size - len(data)))
            for offset, part in patch.parts():
                data[offset : offset + len(part)] = part
    return data


async def grown_small(store, ino):
    """Synced until patches are written."""
    for _ in range(patches.AGAIN + 2):
        with open(path_of(store, ino), "r+b") as file:
            file.write(os.urandom(3))
        await store.mover.fsync(ino)


async def test_a_patch_changes_neither_extents_nor_rows(slow_seal):
    async with opened(slow_seal) as store:
        with written(store, "f", os.urandom(SIZE)) as ino:
            await grown_small(store, ino)
            before = store.index.open_extent(), store.database.connection.total_changes
            for at in (5, SIZE - 3, 4 * MIB):
                with open(path_of(store, ino), "r+b") as file:
                    file.seek(at)
                    file.write(b"new")
                await store.mover.fsync(ino)
                assert durable(store, ino)[at : at + 3] == b"new"
            await store.mover.fsync(ino)  # nothing to write
            assert before == (store.index.open_extent(), store.database.connection.total_changes)
            store.namespace.update(ino, mode=0o100640)  # attributes are told all the same
            await store.mover.fsync(ino)
            assert not store.mover.journal.has_news_of(ino)


@pytest.mark.parametrize("way", ["index", "rebuilt"])
async def test_base_and_patches_come_back_together(slow_seal, way, monkeypatch):
    monkeypatch.setattr(patches, "LOG_BYTES", MIB)  # several logs, one after the other
    chance, numbers = random.Random(3), set()
    async with opened(slow_seal) as store:
        with written(store, "f", os.urandom(SIZE)) as ino:
            path = path_of(store, ino)
            for _ in range(60):
                size = os.path.getsize(path)
                if chance.random() < 0.2:
                    os.truncate(path, chance.randint(size - 9000, size + 9000))
                for _ in range(chance.randint(0, 3)):
                    with open(path, "r+b") as file:
                        file.seek(chance.randrange(SIZE // 2, SIZE))
                        file.write(os.urandom(chance.randrange(1, 400_000)))
                await store.mover.fsync(ino)
                numbers.update(logs_of(slow_seal))
                with open(path, "rb") as file:
                    assert file.read() == durable(store, ino)
            wanted = durable(store, ino)
            with open(path, "r+b") as file:
                file.write(b"never synced")
    assert len(numbers) > 3 and len(logs_of(slow_seal)) >= 1
    (memory,) = memory_of(slow_seal)
    assert recount(slow_seal.store, memory) == []
    wipe_memory(slow_seal)
    assert fsck.run(slow_seal.store, slow_seal.shm_dir, False, lambda *_: None).exit_code == 0
    if way == "rebuilt":
        (slow_seal.store / "index.db").unlink()
        assert rebuild(slow_seal.store, slow_seal.shm_dir, lambda *_: None).lost_and_found == 0
    async with opened(slow_seal) as store:
        assert await store.get("f") == wanted
        assert logs_of(slow_seal) == [(ino, store.index.logs[ino])]
    wipe_memory(slow_seal)  # once more, before anything was flushed
    async with opened(slow_seal) as store:
        assert await store.get("f") == wanted
        await store.flush()
        assert logs_of(slow_seal) == [] and not store.index.logs
        store.residency.drop(store.residency.memory, store.index.object(store.find("f").oid).digest)
        assert await store.get("f") == wanted


async def test_the_same_content_again_needs_no_patches(slow_seal):
    """What a file held at its first sync, then something else, then that again, kept whole: the object is the same one."""
    async with opened(slow_seal) as store:
        first = os.urandom(SIZE)
        with written(store, "f", first) as ino:
            path = path_of(store, ino)
            for data in (first, first, b"other" + first[5:]):
                with open(path, "r+b") as file:
                    file.write(data)
                await store.mover.fsync(ino)
            assert ino in store.index.logs and durable(store, ino)[:5] == b"other"
            with open(path, "r+b") as file:
                file.write(first)
            store.files.live[ino].kept.base = None  # as after an error
            await store.mover.fsync(ino)
            assert ino not in store.index.logs and durable(store, ino) == first
        wipe_memory(slow_seal)
    async with opened(slow_seal) as store:
        assert await store.get("f") == first and logs_of(slow_seal) == []


async def test_a_log_that_fails_is_left_for_a_new_base(slow_seal, monkeypatch):
    async with opened(slow_seal) as store:
        with written(store, "f", os.urandom(SIZE)) as ino:
            await grown_small(store, ino)
            number = store.index.logs[ino]

            def full(self, buffer, used):
                raise OSError(28, "No space left on device")

            with monkeypatch.context() as patch:
                patch.setattr(patch_log.PatchLog, "append", full)
                with open(path_of(store, ino), "r+b") as file:
                    file.write(b"here")
                await store.mover.fsync(ino)
            assert ino not in store.index.logs and durable(store, ino)[:4] == b"here"
            await grown_small(store, ino)
            assert store.index.logs[ino] != number
            with open(path_of(store, ino), "rb") as file:
                assert file.read() == durable(store, ino)
    assert recount(slow_seal.store, memory_of(slow_seal)[0]) == []


async def test_fsck_tells_of_a_damaged_log(slow_seal):
    async with opened(slow_seal) as store:
        with written(store, "f", os.urandom(SIZE)) as ino:
            await grown_small(store, ino)
            await grown_small(store, ino)
            wanted = durable(store, ino)
        number = store.index.logs[ino]
    path = patch_log.path_of(slow_seal.store / patch_log.FOLDER, ino, number)
    good = path.read_bytes()

    def found():
        return fsck.run(slow_seal.store, slow_seal.shm_dir, False, lambda *_: None).after.findings

    assert found() == []
    for damaged in (b"", good[:10] + b"x" + good[11:], good[:5000] + b"x" + good[5001:]):
        path.write_bytes(damaged)
        (finding,) = found()
        assert finding.check == "patches" and finding.paths == ("/f",)
    wipe_memory(slow_seal)
    async with opened(slow_seal) as store:
        assert await store.get("f") != wanted  # an older version, and the log says so


async def test_a_time_that_was_set_is_synced_as_bytes_are(slow_seal):
    async with opened(slow_seal) as store:
        with written(store, "f", os.urandom(SIZE)) as ino:
            await grown_small(store, ino)
            store.files.set_times(ino, 5_000, 7_000)
            await store.mover.fsync(ino)
    wipe_memory(slow_seal)
    async with opened(slow_seal) as store:
        found = store.files.attributes(ino)
        assert (found.mtime_ns, found.size) == (7_000, SIZE)


async def test_a_log_of_an_inode_that_is_gone_goes(slow_seal):
    async with opened(slow_seal) as store:
        with written(store, "f", os.urandom(SIZE)) as ino:
            await grown_small(store, ino)
        store.index.add_log(ino + 1, 5)
        patch_log.path_of(slow_seal.store / patch_log.FOLDER, ino + 1, 5).write_bytes(b"left over")
    async with opened(slow_seal) as store:
        assert logs_of(slow_seal) == [(ino, store.index.logs[ino])] and len(store.index.logs) == 1


async def test_a_log_that_the_index_refuses_is_left_for_a_new_base(slow_seal, monkeypatch):
    """What was to be in its first patch is not forgotten."""

    def refuse(ino, number):
        raise OSError(28, "No space left on device")

    async with opened(slow_seal) as store:
        with written(store, "f", os.urandom(SIZE)) as ino:
            for _ in range(patches.AGAIN + 1):
                await store.mover.fsync(ino)
            monkeypatch.setattr(store.index, "add_log", refuse)
            for at in (1000, 2 * MIB):
                with open(path_of(store, ino), "r+b") as file:
                    file.seek(at)
                    file.write(b"here")
                await store.mover.fsync(ino)
                assert durable(store, ino)[at : at + 4] == b"here" and not store.index.logs
            monkeypatch.undo()
            await grown_small(store, ino)
            assert ino in store.index.logs and durable(store, ino)[1000:1004] == b"here"
