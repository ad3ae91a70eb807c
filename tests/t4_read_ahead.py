"""Read-ahead across cold objects: the decisions, and what it does to a store: never harm, never an error for the others."""

import os
from dataclasses import replace

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from stores import flip, opened, wipe_memory

from cascadefs.config import MIB
from cascadefs.formats.record import HEADER_BYTES
from cascadefs.media import file_io
from cascadefs.placement.decisions import AHEAD, HIGH, may_read_ahead, next_in_order, plan_eviction
from cascadefs.stats import metrics, status
from cascadefs.types import Object

BYTES = 6 * MIB  # two blocks; less than AHEAD of the tier
sizes = st.integers(0, 1 << 40)


@given(capacity=sizes, used=sizes, unused=sizes, size=sizes, more=sizes)
def test_what_is_read_ahead_is_a_small_share_and_evicts_nothing(capacity, used, unused, size, more):
    if may_read_ahead(capacity, used, unused, size):
        assert unused + size <= capacity * AHEAD and used + size <= capacity * HIGH
    else:  # and what was refused stays refused when there is less room
        assert not may_read_ahead(capacity, used + more, unused, size) and not may_read_ahead(
            capacity, used, unused + more, size
        )


objects = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 100)), max_size=6)


@given(followers=objects, here=st.sets(st.integers(0, 9)), limit=st.integers(0, 100))
def test_the_next_to_be_missed_is_the_first_that_is_not_here(followers, here, limit):
    followers = [Object(oid, bytes([name]), size, True) for oid, (name, size) in enumerate(followers)]
    found = next_in_order(followers, {bytes([name]) for name in here}, limit)
    missing = [each for each in followers if each.digest[0] not in here]
    assert found == (missing[0] if missing and missing[0].size_bytes <= limit else None)


# --- a store


async def filled(settings, count, size=BYTES):
    """Files r0, r1, ... written one after the other, all cold; their contents by name."""
    contents = {f"r{i}": os.urandom(size) for i in range(count)}
    async with opened(settings) as store:
        for name, data in contents.items():
            await store.put(name, data)
            await store.mover.fsync(store.find(name).ino)
    wipe_memory(settings)
    return contents


async def settled(ahead):
    """Everything that was queued to be read ahead is here or given up."""
    with trio.fail_after(20):
        await trio.testing.wait_all_tasks_blocked()
        while ahead._queue or ahead._residency.under_way:
            await trio.sleep(0.005)
            await trio.testing.wait_all_tasks_blocked()


def told(store):
    return status(store, {})["read_ahead"]


async def test_the_third_of_a_sequence_is_here_before_it_is_asked_for(settings):
    contents = await filled(settings, 5)
    async with opened(settings) as store:
        memory = store.residency.memory.objects
        assert await store.get("r0") == contents["r0"]
        await settled(store.files.read_ahead)
        assert len(memory) == 1 and told(store) == {"fetched": 0, "used": 0, "wasted": 0}  # one miss is no sequence
        for place, name in enumerate(("r1", "r2", "r3"), 1):
            assert await store.get(name) == contents[name]
            await settled(store.files.read_ahead)
            assert len(memory) == place + 2
            assert told(store) == {"fetched": place, "used": place - 1, "wasted": 0}
        assert store.residency.misses == 2 and store.residency.cold_reads == 5
        assert b"cascadefs_read_ahead_fetched 3.0" in metrics(status(store, {}))


async def test_a_flush_keeps_the_order_of_closing(settings):
    settings = replace(settings, seal_delay=60)
    async with opened(settings) as store:
        contents = {f"r{i}": os.urandom(MIB) for i in range(6)}
        for name in contents:
            await store.put(name, b"")
        for name in ("r3", "r0", "r5", "r1", "r4", "r2"):
            store.files.to_seal.pop(store.find(name).ino)
            await store.put(name, contents[name])
        await store.flush()
        oids = {name: store.find(name).oid for name in contents}
        assert sorted(oids, key=oids.get) == ["r3", "r0", "r5", "r1", "r4", "r2"]


async def test_a_chain_goes_on_while_each_is_waited_for(settings):
    """The share of memory for what is unused holds one object: it must not count what somebody waits for."""
    contents = await filled(settings, 6)
    async with opened(settings) as store:
        for name, data in contents.items():  # each is asked for while it is on its way
            assert await store.get(name) == data
        assert told(store)["used"] >= 3 and told(store)["wasted"] == 0


async def test_a_scattered_order_reads_nothing_ahead(settings):
    contents = await filled(settings, 7)
    async with opened(settings) as store:
        for name in ("r6", "r4", "r0", "r2", "r5"):
            assert await store.get(name) == contents[name]
            await settled(store.files.read_ahead)
        assert told(store)["fetched"] == 0 and store.residency.cold_reads == 5


async def test_two_readers_are_followed_at_once(settings):
    contents = await filled(settings, 8, 2 * MIB)
    async with opened(settings) as store:
        for name in ("r0", "r4", "r1", "r5", "r2", "r6"):
            assert await store.get(name) == contents[name]
            await settled(store.files.read_ahead)
        assert store.residency.misses == 4 and told(store)["used"] == 2


def held_up(store, monkeypatch):
    """What is read ahead waits on its way: (set when it has begun, what it waits for)."""
    begun, go_on = trio.Event(), trio.Event()
    materialize = store.residency.materialize

    def slowly(blocks, path, heal, all_begun):
        if not heal:
            trio.from_thread.run_sync(begun.set)
            trio.from_thread.run(go_on.wait)
        materialize(blocks, path, heal, all_begun)

    monkeypatch.setattr(store.residency, "materialize", slowly)
    return begun, go_on


async def test_who_asks_for_what_is_on_its_way_waits_for_it(settings, monkeypatch):
    contents = await filled(settings, 3)
    async with opened(settings) as store:
        begun, go_on = held_up(store, monkeypatch)
        for name in ("r0", "r1"):
            assert await store.get(name) == contents[name]
        await begun.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(check, store, "r2", contents["r2"])
            nursery.start_soon(check, store, "r2", contents["r2"])
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()
        assert store.residency.cold_reads == 3 and told(store) == {"fetched": 1, "used": 1, "wasted": 0}


@pytest.mark.parametrize("is_told", [True, False])
async def test_the_next_begins_when_the_disk_was_asked_for_all_of_the_one_before(settings, monkeypatch, is_told):
    contents = await filled(settings, 5)
    async with opened(settings) as store:
        ahead, come, go_on = [], trio.Event(), trio.Event()
        materialize = store.residency.materialize

        def last_copying(blocks, path, heal, all_begun):
            ahead.append(path)
            materialize(blocks, path, heal, all_begun if is_told else lambda: None)
            if not heal:
                trio.from_thread.run_sync(come.set)
                trio.from_thread.run(go_on.wait)

        for name in ("r0", "r1"):
            assert await store.get(name) == contents[name]
            monkeypatch.setattr(store.residency, "materialize", last_copying)
        await come.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(check, store, "r2", contents["r2"])
            await trio.sleep(0.2)
            begun = len(ahead)
            go_on.set()
        assert begun == (3 if is_told else 2)  # r1, r2, and r3 before r2 is here
        await settled(store.files.read_ahead)
        assert told(store) == {"fetched": 2, "used": 1, "wasted": 0}
        assert list(store.files.read_ahead.unused.values()) == [BYTES]


async def test_what_is_on_its_way_counts_as_unused_until_somebody_waits_for_it(settings):
    await filled(settings, 2)
    async with opened(settings) as store:
        ahead, found = store.files.read_ahead, store.index.find_oid(store.find("r0").oid)
        assert ahead._wanted(found.oid) == found
        ahead._unmet[b"another"] = int(store.residency.memory.capacity_bytes * AHEAD) - BYTES + 1
        assert ahead._wanted(found.oid) is None
        ahead.asked(Object(0, b"another", 1, True))
        assert ahead._wanted(found.oid) == found


async def check(store, name, data):
    assert await store.get(name) == data


@pytest.mark.parametrize("change", ["delete", "overwrite"])
async def test_a_file_that_goes_while_it_is_read_ahead_leaves_nothing(settings, monkeypatch, change):
    contents = await filled(settings, 4)
    async with opened(settings) as store:
        begun, go_on = held_up(store, monkeypatch)
        for name in ("r0", "r1"):
            await store.get(name)
        await begun.wait()
        if change == "delete":
            inode = store.find("r2")
            store.namespace.unlink(1, b"r2")
            store.files.forget_if_gone(inode.ino)
        else:
            await store.put("r2", b"other")
        await store.flush()  # its records are punched now
        go_on.set()
        await settled(store.files.read_ahead)
        known = {found.digest for oid in range(9) if (found := store.index.find_oid(oid))}
        assert set(store.residency.memory.objects) <= known and told(store)["fetched"] == 0
        assert sorted(os.listdir(store.residency.memory.folder / "objects")) == sorted(
            digest.hex() for digest in store.residency.memory.objects
        )
        assert (status(store, {})["corrupt_reads"], status(store, {})["trouble"]) == (0, [])
        assert await store.get("r3") == contents["r3"]


async def test_a_damaged_record_met_ahead_is_told_to_whoever_asks_for_it(settings, caplog):
    contents = await filled(settings, 4)
    async with opened(settings) as store:
        block = store.index.blocks(store.find("r2").oid)[1]
        at = block.location
        flip(settings.store / "extents" / f"{at.extent:08d}.cfx", (at.offset + HEADER_BYTES + 100) * 8)
        for name in ("r0", "r1"):
            assert await store.get(name) == contents[name]
        await settled(store.files.read_ahead)
        found = status(store, {})
        assert (found["corrupt_reads"], found["damaged_blocks"], found["last_error"]) == (0, 0, None)
        assert told(store)["fetched"] == 0 and not [r for r in caplog.records if r.levelname != "INFO"]
        assert await store.get("r3") == contents["r3"]
        with pytest.raises(OSError, match="damaged"):
            await store.get("r2")
        assert status(store, {})["corrupt_reads"] == 1


async def test_memory_that_is_short_is_left_alone(settings):
    settings = replace(settings, shm_size=64 * MIB)
    contents = await filled(settings, 12)
    async with opened(settings) as store:
        for name, data in contents.items():
            await store.put("hot", os.urandom(4 * MIB))
            assert await store.get(name) == data
            await settled(store.files.read_ahead)
            assert store.residency.memory.used_bytes() <= 64 * MIB
        figures = told(store)
        assert figures["fetched"] == figures["used"] + figures["wasted"] + len(store.files.read_ahead.unused)
        assert await store.get("hot") is not None


async def test_what_was_read_ahead_in_vain_is_counted_when_it_goes(settings):
    contents = await filled(settings, 4)
    async with opened(settings) as store:
        for name in ("r0", "r1"):
            assert await store.get(name) == contents[name]
        await settled(store.files.read_ahead)
        for digest in plan_eviction(
            replace(store.residency.memory_state(), capacity_bytes=0), store.residency.policy.victims()
        ):
            store.residency.drop(store.residency.memory, digest)
        assert told(store) == {"fetched": 1, "used": 0, "wasted": 1} and not store.files.read_ahead.unused
        assert await store.get("r2") == contents["r2"]


async def test_a_medium_that_fails_ahead_stops_nobody(settings, monkeypatch):
    contents = await filled(settings, 5)
    async with opened(settings) as store:
        open_direct = file_io.open_direct

        def failing(path, flags):
            raise OSError(5, "the disk says no")

        for name in ("r0", "r1"):
            assert await store.get(name) == contents[name]
            monkeypatch.setattr(file_io, "open_direct", failing)
            await settled(store.files.read_ahead)
            monkeypatch.setattr(file_io, "open_direct", open_direct)
        for name in ("r2", "r3", "r4"):
            assert await store.get(name) == contents[name]
        assert store.mover.last_error is None


async def test_a_stream_reads_the_next_block_ahead_and_each_once(settings):
    settings = replace(settings, promote_limit=0)
    (data,) = (await filled(settings, 1, 22 * MIB)).values()
    async with opened(settings) as store:
        ino = store.find("r0").ino
        for at in range(0, len(data), MIB):
            assert await store.streams.read(ino, at, MIB) == data[at : at + MIB]
            await trio.testing.wait_all_tasks_blocked(0.01)
            if at == 5 * MIB:  # two blocks were asked for in order
                while store.streams._under_way:
                    await trio.sleep(0.005)
                assert store.residency.cold_reads == 3
        assert store.residency.cold_reads == 6
        store.streams._blocks.clear()
        async with trio.open_nursery() as nursery:
            for at in range(0, 4 * MIB, MIB):
                nursery.start_soon(store.streams.read, ino, at, MIB)
        assert store.residency.cold_reads == 7  # four requests for one block


async def test_a_damaged_block_of_a_stream_hurts_only_who_asks_for_it(settings):
    settings = replace(settings, promote_limit=0)
    (data,) = (await filled(settings, 1, 18 * MIB)).values()
    async with opened(settings) as store:
        inode = store.find("r0")
        at = store.index.blocks(inode.oid)[2].location
        flip(settings.store / "extents" / f"{at.extent:08d}.cfx", (at.offset + HEADER_BYTES + 100) * 8)
        assert await store.streams.read(inode.ino, 0, 8 * MIB) == data[: 8 * MIB]
        await trio.testing.wait_all_tasks_blocked(0.01)
        while store.streams._under_way:
            await trio.sleep(0.005)
        assert status(store, {})["corrupt_reads"] == 0
        with pytest.raises(OSError, match="damaged"):
            await store.streams.read(inode.ino, 8 * MIB, 10)
        assert await store.streams.read(inode.ino, 12 * MIB, 6 * MIB) == data[12 * MIB :]


async def test_what_is_on_its_way_is_not_begun_again(settings, monkeypatch):
    """Read-ahead chose an object, and before its task ran somebody opened it: each used to take away the other's event, and
    whoever waited for that one waited for ever."""
    contents = await filled(settings, 1)
    async with opened(settings) as store:
        begun, go_on = held_up(store, monkeypatch)
        residency, found = store.residency, store.index.object(store.find("r0").oid)
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(residency.bring, found, False)
                await begun.wait()
                assert not await residency.bring(found, False)
                nursery.start_soon(check, store, "r0", contents["r0"])
                await trio.sleep(0.01)
                assert found.digest in residency.under_way
                go_on.set()
        assert not residency.under_way
