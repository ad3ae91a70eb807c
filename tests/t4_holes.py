"""Where streamed objects have holes, told without a file: against the bytes, to the page; and that zeros are not read."""

import errno
import os
import random
from dataclasses import replace

import pytest
from stores import opened, wipe_memory, written

from cascadefs.config import MIB
from cascadefs.metadata import holes

PAGE = 4096


def runs(data):
    """[(begin, end)] of data by pages, the last one cut off."""
    found = []
    for at in range(0, len(data), PAGE):
        page = data[at : at + PAGE]
        if page.count(0) == len(page):
            continue
        if found and found[-1][1] == at:
            found[-1] = (found[-1][0], at + len(page))
        else:
            found.append((at, at + len(page)))
    return found


async def sought(store, ino, size):
    """The same as SEEK_DATA and SEEK_HOLE say."""
    found, at = [], 0
    while at < size:
        try:
            begin = await store.streams.seek(ino, at, os.SEEK_DATA)
        except OSError as e:
            assert e.errno == errno.ENXIO
            break
        at = await store.streams.seek(ino, begin, os.SEEK_HOLE)
        found.append((begin, at))
    return found


def sparse(size, places):
    data = bytearray(size)
    for begin, end in places:
        data[begin:end] = os.urandom(end - begin).replace(b"\0", b"x")
    return data


pick = random.Random(7)
CONTENTS = {
    "dense": sparse(9 * MIB + 17, [(0, 9 * MIB + 17)]),
    "nothing": sparse(21 * MIB + 5, []),
    "ends": sparse(21 * MIB + 5, [(0, 1), (21 * MIB + 4, 21 * MIB + 5)]),
    "a hole at the end": sparse(13 * MIB + 5, [(5 * MIB, 8 * MIB)]),
    "across blocks": sparse(20 * MIB, [(4 * MIB - PAGE, 4 * MIB + PAGE), (8 * MIB, 16 * MIB)]),
    "pages": sparse(13 * MIB, [(at * PAGE, (at + 1) * PAGE) for at in pick.sample(range(13 * MIB // PAGE), 500)]),
}


@pytest.mark.parametrize("name", CONTENTS)
async def test_a_stream_tells_its_holes_to_the_page(settings, name):
    data = CONTENTS[name]
    settings = replace(settings, promote_limit=0)
    async with opened(settings) as store:
        await store.put("f", data)
        await store.flush()
    wipe_memory(settings)
    async with opened(settings) as store:
        ino, told = store.find("f").ino, runs(data)
        assert await sought(store, ino, len(data)) == told
        for _ in range(100):
            at = pick.randrange(len(data))
            pages = runs(data[at // PAGE * PAGE : at // PAGE * PAGE + PAGE])
            if pages:
                assert await store.streams.seek(ino, at, os.SEEK_DATA) == at
            else:
                assert await store.streams.seek(ino, at, os.SEEK_HOLE) == at
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            for at in (len(data), len(data) + 1, (1 << 64) - 1):
                with pytest.raises(OSError) as caught:
                    await store.streams.seek(ino, at, whence)
                assert caught.value.errno == errno.ENXIO
        assert not store.residency.memory.objects


async def test_neither_seeking_nor_reading_reads_blocks_of_zeros(settings):
    settings, size = replace(settings, promote_limit=0), 1 << 36
    async with opened(settings) as store:
        with written(store, "f", b"head") as ino:
            os.truncate(store.files.staged_path(store.namespace.get(ino)), size)
        await store.flush()
    wipe_memory(settings)
    async with opened(settings) as store:
        ino = store.find("f").ino
        assert await store.streams.read(ino, size // 2 - 5, MIB) == bytes(MIB)
        assert await store.streams.read(ino, size - 5, MIB) == bytes(5)
        with pytest.raises(OSError):
            await store.streams.seek(ino, 4 * MIB, os.SEEK_DATA)
        assert await store.streams.seek(ino, 4 * MIB, os.SEEK_HOLE) == 4 * MIB
        assert store.residency.cold_reads == 0
        assert await sought(store, ino, size) == [(0, PAGE)]
        assert await store.streams.read(ino, 0, 8) == b"head" + bytes(4)
        assert store.residency.cold_reads == 1


async def test_what_is_staged_or_whole_in_memory_is_sought_in_its_file(settings):
    data = CONTENTS["ends"]
    async with opened(settings) as store:
        with written(store, "f", b"x" * PAGE) as ino:
            os.truncate(store.files.staged_path(store.namespace.get(ino)), 5 * MIB)
            assert await sought(store, ino, 5 * MIB) == [(0, PAGE)]
            assert await store.streams.seek(ino, 5 * MIB - 1, os.SEEK_HOLE) == 5 * MIB - 1
        await store.put("g", data)
        await store.flush()
    wipe_memory(settings)
    async with opened(settings) as store:
        ino = store.find("g").ino
        store.files.release(await store.files.open(ino, False))
        assert store.residency.memory.objects
        reads = store.residency.cold_reads
        assert await sought(store, ino, len(data)) == runs(data)
        assert store.residency.cold_reads == reads


async def test_a_block_that_cannot_be_read_is_told_as_data(settings):
    settings, data = replace(settings, promote_limit=0), CONTENTS["pages"]
    async with opened(settings) as store:
        await store.put("f", data)
        await store.flush()
        oid = store.find("f").oid
        second = store.index.blocks(oid)[1]
        path = store.residency.cold.path(second.location.extent)
    wipe_memory(settings)
    with path.open("r+b") as file:
        file.seek(second.location.offset + 2 * MIB)
        file.write(b"damage")
    async with opened(settings) as store:
        found = await sought(store, store.find("f").ino, len(data))
        kept = [run for run in runs(data) if not 4 * MIB <= run[0] < 8 * MIB]
        assert [run for run in found if run[1] <= 4 * MIB or run[0] >= 8 * MIB] == [
            run for run in kept if run[1] <= 4 * MIB or run[0] >= 8 * MIB
        ]
        assert any(begin <= 4 * MIB + PAGE and end >= 8 * MIB for begin, end in found)


async def test_looking_for_a_hole_ends(settings, monkeypatch):
    monkeypatch.setattr(holes, "LOOKED_INTO", 2)
    settings = replace(settings, promote_limit=0)
    data = sparse(24 * MIB, [(0, 8 * MIB), (9 * MIB, 12 * MIB), (20 * MIB, 24 * MIB)])
    async with opened(settings) as store:
        await store.put("f", data)
        await store.flush()
    wipe_memory(settings)
    async with opened(settings) as store:
        ino = store.find("f").ino
        assert await sought(store, ino, len(data)) == [(0, 12 * MIB), (20 * MIB, 24 * MIB)]
        assert store.residency.cold_reads <= 5


@pytest.mark.parametrize("name", CONTENTS)
def test_a_kept_block_reads_as_its_bytes(name):
    data = bytes(CONTENTS[name])
    content = holes.Content.of(memoryview(data))
    assert sum(len(part) for _, part in content.parts) == content.kept_bytes
    assert content.kept_bytes == len(data) or content.kept_bytes <= len(data) / 4
    assert content.read(0, len(data) + 9) == data
    for _ in range(300):
        start, size = pick.randrange(len(data)), pick.choice([1, 512, PAGE, 70_000, 5 * MIB])
        assert content.read(start, size) == data[start : start + size]


async def test_blocks_that_are_mostly_zeros_are_read_once(settings):
    settings, data = replace(settings, promote_limit=0), sparse(64 * MIB, [(at * MIB, at * MIB + 5) for at in range(64)])
    async with opened(settings) as store:
        await store.put("f", data)
        await store.flush()
    wipe_memory(settings)
    async with opened(settings) as store:
        ino = store.find("f").ino
        assert await sought(store, ino, len(data)) == runs(data)
        reads = store.residency.cold_reads
        assert await sought(store, ino, len(data)) == runs(data)
        for at in range(0, len(data), MIB):
            assert await store.streams.read(ino, at, 512 << 10) == data[at : at + (512 << 10)]
        assert store.residency.cold_reads == reads <= 16


async def test_a_long_file_of_few_bytes_is_brought_to_memory(settings):
    settings = replace(settings, promote_limit=5 * MIB)
    few, many = sparse(30 * MIB, [(0, 4 * MIB), (17 * MIB, 17 * MIB + 1)]), sparse(30 * MIB, [(MIB, 5 * MIB)])
    few[0 : 4 * MIB] = bytes(4 * MIB)
    async with opened(settings) as store:
        await store.put("few", few)
        await store.put("many", many)
        await store.flush()
    wipe_memory(settings)
    async with opened(settings) as store:
        for name in ("many", "few"):
            inode = store.namespace.get(store.find(name).ino)
            assert store.residency.needed_bytes(store.index.object(inode.oid)) == {"few": 4 * MIB, "many": 8 * MIB}[name]
            store.namespace.update(inode.ino, blocks=8)
            store.files.release(await store.files.open(inode.ino, False))
        assert list(store.residency.memory.objects) == [store.index.object(inode.oid).digest]
        assert store.residency.clean_bytes <= 2 * MIB
        assert await sought(store, inode.ino, len(few)) == runs(few)


async def test_a_new_opening_does_not_count_the_holes_of_large_copies(settings):
    async with opened(settings) as store:
        with written(store, "f", b"head") as ino:
            os.truncate(store.files.staged_path(store.namespace.get(ino)), 1 << 33)
        await store.flush()
        assert store.residency.memory_state().evictable_bytes <= MIB
    async with opened(settings) as store:
        assert store.residency.memory.objects and store.residency.memory_state().evictable_bytes <= MIB
