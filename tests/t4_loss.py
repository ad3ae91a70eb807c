"""The memory tier is emptied, or loses files, while a store is open: what is open is kept, the rest is as after a crash."""

import errno
import os
import shutil
import subprocess
from functools import partial

import pytest
import trio
from recount import recount
from stores import opened

from cascadefs.metadata.namespace import ROOT
from cascadefs.tiers import owner


def empty(folder):
    for name in os.listdir(folder):
        shutil.rmtree(folder / name)


def umount(folder):
    subprocess.run(["umount", "-l", folder], check=True)


def take_files(folder):
    for part in ("staged", "objects", "private", "names"):
        for path in (folder / part).iterdir():
            path.unlink()


def take_folder(folder):
    if os.path.ismount(folder):
        umount(folder)
    shutil.rmtree(folder)


WAYS = {"emptied": empty, "unmounted": umount, "files": take_files, "gone": take_folder}


@pytest.fixture(params=list(WAYS))
def emptied(request):
    return WAYS[request.param]


async def names_in(store):
    return {name.decode(): await store.get(name.decode()) for _, name, _ in store.namespace.listing(ROOT, 0)}


async def test_what_was_durable_is_shown_again_and_the_rest_is_absent(slow_seal, emptied):
    async with opened(slow_seal) as store:
        await store.put("durable", b"d" * 9000)
        await store.put("newer", b"old" * 900)
        await store.flush()
        await store.put("newer", b"new" * 900)
        await store.put("absent", b"a" * 9000)
        emptied(store.residency.memory.folder)
        store.loss.look(count=True)
        assert await names_in(store) == {"durable": b"d" * 9000, "newer": b"old" * 900}
        assert "emptied by somebody else" in store.residency.memory.claim.notes[0] and store.loss.times == 1
        await store.put("after", b"goes on" * 99)
        await store.flush()
        store.loss.look(count=True)
        assert store.loss.times == 1
    async with opened(slow_seal) as store:
        assert await names_in(store) == {"durable": b"d" * 9000, "newer": b"old" * 900, "after": b"goes on" * 99}
        await store.flush()
        folder = store.residency.memory.folder
    assert recount(slow_seal.store, folder) == []


def put_file(folder):
    folder.write_text("somebody's")


def put_link(folder):
    (folder.parent / "precious").mkdir(exist_ok=True)
    (folder.parent / "precious/staged").mkdir(exist_ok=True)
    folder.symlink_to("precious")


def put_tier(folder):
    """Of another store."""
    folder.mkdir(mode=0o700)
    owner.write_owner(folder, owner.Owner("/elsewhere", 1, 1, "0" * 32, "1" * 32))


@pytest.mark.parametrize("put", [put_file, put_link, put_tier])
@pytest.mark.parametrize("first", ["flush", "read"])
async def test_where_something_else_has_its_place_it_gets_another(slow_seal, put, first):
    async with opened(slow_seal) as store:
        await store.put("durable", b"d" * 9000)
        await store.flush()
        await store.put("absent", b"a" * 9000)
        before = store.residency.memory.folder
        take_folder(before)
        put(before)
        left = {str(path): path.read_bytes() for path in before.rglob("*") if path.is_file()}
        if first == "flush":
            await store.flush()
        assert await store.loss.retried(partial(store.get, "durable")) == b"d" * 9000
        await store.put("after", b"goes on" * 99)
        assert await names_in(store) == {"durable": b"d" * 9000, "after": b"goes on" * 99}
        now = store.residency.memory.folder
        assert now != before and now.parent == before.parent and store.residency.memory.used_bytes() > 0
    async with opened(slow_seal) as store:
        assert store.residency.memory.folder == now
        assert await names_in(store) == {"durable": b"d" * 9000, "after": b"goes on" * 99}
        await store.flush()
    assert recount(slow_seal.store, now) == []
    assert left == {str(path): path.read_bytes() for path in before.rglob("*") if path.is_file()}


async def test_the_folder_of_all_tiers_is_made_anew_too(slow_seal):
    async with opened(slow_seal) as store:
        await store.put("durable", b"d" * 9000)
        await store.flush()
        take_folder(store.residency.memory.folder)
        shutil.rmtree(store.residency.memory.folder.parent)
        assert await store.loss.retried(partial(store.get, "durable")) == b"d" * 9000


async def test_where_none_can_be_made_durable_files_are_read_and_new_ones_kept(slow_seal):
    async with opened(slow_seal) as store:
        get = store.loss.retried
        await store.put("durable", b"d" * 9000)
        await store.flush()
        await store.put("absent", b"a" * 9000)
        take_folder(store.residency.memory.folder)
        shutil.rmtree(slow_seal.shm_dir)
        slow_seal.shm_dir.write_text("somebody's")
        for _ in range(2):
            assert await get(partial(store.get, "durable")) == b"d" * 9000
        await get(partial(store.put, "after", b"goes on" * 99))
        assert await get(partial(store.get, "after")) == b"goes on" * 99
        with pytest.raises(OSError, match="memory tier") as failure:
            await get(partial(store.get, "absent"))
        assert failure.value.errno == errno.EIO  # not ENOENT: it may be there still
        assert [line for line in store.database.health.lines() if "cannot be made anew" in line]
        slow_seal.shm_dir.unlink()
        store.loss.look(count=True)
        assert await names_in(store) == {"durable": b"d" * 9000, "after": b"goes on" * 99}
        await store.flush()
        assert not store.database.health.lines()


async def test_it_is_noticed_without_being_asked(slow_seal, emptied):
    async with opened(slow_seal) as store:
        await store.put("f", b"x" * 9000)
        emptied(store.residency.memory.folder)
        with trio.fail_after(60):
            while not store.loss.times:
                await trio.sleep(0.01)
        assert await names_in(store) == {}


@pytest.mark.parametrize("reader", [False, True])
@pytest.mark.parametrize("noticed", [False, True])
async def test_what_is_open_is_not_lost(slow_seal, emptied, noticed, reader):
    async with opened(slow_seal) as store:
        await store.put("f", b"0" * 9000)
        ino = store.find("f").ino
        handle = await store.files.open(ino, writable=not reader)
        expected = b"0" * 9000 if reader else b"w" * 20000
        emptied(store.residency.memory.folder)
        if noticed:
            store.loss.look(count=True)
        if not reader:
            fd = os.open(f"/proc/self/fd/{handle.source.fd}", os.O_RDWR)
            os.pwrite(fd, expected, 0)
            os.close(fd)
        if noticed:
            assert store.files.attributes(ino).size == len(expected)
            await store.mover.fsync(ino)
            assert await store.get("f") == expected
            await store.files.truncate(ino, len(expected))
        store.files.release(handle)
        await store.flush()
        assert await store.get("f") == expected
        assert not len(store.files.sources)


async def test_an_object_that_is_open_is_not_lost(slow_seal, emptied):
    async with opened(slow_seal) as store:
        await store.put("f", b"o" * 9000)
        ino = store.find("f").ino
        assert await store.sealer.seal(ino)
        reader = await store.files.open(ino, writable=False)
        emptied(store.residency.memory.folder)
        store.loss.look(count=True)
        writer = await store.files.open(ino, writable=True)
        fd = os.open(f"/proc/self/fd/{writer.source.fd}", os.O_RDWR)
        os.pwrite(fd, b"W", 0)
        os.close(fd)
        assert os.pread(reader.source.fd, 2, 0) == b"Wo"
        store.files.release(writer)
        store.files.release(reader)
        await store.flush()
        assert await store.get("f") == b"W" + b"o" * 8999


async def test_names_that_the_transport_told_are_not_lost_with_the_ring(slow_seal):
    async with opened(slow_seal) as store:
        before = bytes(store.ring.memory)
        empty(store.residency.memory.folder)
        store.loss.look()
        assert bytes(store.ring.memory) == before and store.ring.is_there()
        store.ring.memory[200:203] = b"new"
        path = store.residency.memory.folder / "names/ring"
        assert path.read_bytes()[200:203] == b"new"


async def test_whoever_meets_it_first_does_not_hear_of_it(slow_seal, emptied):
    """Nothing has looked in between: the first that misses a file does."""
    async with opened(slow_seal) as store:
        retried = store.loss.retried
        for turn in range(3):
            await retried(partial(store.put, "f", b"d" * 9000))
            await store.put("g", b"e" * 9000)
            await store.flush()
            ino = store.find("f").ino
            emptied(store.residency.memory.folder)
            assert await retried(partial(store.get, "f")) == b"d" * 9000
            emptied(store.residency.memory.folder)
            await retried(partial(store.files.truncate, ino, 5))
            assert await retried(partial(store.get, "f")) == b"ddddd"
            emptied(store.residency.memory.folder)
            await retried(partial(store.put, f"new{turn}", b"new"))
            assert await retried(partial(store.get, f"new{turn}")) == b"new"
            assert await retried(partial(store.get, "g")) == b"e" * 9000
            store.files.release(await retried(partial(store.files.open, store.find("g").ino, writable=True)))


async def test_a_name_that_is_absent_is_still_absent(slow_seal):
    async with opened(slow_seal) as store:
        calls = []

        async def look_for_it():
            calls.append(1)
            return store.find("nothing")

        with pytest.raises(FileNotFoundError):
            await store.loss.retried(look_for_it)
        assert len(calls) == 1 and not store.loss.suspected
