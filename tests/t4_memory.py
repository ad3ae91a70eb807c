"""The memory tier of a store and of its copies: crashes, copies made at any time, other folders."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from stores import memory_of, opened, pause, wipe_memory

from cascadefs.integrity import fsck
from cascadefs.integrity.rebuild import rebuild
from cascadefs.metadata.namespace import ROOT
from cascadefs.store import Store
from cascadefs.tiers import owner, shm


@pytest.fixture
def copied(slow_seal):
    """Settings of a copy that copy() makes of the store as it is now."""

    def copy():
        copy_settings = replace(slow_seal, store=slow_seal.store.parent / "copy")
        shutil.copytree(slow_seal.store, copy_settings.store)
        return copy_settings

    return copy


async def get(store, name):
    return await store.get(name)


async def names_in(settings):
    async with opened(settings) as store:
        return {name.decode(): await store.get(name.decode()) for _, name, _ in store.namespace.listing(1, 0)}


@pytest.mark.parametrize("live", [False, True])
async def test_a_copy_leaves_alone_what_only_its_originals_memory_has(slow_seal, copied, live):
    async with opened(slow_seal) as store:
        await store.put("durable", b"d" * 5000)
        await store.flush()
        await store.put("closed", b"c" * 5000)
        copy = copied() if live else None
    copy = copy or copied()
    async with opened(copy) as store:
        assert store.residency.memory.claim.notes and await get(store, "durable") == b"d" * 5000
        await store.put("closed", b"of the copy" * 7)
        await store.flush()
    assert await names_in(slow_seal) == {"durable": b"d" * 5000, "closed": b"c" * 5000}
    assert await names_in(copy) == {"durable": b"d" * 5000, "closed": b"of the copy" * 7}
    assert len(memory_of(slow_seal)) == 2


async def test_both_at_once_and_in_turn(slow_seal, copied):
    async with opened(slow_seal) as store:
        await store.flush()
    copy = copied()
    for turn in range(3):
        async with opened(slow_seal) as one, opened(copy) as other:
            await one.put("f", b"one" * (turn + 1))
            await other.put("f", b"the other" * (turn + 1))
            assert await get(one, "f") == b"one" * (turn + 1)
            assert await get(other, "f") == b"the other" * (turn + 1)
        assert await names_in(copy) == {"f": b"the other" * (turn + 1)}
        assert await names_in(slow_seal) == {"f": b"one" * (turn + 1)}


async def test_a_copy_by_hard_links_and_its_original_do_not_write_to_each_other(slow_seal):
    async with opened(slow_seal) as store:
        await store.put("kept", b"k" * 9000)
        await store.put("gone", b"g" * 9000)
        await store.flush()
    copy = replace(slow_seal, store=slow_seal.store.parent / "copy")
    shutil.copytree(slow_seal.store, copy.store, copy_function=os.link)
    async with opened(copy) as store:
        store.files.forget_if_gone(store.namespace.unlink(ROOT, b"gone").ino)
        await store.put("new", b"n" * 9000)
        await store.flush()
        await store.mover.flush_batch(())
    assert await names_in(slow_seal) == {"kept": b"k" * 9000, "gone": b"g" * 9000}
    assert await names_in(copy) == {"kept": b"k" * 9000, "new": b"n" * 9000}
    for settings in (slow_seal, copy):
        wipe_memory(settings)
        assert fsck.check(settings.store, settings.shm_dir, lambda *_: None)[0].findings == []
        assert set(await names_in(settings)) == {"kept", "gone" if settings is slow_seal else "new"}


async def test_a_store_that_was_renamed_has_its_memory(slow_seal):
    async with opened(slow_seal) as store:
        await store.put("f", b"closed" * 100)
    moved = replace(slow_seal, store=slow_seal.store.rename(slow_seal.store.parent / "moved"))
    assert await names_in(moved) == {"f": b"closed" * 100}


async def test_memory_in_another_folder_than_the_setting_says_is_used_until_all_is_durable(slow_seal, tmp_path):
    async with opened(slow_seal) as store:
        await store.put("f", b"closed" * 100)
        before = store.residency.memory.folder
    (tmp_path / "other").mkdir()
    other = replace(slow_seal, shm_dir=tmp_path / "other")
    async with opened(other) as store:
        assert store.residency.memory.folder == before and "stays" in store.residency.memory.claim.notes[0]
        assert await get(store, "f") == b"closed" * 100
        await store.flush()
    async with opened(other) as store:
        assert store.residency.memory.folder.parent == tmp_path / "other" and not before.exists()
        assert await get(store, "f") == b"closed" * 100
        store.release_memory()


async def test_checks_and_rebuilding_of_a_copy_do_not_look_into_the_originals_memory(slow_seal, copied):
    async with opened(slow_seal) as store:
        await store.put("f", b"closed" * 100)
    copy = copied()
    notes = fsck.run(copy.store, copy.shm_dir, False, lambda *_: None).after.notes
    assert any("memory was lost" in note for note in notes)
    rebuild(copy.store, copy.shm_dir, lambda *_: None)
    assert await names_in(copy) == {}
    assert not fsck.run(slow_seal.store, slow_seal.shm_dir, False, lambda *_: None).after.notes
    assert await names_in(slow_seal) == {"f": b"closed" * 100}


async def test_a_tier_tells_whether_all_in_it_is_durable(slow_seal):
    async with opened(slow_seal) as store:
        await store.put("f", b"closed" * 100)
        folder = store.residency.memory.folder
    assert not owner.read_owner(folder).is_durable
    async with opened(slow_seal) as store:
        await store.flush()
        assert not owner.read_owner(folder).is_durable
    assert owner.read_owner(folder).is_durable


def test_a_released_tier_leaves_nothing(slow_seal):
    store = Store(slow_seal)
    store.release_memory()
    store.close()
    assert list(Path(slow_seal.shm_dir).iterdir()) == []


async def test_files_of_a_plain_folder_are_not_hidden_below_a_tmpfs(slow_seal, in_memory, monkeypatch):
    settings = replace(slow_seal, shm_dir=in_memory)
    with monkeypatch.context() as without_privilege:
        without_privilege.setattr(shm, "_mount_tmpfs", lambda *_: "Operation not permitted")
        async with opened(settings) as store:
            await store.put("sealed", b"s" * 5000)
            pause(store)
            await store.mover.sealer.seal(store.namespace.lookup(ROOT, b"sealed").ino)
            await store.put("staged", b"t" * 5000)
    async with opened(settings) as store:
        assert not store.residency.memory.own_mount
    assert await names_in(settings) == {"sealed": b"s" * 5000, "staged": b"t" * 5000}
