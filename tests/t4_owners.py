"""One inode stays one inode: equal files share a copy only one after the other, so that a writer writes where the readers of
its file read, and nowhere else."""

import errno
import mmap
import os
from contextlib import contextmanager
from dataclasses import replace

import pytest
import trio
from recount import recount
from stores import memory_of, opened, wipe_memory

from cascadefs.contents import streams
from cascadefs.media import file_io
from cascadefs.metadata.namespace import ROOT
from cascadefs.placement import decisions
from cascadefs.store import Store
from cascadefs.types import Home

MIB = 1 << 20
OLD = b"old!" * 50_000  # longer than what is copied without a thread


async def twins(store, *names, data=OLD, durable=True):
    """Closed equal files: one object, one copy in memory."""
    for name in names:
        await store.put(name, data)
        await store.info(store.find(name).ino)
    if durable:
        await store.flush()
    assert len({store.find(name).oid for name in names}) == 1 and len(store.residency.memory.objects) == 1
    assert private(store) == []


def unlink(store, name):
    store.files.forget_if_gone(store.namespace.unlink(ROOT, name.encode()).ino)


def private(store):
    """Inodes with a private file that is not just the second name of an object's copy."""
    folder = store.residency.memory.folder / "private"
    return sorted(int(path.name) for path in folder.iterdir() if path.stat().st_nlink == 1)


async def read(store, name):
    return await store.files.open(store.find(name).ino, writable=False)


def seen(handle):
    return os.pread(handle.source.fd, 1 << 20, 0)


@contextmanager
def mapped(handle):
    """As a mapping that outlives its handle: nobody tells of it."""
    with mmap.mmap(handle.source.fd, 0, prot=mmap.PROT_READ) as area:
        yield area


async def overwrite(store, name, patch=b"NEW", truncate=False):
    """As a program that opens the file for writing, by a descriptor that the kernel opens anew."""
    handle = await store.files.open(store.find(name).ino, True, truncate)
    fd = os.open(f"/proc/self/fd/{handle.source.fd}", os.O_WRONLY)
    os.pwrite(fd, patch, 0)
    os.close(fd)
    store.files.release(handle)


async def check(settings, contents):
    """Right now, after everything was flushed, and after the loss of memory."""
    async with opened(settings) as store:
        for name, data in contents.items():
            assert await store.get(name) == data
        await store.flush()
    assert recount(settings.store, memory_of(settings)[0]) == []
    wipe_memory(settings)
    async with opened(settings) as store:
        for name, data in contents.items():
            assert await store.get(name) == data


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("changed", ["a", "b"])
async def test_readers_of_a_file_see_its_writer_and_those_of_an_equal_one_do_not(slow_seal, changed, truncate, durable):
    new = b"NEW" if truncate else b"NEW" + OLD[3:]
    async with opened(slow_seal) as store:
        await twins(store, "a", "b", "c", durable=durable)
        readers = {name: await read(store, name) for name in ("a", "b")}
        inos = {name: store.find(name).ino for name in "abc"}
        assert private(store) == [inos["b"]]
        await overwrite(store, changed, truncate=truncate)
        assert {name: seen(handle) for name, handle in readers.items()} == {"a": OLD, "b": OLD} | {changed: new}
        assert inos == {name: store.find(name).ino for name in "abc"} and await store.get("c") == OLD
        await store.flush()
        assert seen(readers[changed]) == new
        for handle in readers.values():
            store.files.release(handle)
        assert private(store) == [] and len(store.files.sources) == 0
    await check(slow_seal, {"a": OLD, "b": OLD, "c": OLD, changed: new})


@pytest.mark.parametrize("durable", [True, False])
async def test_a_file_is_read_where_memory_has_no_room_for_another_name(slow_seal, monkeypatch, durable):
    async with opened(slow_seal) as store:
        await twins(store, "a", "b", durable=durable)

        def no_room(old, new):
            raise OSError(errno.ENOSPC, "no room", str(old), None, str(new))

        with monkeypatch.context() as full:
            full.setattr(file_io, "link", no_room)
            assert await store.get("a") == await store.get("b") == OLD
        reader = await read(store, "a")
        assert seen(reader) == OLD and private(store) == []
        store.files.release(reader)
    await check(slow_seal, {"a": OLD, "b": OLD})


async def test_who_has_left_makes_room_for_an_equal_file(slow_seal):
    async with opened(slow_seal) as store:
        await twins(store, "a", "b")
        copy = os.stat(next((store.residency.memory.folder / "objects").iterdir())).st_ino
        for name in "abab":
            handle = await read(store, name)
            assert os.fstat(handle.source.fd).st_ino == copy and private(store) == []
            store.files.release(handle)


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("changed", ["a", "b"])
async def test_a_mapping_whose_handle_is_gone_counts_like_a_handle(slow_seal, changed, durable):
    new = b"NEW" + OLD[3:]
    async with opened(slow_seal) as store:
        await twins(store, "a", "b", durable=durable)
        first = await read(store, "a")
        with mapped(first) as of_a:
            store.files.release(first)
            second = await read(store, "b")
            with mapped(second) as of_b:
                store.files.release(second)
                store.files.owners.tidy()
                assert private(store) == [store.find("b").ino]
                await overwrite(store, changed)
                assert (of_a[:], of_b[:]) == ((new, OLD) if changed == "a" else (OLD, new))
        store.files.owners.tidy()
        assert private(store) == []
    await check(slow_seal, {"a": OLD, "b": OLD, changed: new})


@pytest.mark.parametrize("how", ["open", "mapped"])
async def test_a_file_that_is_read_while_it_is_sealed_is_stored_once_and_stays_its_own(slow_seal, how):
    new = b"NEW" + OLD[3:]
    async with opened(slow_seal) as store:
        await twins(store, "a")
        await store.put("b", OLD)
        handle = await read(store, "b")
        with mapped(handle) as area:
            if how == "mapped":
                store.files.release(handle)
            await store.flush()
            assert store.find("b").oid == store.find("a").oid and not store.index.staged_inodes()
            assert private(store) == [store.find("b").ino]
            await overwrite(store, "a", b"other")
            assert area[:] == OLD
            await overwrite(store, "b")
            assert area[:] == new
        if how == "open":
            store.files.release(handle)
    await check(slow_seal, {"a": b"other" + OLD[5:], "b": new})


async def test_memory_that_is_short_makes_a_stream_of_the_second(slow_seal, monkeypatch):
    async with opened(slow_seal) as store:
        await twins(store, "a", "b")
        monkeypatch.setattr(decisions, "may_promote", lambda state, size: False)
        first, second = await read(store, "a"), await read(store, "b")
        assert second.source is None and second.direct
        ino = store.find("b").ino
        assert await store.streams.read(ino, 0, 1 << 20) == OLD
        await overwrite(store, "a")
        assert await store.streams.read(ino, 0, 1 << 20) == OLD and seen(first)[:3] == b"NEW"
        store.files.release(first)
        store.files.release(second)
    await check(slow_seal, {"a": b"NEW" + OLD[3:], "b": OLD})


async def test_a_long_file_is_not_copied(slow_seal):
    async with opened(replace(slow_seal, promote_limit=1000)) as store:
        await twins(store, "a", "b")
        first, second = await read(store, "a"), await read(store, "b")
        assert first.source is not None and second.source is None and private(store) == []
        store.files.release(first)
        store.files.release(second)


async def test_an_equal_file_that_is_opened_for_writing_is_not_what_its_twin_is_written_to_meanwhile(slow_seal, monkeypatch):
    """The copy that a reader or a writer of b makes, from the file that a has open. That stays the only copy: of what was
    flushed in the background the writer of a would leave none, and the reader of b would be streamed to."""
    copy = file_io.copy_file
    monkeypatch.setattr(decisions, "background_may_run", lambda *_: False)
    async with opened(slow_seal) as store:
        await twins(store, "a", "b", "c", durable=False)
        first = await read(store, "a")
        waiting = ["a"]

        def interrupted(fd, path):
            if waiting:
                trio.from_thread.run(overwrite, store, waiting.pop())
            copy(fd, path)

        monkeypatch.setattr(file_io, "copy_file", interrupted)
        second = await read(store, "b")
        assert seen(second) == OLD and seen(first)[:3] == b"NEW" and not waiting
        waiting.append("b")
        await overwrite(store, "c", b"third")
        assert await store.get("b") == b"NEW" + OLD[3:] and await store.get("c") == b"third" + OLD[5:]
        store.files.release(first)
        store.files.release(second)
    await check(slow_seal, {"a": b"NEW" + OLD[3:], "b": b"NEW" + OLD[3:], "c": b"third" + OLD[5:]})


async def test_a_stream_never_shows_what_is_written_to_an_equal_file(slow_seal, monkeypatch):
    async with opened(slow_seal) as store:
        await twins(store, "a", "b")
        first, whole = await read(store, "a"), streams._read_fully

        def interrupted(*words):
            monkeypatch.setattr(streams, "_read_fully", whole)
            trio.from_thread.run(overwrite, store, "a")
            return whole(*words)

        monkeypatch.setattr(streams, "_read_fully", interrupted)
        assert await store.streams.read(store.find("b").ino, 0, 1 << 20) == OLD
        store.files.release(first)


async def test_a_stream_goes_on_when_its_own_file_is_opened_for_writing(slow_seal, monkeypatch):
    async with opened(slow_seal) as store:
        await twins(store, "a", durable=False)
        whole = streams._read_fully

        def interrupted(*words):
            monkeypatch.setattr(streams, "_read_fully", whole)
            trio.from_thread.run(overwrite, store, "a")
            return whole(*words)

        monkeypatch.setattr(streams, "_read_fully", interrupted)
        assert await store.streams.read(store.find("a").ino, 0, 1 << 20) == b"NEW" + OLD[3:]


async def test_sixteen_readers_of_sixteen_equal_files(slow_seal):
    names = [f"f{i}" for i in range(16)]
    async with opened(slow_seal) as store:
        await twins(store, *names, data=os.urandom(MIB))
        handles = []

        async def come(name):
            handles.append(await read(store, name))

        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(come, name)
        assert len({os.fstat(handle.source.fd).st_ino for handle in handles}) == 16 and len(private(store)) == 15
        await trio.sleep(0.05)  # it is counted once in a while
        assert store.residency.memory.used_bytes() >= 16 * MIB
        for handle in handles:
            store.files.release(handle)
        assert private(store) == []


async def test_a_copy_that_is_mapped_is_not_evicted(slow_seal):
    async with opened(slow_seal) as store:
        await twins(store, "a")
        handle = await read(store, "a")
        with mapped(handle) as area:
            store.files.release(handle)
            store.residency.make_room(1 << 40)
            assert len(store.residency.memory.objects) == 1
            await overwrite(store, "a")
            assert area[:3] == b"NEW"
        await store.flush()
        store.residency.tidy_later()
        store.residency.make_room(1 << 40)
        assert not store.residency.memory.objects
    await check(slow_seal, {"a": b"NEW" + OLD[3:]})


# --- another worker takes over


def successor(settings, handles):
    """A store as the next worker opens it, with what the kernel still has open: by inode, like the mount's table tells."""
    store = Store(settings, keep_orphans=True)
    return store, [store.files.inherit(handle.ino, False, handle.direct) for handle in handles]


async def test_the_next_worker_finds_the_file_that_the_kernel_has_for_each_inode(slow_seal):
    async with opened(slow_seal) as store:
        await twins(store, "a", "b", "c", durable=False)
        handles = [await read(store, name) for name in "cab"]
        files = [os.fstat(handle.source.fd).st_ino for handle in handles]
    for order in ((0, 1, 2), (2, 1, 0)):
        store, inherited = successor(slow_seal, [handles[i] for i in order])
        assert [os.fstat(handle.source.fd).st_ino for handle in inherited] == [files[i] for i in order]
        await overwrite(store, "c")
        await overwrite(store, "b", b"B")
        assert [seen(handles[i])[:4] for i in range(3)] == [b"NEW!", b"old!", b"Bld!"]
        await overwrite(store, "c", b"old")
        await overwrite(store, "b", b"o")
        store.close()
    for handle in handles:
        os.close(os.dup(handle.source.fd))
    await check(slow_seal, {"a": OLD, "b": OLD, "c": OLD})


@pytest.mark.parametrize("changed", ["a", "b"])
async def test_the_next_worker_knows_whose_the_mappings_are(slow_seal, changed):
    async with opened(slow_seal) as store:
        await twins(store, "a")
        first = await read(store, "a")
        area = mmap.mmap(first.source.fd, 0, prot=mmap.PROT_READ)
        store.files.release(first)
        await store.put("b", OLD)
        await store.flush()
        assert store.find("a").oid == store.find("b").oid and private(store) == []
    store, _ = successor(slow_seal, [])
    await overwrite(store, changed)
    assert area[:] == (b"NEW" + OLD[3:] if changed == "a" else OLD)
    area.close()
    store.close()
    await check(slow_seal, {"a": OLD, "b": OLD, changed: b"NEW" + OLD[3:]})


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_the_next_worker_takes_no_stream_for_the_owner_of_a_copy(slow_seal, monkeypatch, order):
    async with opened(slow_seal) as store:
        await twins(store, "a", "b")
        monkeypatch.setattr(decisions, "may_promote", lambda state, size: False)
        handles = [await read(store, "a"), await read(store, "b")]
        os.close(handles[0].source.fd)  # in the portable mode nobody else has it open
        handles[0].source.fd = os.open("/dev/null", os.O_RDONLY)
    store, inherited = successor(slow_seal, [handles[i] for i in order])
    first, second = (inherited[order.index(i)] for i in range(2))
    assert first.source is not None and second.source is None
    await overwrite(store, "a")
    assert await store.streams.read(second.ino, 0, 1 << 20) == OLD and seen(first)[:3] == b"NEW"
    store.close()


async def test_a_new_mount_knows_no_mapping_and_lets_nobody_write_below_one(slow_seal):
    async with opened(slow_seal) as store:
        await twins(store, "a", "b")
        handles = [await read(store, name) for name in "ab"]
        areas = [mmap.mmap(handle.source.fd, 0, prot=mmap.PROT_READ) for handle in handles]
        for handle in handles:
            store.files.release(handle)
    async with opened(slow_seal) as store:
        assert private(store) == []
        handle = await read(store, "a")
        await overwrite(store, "a")
        assert seen(handle)[:3] == b"NEW" and [area[:] for area in areas] == [OLD, OLD]
        store.files.release(handle)
    await check(slow_seal, {"a": b"NEW" + OLD[3:], "b": OLD})


async def test_a_deleted_file_leaves_no_private_name(slow_seal):
    async with opened(slow_seal) as store:
        await twins(store, "a", "b")
        handles = [await read(store, name) for name in "ab"]
        for name in "ab":
            store.remove(name)
        assert [seen(handle) for handle in handles] == [OLD, OLD]
        for handle in handles:
            store.files.release(handle)
        store.residency.tidy_later()
        assert not os.listdir(store.residency.memory.folder / "private")
        assert not os.listdir(store.residency.memory.folder / "objects")


async def test_a_copy_whose_owner_empties_it_meanwhile_is_made_again(slow_seal, monkeypatch):
    seek = os.lseek
    async with opened(slow_seal) as store:
        await twins(store, "a", "b", durable=False)
        first = await read(store, "a")

        def interrupted(fd, at, whence):
            if whence == os.SEEK_HOLE:
                monkeypatch.setattr(os, "lseek", seek)
                trio.from_thread.run(overwrite, store, "a", b"", True)
            return seek(fd, at, whence)

        monkeypatch.setattr(os, "lseek", interrupted)
        second = await read(store, "b")
        assert os.lseek is seek and seen(second) == OLD and seen(first) == b""
        store.files.release(first)
        store.files.release(second)


async def test_a_copy_that_is_made_again_elsewhere_leaves_nothing_behind(slow_seal, monkeypatch):
    copy, homes = file_io.copy_file, [Home.MEMORY, Home.COLD]
    async with opened(slow_seal) as store:
        await twins(store, "a", "b", "c", durable=False)
        first, waiting = await read(store, "a"), ["a"]

        def interrupted(fd, path):
            if waiting:
                trio.from_thread.run(overwrite, store, waiting.pop())
            copy(fd, path)

        monkeypatch.setattr(file_io, "copy_file", interrupted)
        monkeypatch.setattr(store.residency, "home_for_new", homes.pop)
        await overwrite(store, "c", b"third")
        staged = [os.listdir(tier.staged_folder) for tier in (store.residency.memory, store.residency.parking)]
        assert not homes and not waiting and len(staged[0]) == 2 and not staged[1]
        store.files.release(first)


async def test_a_parked_copy_that_the_kernel_has_open_outlives_a_worker(slow_seal, monkeypatch):
    """It is durable, so that its copy would be of no more use; but the kernel takes no other file for the inode."""
    async with opened(slow_seal) as store:
        monkeypatch.setattr(store.residency, "home_for_new", lambda: Home.COLD)
        await store.put("f", OLD)
        handle = await read(store, "f")
        kernels = os.dup(handle.source.fd)
        await store.flush()
    os.close(handle.source.fd)
    parked = slow_seal.store / "parking/objects"
    assert len(os.listdir(parked)) == 1
    store = Store(slow_seal, keep_orphans=True)
    inherited = store.files.inherit(handle.ino, False, direct=False)
    assert os.path.samestat(os.fstat(inherited.source.fd), os.fstat(kernels))
    again = await read(store, "f")
    assert again.source is inherited.source and seen(again) == OLD
    for one in (inherited, again):
        store.files.release(one)
    os.close(kernels)
    store.residency.tidy_later()
    assert not os.listdir(parked)
    store.close()


@pytest.mark.parametrize("durable", [False, True])
async def test_an_inode_with_a_private_file_is_not_taken_for_the_owner_after_a_takeover(slow_seal, durable):
    """It is the only one that shows the object, and its readers have another file than the object's copy."""
    async with opened(slow_seal) as store:
        await twins(store, "a", "b", durable=durable)
        first, second = await read(store, "a"), await read(store, "b")
        kernels = os.fstat(second.source.fd).st_ino
        assert private(store) == [second.ino]
        store.files.release(first)
        unlink(store, "a")
    store, (inherited,) = successor(slow_seal, [second])
    assert os.fstat(inherited.source.fd).st_ino == kernels
    await store.put("c", OLD)
    await store.info(store.find("c").ino)
    third = await read(store, "c")
    assert seen(third) == OLD and private(store) == [second.ino]
    await overwrite(store, "b")
    assert seen(inherited) == b"NEW" + OLD[3:] and os.fstat(inherited.source.fd).st_ino == kernels
    assert seen(third) == OLD
    store.close()
