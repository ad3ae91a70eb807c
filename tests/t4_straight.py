"""One pass into the extent, for a flush of everything and behind the writers: what changes meanwhile is not taken for what it
was."""

import errno
import os
import time
from dataclasses import replace

import pytest
import trio
from recount import recount
from stores import memory_of, opened, wipe_memory

import cascadefs.writeback.single_pass
from cascadefs.contents.watcher import Nobody
from cascadefs.ext import hashing
from cascadefs.metadata.namespace import ROOT
from cascadefs.tiers.packer import Capture

MIB = 1 << 20


@pytest.fixture
def meanwhile(monkeypatch):
    """`meanwhile(action)`: awaited when the bytes of the next pass are on the disk, before it is committed; once."""

    def arrange(action):
        class Interrupted(Capture):
            def run(self, subjects, manifest):
                monkeypatch.setattr(cascadefs.writeback.single_pass, "Capture", Capture)
                end = super().run(subjects, manifest)
                trio.from_thread.run(action)
                return end

        monkeypatch.setattr(cascadefs.writeback.single_pass, "Capture", Interrupted)

    return arrange


def counted(monkeypatch):
    """Lengths of what is read and hashed from here on."""
    read, once = [], hashing.read_fingerprint

    def count(fd, offset, into, secret):
        read.append(len(into))
        return once(fd, offset, into, secret)

    monkeypatch.setattr(hashing, "read_fingerprint", count)
    return read


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
    read = counted(monkeypatch)
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
        assert handles[0].source.digest == digest and store.files.live[store.find("f").ino].source is handles[0].source
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
    monkeypatch.setattr(cascadefs.writeback.single_pass, "FILES", 7)
    contents = {f"f{i}": os.urandom(20_000) for i in range(40)}
    async with opened(replace(slow_seal, batch_size=16 << 10)) as store:
        for name, data in contents.items():
            await store.put(name, data)
        await store.flush()
        oids = [store.find(name).oid for name in contents]
        assert oids == sorted(oids), "objects are in the order in which files were closed"
    await all_back(slow_seal, contents)


async def test_a_copy_that_is_gone_is_told_and_stops_nobody(slow_seal):
    async with opened(slow_seal) as store:
        await store.put("gone", os.urandom(9000))
        await store.put("f", data := os.urandom(9000))
        os.unlink(store.files.staged_path(store.find("gone")))
        await store.flush()
        assert "emptied by somebody else" in store.residency.memory.claim.notes[-1]
        assert store.index.object(store.find("f").oid).durable
    await all_back(slow_seal, {"f": data})


async def test_what_is_longer_than_an_extent_goes_in_rounds(slow_seal):
    settings = replace(slow_seal, extent_size=8 * MIB, batch_size=4 * MIB)
    async with opened(settings) as store:
        await store.put("long", data := os.urandom(21 * MIB))
        await store.flush()
    sizes = [extent.stat().st_size for extent in (settings.store / "extents").iterdir()]
    assert len(sizes) == 2 and max(sizes) < 20 * MIB  # a round of a flush is four batches
    await all_back(settings, {"long": data})


# --- contents that are known


async def test_equal_files_are_hashed_once_each_and_kept_once(slow_seal, monkeypatch):
    data, other = os.urandom(90_000), os.urandom(70_000)
    async with opened(slow_seal) as store:
        await store.put("old", data)
        await store.flush()
        read = counted(monkeypatch)
        for name, content in {"a": data, "b": other, "c": other, "d": data}.items():
            await store.put(name, content)
        await store.flush()
        assert sorted(read) == [70_000, 70_000, 90_000, 90_000]
        assert not store.index.staged_inodes() and not store.index.dirty(1) and not store.files.unchanged
        assert len({store.find(name).oid for name in "abcd"}) == 2 and len(store.residency.memory.objects) == 2
    await all_back(slow_seal, {"old": data, "a": data, "b": other, "c": other, "d": data})


@pytest.mark.parametrize("truncate", [False, True])
async def test_an_equal_file_that_is_written_to_while_it_is_compared_is_what_it_is_then(slow_seal, monkeypatch, truncate):
    data = os.urandom(90_000)
    async with opened(slow_seal) as store:
        await store.put("old", data)
        await store.flush()
        await store.put("a", data)
        compare = store.sealer._same_bytes

        async def interrupted(*words):
            monkeypatch.setattr(store.sealer, "_same_bytes", compare)
            same = await compare(*words)
            await rewrite(store, "a", b"new", truncate)
            return same

        monkeypatch.setattr(store.sealer, "_same_bytes", interrupted)
        await store.flush()
        changed = b"new" if truncate else b"new" + data[3:]
        assert await store.get("a") == changed and await store.get("old") == data
    await all_back(slow_seal, {"old": data, "a": changed})


# --- in the background


async def background_until(store, done):
    with trio.fail_after(20):
        while not done():
            await trio.sleep(0.02)


async def test_large_files_are_hashed_once_in_the_background_and_their_names_told(settings, monkeypatch):
    contents = {f"f{i}": os.urandom(3 * MIB + i) for i in range(4)}
    read = counted(monkeypatch)
    async with opened(replace(settings, seal_delay=60)) as store:
        for name, data in contents.items():
            await store.put(name, data)
        store.files.to_seal = dict.fromkeys(store.files.to_seal, time.monotonic())  # due at once, however long a put took
        await background_until(store, lambda: len(store.residency.clean) == 4 and not store.mover.journal.has_news())
        assert sorted(read) == sorted(length for data in contents.values() for length in blocks(len(data)))
        assert not store.index.staged_inodes() and not store.files.unchanged and not store.files.live
    await all_back(settings, contents)


def blocks(size, step=4 * MIB):
    return [min(step, size - at) for at in range(0, size, step)]


async def test_little_is_hashed_first_and_written_with_what_comes_later(settings, monkeypatch):
    passes = []
    async with opened(replace(settings, seal_delay=0.0)) as store:
        monkeypatch.setattr(store.mover.straight, "run", lambda *words: passes.append(words))
        await store.put("f", data := os.urandom(MIB))
        await background_until(store, lambda: store.residency.clean)
        assert not passes and await store.get("f") == data


async def test_equal_files_share_memory_also_while_the_disk_takes_nothing(settings, monkeypatch):
    data = os.urandom(5 * MIB)

    def broken(*words):
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(cascadefs.writeback.single_pass.Capture, "run", broken)
    async with opened(replace(settings, seal_delay=0.2)) as store:
        monkeypatch.setattr(store.residency.cold, "append", broken)
        await store.put("a", data)
        await store.put("b", data)
        await background_until(store, lambda: not store.index.staged_inodes())
        assert len(store.residency.memory.objects) == 1 and store.mover.health.troubles
        monkeypatch.undo()
        await store.flush()
        assert not store.mover.health.troubles
    await all_back(settings, {"a": data, "b": data})


async def test_a_writer_that_the_kernel_serves_is_no_quiet_time(slow_seal):
    async with opened(slow_seal) as store:
        handle, staged = await store.open_empty("f")
        await background_until(store, lambda: store.files.quiet_s(time.monotonic()) > 0.3)
        with open(staged, "wb") as file:
            before = time.monotonic()
            file.write(os.urandom(8 * MIB))
            file.flush()
            await background_until(store, lambda: store.files.last_use > before)
        store.files.release(handle)


@pytest.mark.parametrize("straight", [False, True], ids=["sealing", "straight"])
async def test_a_double_outlives_what_it_equalled(slow_seal, straight):
    """Before a file lets go of its bytes for those of an object, the mount tells which files were closed: the last one of that
    object may be among them, and without a name."""
    data, inos = os.urandom(70_000), []

    class Mounted(Nobody):
        def recall(self, *recalled):
            if inos and inos[1] in recalled and store.namespace.lookup(ROOT, b"a"):
                unlink(store, "a")

    async with opened(slow_seal, Mounted()) as store:
        await store.put("a", data)
        await store.flush()
        await store.put("b", data)
        inos += [store.find("a").ino, store.find("b").ino]
        if not straight:
            assert not await store.sealer.seal(inos[1])
        await store.flush()
        assert await store.get("b") == data and store.namespace.lookup(ROOT, b"a") is None
    await all_back(slow_seal, {"b": data})
