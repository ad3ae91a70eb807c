"""Damage met while a store is open: served from a good copy and healed, else EIO, counted and logged; neighbours unhurt."""

import errno
import logging
import os

import pytest
import trio
from stores import flip, opened, wipe_memory

from cascadefs.config import MIB
from cascadefs.integrity import fsck
from cascadefs.stats import status


def place(store, path, seq=0):
    return store.index.blocks(store.find(path).oid)[seq].location


def damage(settings, at, byte, bits=(0, 9)):
    for bit in bits:  # two bits: a single one in a small payload is put right
        flip(settings.store / f"extents/{at.extent:08d}.cfx", (at.offset + byte) * 8 + bit)


async def healed(store):
    with trio.fail_after(20):
        while not store.residency.healer.healed:
            store.files.work.ring()
            await trio.sleep(0.02)


async def test_a_damaged_block_is_eio_counted_and_logged_and_its_neighbours_are_readable(settings, caplog):
    contents = {f"f{i}": os.urandom(100_000) for i in range(5)}
    async with opened(settings) as store:
        for name, data in contents.items():
            await store.put(name, data)
        await store.flush()
        at = place(store, "f2")
    wipe_memory(settings)
    damage(settings, at, 50_000)
    async with opened(settings) as store:
        with caplog.at_level(logging.ERROR):
            for _ in range(3):
                with pytest.raises(OSError) as caught:
                    await store.get("f2")
                assert caught.value.errno == errno.EIO
        lines = [r.message for r in caplog.records if "is damaged" in r.message]
        assert len(lines) == 1 and "/f2" in lines[0] and "EIO" in lines[0]
        told = status(store, {})
        assert (told["corrupt_reads"], told["damaged_blocks"], told["healed_blocks"]) == (3, 1, 0)
        for name in contents.keys() - {"f2"}:
            assert await store.get(name) == contents[name]
        await store.put("f2", contents["f2"] + b"replaced")
        await store.flush()
        assert status(store, {})["damaged_blocks"] == 0


async def test_a_block_that_another_file_has_in_memory_is_served_and_healed(settings):
    shared, first, second = (os.urandom(4 * MIB) for _ in range(3))
    async with opened(settings) as store:
        await store.put("a", shared + first)
        await store.put("b", second + shared)
        await store.flush()
        at = place(store, "a")
        assert place(store, "b", 1) == at
    wipe_memory(settings)
    async with opened(settings) as store:
        assert await store.get("b") == second + shared  # in memory from here on
        damage(settings, at, 1 * MIB)
        assert await store.get("a") == shared + first
        await healed(store)
        assert place(store, "a") == place(store, "b", 1) != at
        assert status(store, {})["corrupt_reads"] == 1 and status(store, {})["damaged_blocks"] == 0
    wipe_memory(settings)
    assert fsck.run(settings.store, settings.shm_dir, False, lambda *_: None).exit_code == 0
    async with opened(settings) as store:
        assert await store.get("a") == shared + first and await store.get("b") == second + shared


@pytest.mark.parametrize(("where", "bits"), [(20, (0, 9)), (64 + 900, (3,))])
async def test_a_damaged_header_or_a_single_bit_hurts_nobody(settings, where, bits):
    async with opened(settings) as store:
        await store.put("f", b"payload " * 700)
        await store.flush()
        at = place(store, "f")
    wipe_memory(settings)
    damage(settings, at, where, bits)
    async with opened(settings) as store:
        assert await store.get("f") == b"payload " * 700
        await healed(store)
        assert place(store, "f") != at
    assert fsck.run(settings.store, settings.shm_dir, False, lambda *_: None).exit_code == 0


async def verified(store):
    runs = store.verifier.state.runs
    store.verifier.request()
    with trio.fail_after(60):
        while store.verifier.state.runs == runs:
            await trio.sleep(0.01)
    return store.verifier.state


async def test_verify_heals_from_memory_rewrites_manifests_and_names_the_rest(settings):
    async with opened(settings) as store:
        for i in range(4):
            await store.put(f"f{i}", os.urandom(100_000 + i))
        await store.flush()
        state = await verified(store)
        assert (state.healed_blocks, state.damaged_blocks) == (0, 0) and state.bytes_done == state.bytes_total > 400_000
        damage(settings, place(store, "f1"), 5000)
        damage(settings, place(store, "f2"), 100_002 + 64, (1,))  # its padding
        (seq, manifest, _), *_ = store.index.manifests()
        damage(settings, manifest, 70)
        state = await verified(store)
        assert (state.healed_blocks, state.damaged_blocks, state.damaged_files) == (3, 0, [])
        assert seq not in [found for found, _, _ in store.index.manifests()]
        assert (await verified(store)).healed_blocks == 0
    wipe_memory(settings)
    async with opened(settings) as store:
        damage(settings, place(store, "f3"), 5000)
        state = await verified(store)
        assert (state.healed_blocks, state.damaged_blocks, state.damaged_files) == (0, 1, ["/f3"])
        assert status(store, {})["verify"]["damaged_files"] == ["/f3"] and len(await store.get("f1")) == 100_001
