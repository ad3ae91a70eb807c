"""A flush of everything: what nobody writes to goes into the extent in one pass; what changes meanwhile is not taken for what
it was."""

import os
from dataclasses import replace

import pytest
import trio
from recount import recount
from stores import memory_of, opened, wipe_memory

import cascadefs.straight
from cascadefs.ext import hashing
from cascadefs.namespace import ROOT
from cascadefs.tiers.capture import Capture


@pytest.fixture
def meanwhile(monkeypatch):
    """`meanwhile(action)`: awaited when the bytes of the next pass are on the disk, before it is committed; once."""

    def arrange(action):
        class Interrupted(Capture):
            def run(self, subjects, manifest):
                monkeypatch.setattr(cascadefs.straight, "Capture", Capture)
                end = super().run(subjects, manifest)
                trio.from_thread.run(action)
                return end

        monkeypatch.setattr(cascadefs.straight, "Capture", Interrupted)

    return arrange


async def rewrite(store, name, data, truncate=False):
    """Overwrite the beginning of a file, as a program with the file open would."""
    handle = await store.files.open(store.find(name).ino, True, truncate)
    fd = os.open(store.files.staged_path(store.find(name)), os.O_WRONLY)
    os.pwrite(fd, data, 0)
    os.close(fd)
    store.files.release(handle)


def unlink(store, name):
    store.files.forget_if_gone(store.namespace.unlink(ROOT, name.encode()).ino)


async def all_back(settings, contents):
    """Nothing is wrong with the store, and without the memory tier each file is as it should be."""
    assert recount(settings.store, memory_of(settings)[0]) == []
    wipe_memory(settings)
    async with opened(settings) as store:
        for name, data in contents.items():
            assert await store.get(name) == data


@pytest.mark.parametrize("flushes", [1, 3])
async def test_each_byte_is_read_and_hashed_once(slow_seal, monkeypatch, flushes):
    read = []
    once = hashing.read_fingerprint

    def count(fd, offset, into, secret):
        read.append(len(into))
        return once(fd, offset, into, secret)

    monkeypatch.setattr(hashing, "read_fingerprint", count)
    contents = {f"f{i}": os.urandom(70_000 + i) for i in range(20)}
    async with opened(slow_seal) as store:
        for name, data in contents.items():
            await store.put(name, data)
        async with trio.open_nursery() as nursery:
            for _ in range(flushes):
                nursery.start_soon(store.flush)
        assert sorted(read) == sorted(map(len, contents.values()))
        assert not store.index.dirty(1) and not store.index.staged_inodes() and len(store.residency.clean) == 20
        assert not store.files.unchanged and not store.files.to_seal and not store.files.live
    await all_back(slow_seal, contents)


@pytest.mark.parametrize("truncate", [False, True])
async def test_a_file_that_is_written_to_meanwhile_is_flushed_as_it_is_then(slow_seal, meanwhile, truncate):
    contents = {f"f{i}": os.urandom(9000) for i in range(3)}
    async with opened(slow_seal) as store:
        for name, data in contents.items():
            await store.put(name, data)
        meanwhile(lambda: rewrite(store, "f1", b"new", truncate))
        await store.flush()
        contents["f1"] = b"new" if truncate else b"new" + contents["f1"][3:]
        assert not store.index.staged_inodes()
        for name, data in contents.items():
            assert await store.get(name) == data
    await all_back(slow_seal, contents)


async def test_a_file_that_is_cut_meanwhile_is_flushed_as_it_is_then(slow_seal, meanwhile):
    async with opened(slow_seal) as store:
        await store.put("f", os.urandom(9000))
        await store.put("g", data := os.urandom(9000))
        meanwhile(lambda: store.files.truncate(store.find("f").ino, 0))
        await store.flush()
    await all_back(slow_seal, {"f": b"", "g": data})


async def test_a_file_that_is_open_for_writing_at_the_end_is_not_sealed(slow_seal, meanwhile):
    handles = []
    async with opened(slow_seal) as store:
        await store.put("f", data := os.urandom(9000))

        async def come():
            handles.append(await store.files.open(store.find("f").ino, True))

        meanwhile(come)
        await store.flush()
        assert store.find("f").home and store.files.of(store.find("f").ino).writers == 1
        store.files.release(handles[0])
    await all_back(slow_seal, {"f": data})


async def test_records_of_a_pass_that_came_to_nothing_are_not_given_back_twice(slow_seal, meanwhile):
    """The next append begins where this one did: what lies there then is not ours to punch."""
    async with opened(slow_seal) as store:
        await store.put("f", os.urandom(90_000))

        async def leave():
            unlink(store, "f")

        meanwhile(leave)
        await store.flush()
        await store.put("g", data := os.urandom(90_000))
        await store.flush()
        unlink(store, "g")
        await store.put("h", more := os.urandom(90_000))
        await store.put("g", data)
        await store.flush()
        await store.mover._give_back()
    await all_back(slow_seal, {"g": data, "h": more})


async def test_a_file_that_is_deleted_meanwhile_leaves_its_space(slow_seal, meanwhile):
    async with opened(slow_seal) as store:
        await store.put("f", os.urandom(90_000))
        await store.put("g", data := os.urandom(90_000))

        async def leave():
            unlink(store, "f")

        meanwhile(leave)
        await store.flush()
        await store.mover._give_back()
        assert not store.files.dead
    await all_back(slow_seal, {"g": data})


async def test_equal_files_become_one_object(slow_seal):
    data = os.urandom(50_000)
    async with opened(slow_seal) as store:
        await store.put("old", data)
        await store.flush()
        before = store.index.totals()["live_bytes"]
        for name in ("a", "b", "c"):
            await store.put(name, data)
        await store.put("other", other := os.urandom(50_000))
        await store.put("another", other)
        await store.flush()
        assert len({store.find(name).oid for name in ("old", "a", "b", "c")}) == 1
        assert store.find("other").oid == store.find("another").oid
        assert store.index.totals()["live_bytes"] < before + 2 * 50_000
    await all_back(slow_seal, dict.fromkeys(("old", "a", "b", "c"), data) | {"other": other, "another": other})


async def test_of_each_user_by_itself(slow_seal):
    data, settings = os.urandom(50_000), replace(slow_seal, dedup="off")
    async with opened(settings) as store:
        await store.put("a", data)
        await store.put("b", data)
        await store.flush()
        assert store.find("a").oid != store.find("b").oid
    await all_back(settings, {"a": data, "b": data})


async def test_a_reader_that_comes_meanwhile_keeps_what_it_has(slow_seal, meanwhile):
    handles = []
    async with opened(slow_seal) as store:
        await store.put("f", data := os.urandom(9000))

        async def come():
            ino = store.find("f").ino
            store.files.release(await store.files.open(ino, False))  # with the last handle its running state goes
            handles.append(await store.files.open(ino, False))

        meanwhile(come)
        await store.flush()
        digest = store.index.object(store.find("f").oid).digest
        assert handles[0].source.key == ("object", digest) and store.files.live[store.find("f").ino].source is handles[0].source
        assert os.pread(handles[0].source.fd, 9000, 0) == data
        store.files.release(handles[0])
    await all_back(slow_seal, {"f": data})


async def test_a_file_that_somebody_else_seals_is_left_to_them(slow_seal, meanwhile):
    async with opened(slow_seal) as store:
        await store.put("f", data := os.urandom(9000))
        live, done = store.files.of(store.find("f").ino), trio.Event()

        async def hold(*, task_status):
            async with live.lock:
                task_status.started()
                await done.wait()

        async with trio.open_nursery() as nursery:
            meanwhile(lambda: nursery.start(hold))
            nursery.start_soon(store.flush)
            with trio.fail_after(5):
                while not live.is_locked or not live.lock.statistics().tasks_waiting:
                    await trio.sleep(0.001)
            assert store.find("f").home
            done.set()
    await all_back(slow_seal, {"f": data})


async def test_a_second_flush_waits_and_does_not_vouch_for_what_the_first_has_read(slow_seal, meanwhile):
    async with opened(slow_seal) as store, trio.open_nursery() as nursery:
        await store.put("f", before := os.urandom(9000))

        async def write_and_flush_again():
            await rewrite(store, "f", b"new")
            nursery.start_soon(store.flush)
            await trio.sleep(0.01)  # it may begin

        meanwhile(write_and_flush_again)
        await store.flush()
    await all_back(slow_seal, {"f": b"new" + before[3:]})


async def test_many_passes(slow_seal, monkeypatch):
    monkeypatch.setattr(cascadefs.straight, "FILES", 7)
    contents = {f"f{i}": os.urandom(20_000) for i in range(40)}
    async with opened(replace(slow_seal, batch_size=16 << 10)) as store:
        for name, data in contents.items():
            await store.put(name, data)
        await store.flush()
        oids = [store.find(name).oid for name in contents]
        assert oids == sorted(oids), "objects are in the order in which files were closed"
    await all_back(slow_seal, contents)


async def test_a_copy_that_cannot_be_read_is_told_and_stops_nobody(slow_seal):
    async with opened(slow_seal) as store:
        await store.put("gone", os.urandom(9000))
        await store.put("f", data := os.urandom(9000))
        os.unlink(store.files.staged_path(store.find("gone")))
        with pytest.raises(FileNotFoundError):
            await store.flush()
        assert store.index.object(store.find("f").oid).durable
        unlink(store, "gone")
        await store.flush()
    await all_back(slow_seal, {"f": data})
