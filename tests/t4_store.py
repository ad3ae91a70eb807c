"""A store without a mount: seal, dedup, flush, eviction, copy on write, recovery after the loss of memory or of the process."""

import os
import stat
import sys
import textwrap
from dataclasses import replace

import pytest
import trio
from stores import opened, wipe_memory

from cascadefs.config import MIB
from cascadefs.errors import StoreError
from cascadefs.metadata.namespace import ROOT
from cascadefs.metadata.sqlite import claim
from cascadefs.placement.decisions import PATIENCE_S, QUIET_S, may_seal
from cascadefs.stats import metrics, status
from cascadefs.store import Store


def in_extents(settings):
    return sum(f.stat().st_size for f in (settings.store / "extents").iterdir())


async def test_equal_contents_are_stored_once_and_part_when_one_changes(settings):
    data = os.urandom(9 * MIB)
    async with opened(settings) as store:
        for i in range(20):
            await store.put(f"f{i}", data)
        await store.flush()
        figures = status(store, {})
        assert figures["dedup_ratio"] == 20 and figures["unique_bytes"] == len(data)
        assert in_extents(settings) < 1.02 * len(data)
        await store.put("f3", b"x" + data[1:])
        await store.flush()
        assert await store.get("f3") == b"x" + data[1:]
        assert [await store.get(f"f{i}") for i in (2, 4)] == [data, data]
        # Only the first block of f3 is new.
        assert status(store, {})["unique_bytes"] == len(data) + 4 * MIB
        assert b'cascadefs_tier_used_bytes{tier="cold"}' in metrics(status(store, {}))


async def test_many_small_files_end_in_one_extent(settings):
    async with opened(settings) as store:
        contents = {f"n{i}": os.urandom(20_000) for i in range(300)}
        for name, data in contents.items():
            await store.put(name, data)
        await store.flush()
        assert len(list((settings.store / "extents").iterdir())) == 1
    wipe_memory(settings)
    async with opened(settings) as store:
        for name, data in contents.items():
            assert await store.get(name) == data


async def test_what_was_flushed_survives_the_loss_of_memory_and_the_rest_falls_back_or_is_absent(settings):
    async with opened(settings) as store:
        await store.put("kept", b"one" * 5000)
        await store.put("changed", b"before" * 1000)
        await store.flush()
    settings = replace(settings, seal_delay=60.0)
    async with opened(settings) as store:
        await store.put("changed", b"after" * 1000)
        await store.put("new", b"never flushed")
        assert await store.get("changed") == b"after" * 1000
    wipe_memory(settings)
    async with opened(settings) as store:
        assert (store.recovered.fallen_back, store.recovered.absent) == (1, 1)
        assert await store.get("kept") == b"one" * 5000
        assert await store.get("changed") == b"before" * 1000
        with pytest.raises(FileNotFoundError):
            await store.get("new")


async def test_a_file_larger_than_the_promotion_limit_is_streamed(settings):
    settings = replace(settings, promote_limit=0)
    data = os.urandom(13 * MIB + 17)
    async with opened(settings) as store:
        await store.put("big", data)
        await store.flush()
    wipe_memory(settings)
    async with opened(settings) as store:
        assert await store.get("big") == data
        assert not store.residency.memory.objects
        ino = store.find("big").ino
        assert await store.streams.read(ino, 4 * MIB - 5, 10) == data[4 * MIB - 5 : 4 * MIB + 5]
        assert await store.streams.read(ino, len(data) - 3, 100) == data[-3:]
        assert await store.streams.read(ino, len(data) + 5, 100) == b""


@pytest.mark.parametrize("limit", [0, 64 * MIB], ids=["streamed", "promoted"])
async def test_a_file_is_read_into_buffers_hot_and_cold(settings, limit):
    settings, data = replace(settings, promote_limit=limit), os.urandom(9 * MIB + 17)
    parts = [memoryview(bytearray(size)) for size in (5 * MIB + 3, 1, 5 * MIB)]  # more room than there are bytes
    async with opened(settings) as store:
        await store.put("block", data)
        await store.put("empty", b"")
        assert await store.get_into("block", *parts) == len(data)
        assert b"".join(parts)[: len(data)] == data
        assert await store.get_into("empty", *parts) == 0 and await store.get_into("block") == 0
        await store.flush()
    wipe_memory(settings)
    async with opened(settings) as store:
        for part in parts:
            part[:] = bytes(len(part))
        assert await store.get_into("block", *parts) == len(data)
        assert b"".join(parts) == data + bytes(sum(map(len, parts)) - len(data))
        assert await store.get_into("block", parts[1]) == 1 and parts[1] == data[:1]
        assert not store.files.live  # no handle is left
        with pytest.raises(FileNotFoundError):
            await store.get_into("nothing", *parts)


async def test_three_times_the_memory_goes_through_and_comes_back(settings):
    contents = {f"w{i}": os.urandom(8 * MIB) for i in range(24)}
    async with opened(settings) as store:
        for name, data in contents.items():
            await store.put(name, data)
        await store.flush()
        with trio.fail_after(20):
            while store.residency.under_pressure():
                await trio.sleep(0.02)
        assert store.residency.evicted > 0
        for name, data in contents.items():
            assert await store.get(name) == data


async def test_fsync_of_a_file_with_a_writer_is_durable(settings):
    async with opened(settings) as store:
        inode = store.namespace.make(ROOT, b"log", stat.S_IFREG | 0o600, 0, 0, home=1)
        handle = store.files.create_content(inode)
        path = store.files.staged_path(store.namespace.get(inode.ino))
        fd = os.open(path, os.O_WRONLY)
        os.write(fd, b"first line\n")
        await store.mover.fsync(inode.ino)
        os.write(fd, b"second line\n")
        os.close(fd)
        assert not store.namespace.orphans()
        del handle
    wipe_memory(settings)
    async with opened(settings) as store:
        assert await store.get("log") == b"first line\n"


async def test_readers_see_what_a_later_writer_writes_and_other_names_do_not(settings):
    async with opened(settings) as store:
        await store.put("a", b"old" * 100)
        await store.put("b", b"old" * 100)
        await store.flush()
        reader = await store.files.open(store.find("a").ino, writable=False)
        writer = await store.files.open(store.find("a").ino, writable=True)
        assert writer.source is reader.source
        fd = os.open(store.files.staged_path(store.find("a")), os.O_WRONLY)
        os.write(fd, b"NEW")
        os.close(fd)
        assert os.pread(reader.source.fd, 6, 0) == b"NEWold"
        store.files.release(reader)
        store.files.release(writer)
        await store.flush()
        assert await store.get("b") == b"old" * 100 and await store.get("a") == b"NEW" + b"old" * 99


async def test_references_equal_a_recount_after_all_names_are_gone(settings):
    async with opened(settings) as store:
        for i in range(12):
            await store.put(f"f{i}", bytes([i % 3]) * 100_000)
        await store.flush()
        for i in range(12):
            store.files.forget_if_gone(store.namespace.unlink(ROOT, b"f%d" % i).ino)
        await store.flush()
        totals = store.index.totals()
        assert (totals["objects"], totals["unique_bytes"], totals["live_bytes"]) == (0, 0, 0)
        assert not store.residency.memory.objects and not store.residency.parking.objects


async def test_a_sparse_terabyte_is_sealed_and_comes_back(settings):
    async with opened(settings) as store:
        await store.put("sparse", b"head")
        await store.files.truncate(store.find("sparse").ino, 1 << 38)
        with trio.fail_after(60):
            await store.flush()
        assert in_extents(settings) < 20 * MIB
    wipe_memory(settings)
    async with opened(settings) as store:
        ino = store.find("sparse").ino
        assert await store.streams.read(ino, 0, 8) == b"head" + bytes(4)
        assert await store.streams.read(ino, (1 << 38) - 4, 8) == bytes(4)


async def test_info_tells_where_a_file_is(settings):
    async with opened(settings) as store:
        await store.put("f", b"abc")
        await store.put("g", b"abc")
        await store.flush()
        told = await store.info(store.find("f").ino)
        assert told["sha256"] == "ba7816bf8f01cfea414140de5dae2223" and told["references"] == 2
        assert told["tier"] == "shm" and told["durable"] and told["blocks"] == 1 and told["extents"] == [1]
        assert store.index.by_address(told["sha256"]).digest.hex() == told["hash"]


async def test_a_store_in_use_is_refused(settings):
    async with opened(settings):
        code = textwrap.dedent(f"""
            from pathlib import Path
            from cascadefs.config import Settings
            from cascadefs.store import Store
            Store(Settings(store=Path({str(settings.store)!r}), shm_dir=Path({str(settings.shm_dir)!r})))
        """)
        done = await trio.run_process([sys.executable, "-c", code], check=False, capture_stderr=True)
        assert done.returncode and b"in use by a live mount" in done.stderr
    (settings.store / "store.json").write_text('{"format": 99}')
    with pytest.raises(StoreError, match="format 99"):
        Store(settings)


async def test_a_content_written_again_does_not_inherit_a_clean_copy(settings):
    """The copy of a deleted object must not pass for durable: eviction would drop the only bytes there are."""
    data = os.urandom(MIB)
    async with opened(settings) as store:
        await store.put("a", data)
        await store.flush()
        digest = store.index.object(store.find("a").oid).digest
        await store.put("a", b"other")
        await store.flush()
        assert store.index.find(digest) is None
        await store.put("b", data)
        await store.sealer.seal(store.find("b").ino)
        found = store.index.find(digest)
        assert found is not None and (found.durable or digest not in store.residency.clean)
        assert await store.get("b") == data


def test_a_store_that_was_refused_is_not_kept_locked(settings):
    settings.store.mkdir()
    (settings.store / "store.json").symlink_to("/dev/null")
    for _ in range(2):  # "in use" would be said at the second time
        with pytest.raises(StoreError, match="put it there"):
            Store(settings)
    (settings.store / "store.json").unlink()
    Store(settings).close()


async def test_with_seal_flush_nothing_is_hashed_until_it_is_asked_for(settings):
    settings = replace(settings, seal="flush", shm_size=64 * MIB)
    async with opened(settings) as store:
        for name in ("synced", "asked", "left"):
            await store.put(name, name.encode() * 1000)
        await trio.sleep(0.3)  # ten times what background work waits for
        assert len(store.index.staged_inodes()) == 3
        await store.mover.fsync(store.find("synced").ino)
        assert len(store.index.staged_inodes()) == 2 and status(store, {})["tiers"]["cold"]["objects"] == 1
        await store.info(store.find("asked").ino)  # its hash is asked for
        assert store.index.staged_inodes() == [store.find("left").ino]
        await store.flush()
        assert not store.index.staged_inodes() and status(store, {})["pending_bytes"] == 0


async def test_with_seal_flush_short_memory_is_a_reason(settings):
    settings = replace(settings, seal="flush", shm_size=64 * MIB)
    contents = {f"s{i}": os.urandom(4 * MIB) for i in range(16)}
    async with opened(settings) as store:
        for name, data in contents.items():
            await store.put(name, data)
        with trio.fail_after(20):
            while store.residency.under_pressure():
                await trio.sleep(0.02)
        assert store.residency.evicted > 0
        for name, data in contents.items():
            assert await store.get(name) == data


def test_what_is_sealed_in_the_background_needs_a_reason():
    for due_s, quiet_s, expected in ((-1, 9, False), (0, QUIET_S, True), (1, 0, False), (PATIENCE_S, 0, True)):
        assert may_seal(False, True, due_s, quiet_s) is expected
        assert may_seal(False, False, due_s, quiet_s) is False
        assert may_seal(True, False, due_s, quiet_s) is True


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_store_of_another_user_is_not_claimed(settings):
    Store(settings).close()
    os.chown(settings.store, 65534, 65534)
    with pytest.raises(StoreError, match="belongs to user 65534"):
        claim(settings.store, changes=False)
    os.chown(settings.store, 0, 0)
    os.close(claim(settings.store, changes=False))
