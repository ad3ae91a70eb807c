"""Many files at a time: sealed in batches, fsynced together; each is as safe and as shared as it would be alone."""

import os
from dataclasses import replace

import pytest
import trio
import trio.testing
from recount import recount
from stores import memory_of, opened, wipe_memory, written

from cascadefs.config import MIB
from cascadefs.ext import hashing
from cascadefs.formats.record import MANIFEST, record_bytes
from cascadefs.metadata.namespace import ROOT
from cascadefs.tiers.extents import ColdTier
from cascadefs.tiers.packer import FIRST_BYTES, Capture, Subject
from cascadefs.types import Location
from cascadefs.writeback.sealing import Outcome

KIB = 1024


async def fsync_all(store, inos):
    async with trio.open_nursery() as nursery:
        for ino in inos:
            nursery.start_soon(store.mover.fsync, ino)


def appends(store):
    """Each append ends with a manifest."""
    return len(store.index.manifests())


def cold_bytes(store):
    return store.index.totals()["live_bytes"]


async def test_a_batch_is_sealed_although_some_of_it_cannot_be(slow_seal):
    async with opened(slow_seal) as store:
        contents = {f"f{i}": os.urandom(5000) for i in range(6)} | {"empty": b""}
        contents["twin"] = contents["f0"]
        for name, data in contents.items():
            await store.put(name, data)
        await store.put("gone", b"gone")
        os.unlink(store.files.staged_path(store.find("gone")))
        ino = {name: store.find(name).ino for name in [*contents, "gone"]}
        with written(store, "busy", b"busy") as busy:
            outcome = Outcome()
            for batch in store.sealer.batches([*ino.values(), busy, 123_456]):
                await store.sealer.seal_batch(batch, outcome)
        assert outcome.busy == {busy} and isinstance(outcome.error, FileNotFoundError)
        assert outcome.sealed == {ino[name] for name in contents} | {123_456}
        assert store.find("f0").oid == store.find("twin").oid and store.index.refs(store.find("f0").oid) == 2
        assert store.find("empty").oid is None and not store.find("empty").home
        for name, data in contents.items():
            assert await store.get(name) == data


async def test_a_flush_of_many_is_durable_and_counted_right(slow_seal):
    contents = {f"f{i}": os.urandom(3000) * (1 + i % 3) for i in range(150)}
    contents |= {f"double{i}": contents[f"f{i}"] for i in range(0, 150, 10)} | {"empty": b""}
    async with opened(slow_seal) as store:
        for name, data in contents.items():
            await store.put(name, data)
        await store.flush()
        assert not store.index.dirty(1) and not store.index.staged_inodes()
        assert len(store.residency.clean) == 150
    assert recount(slow_seal.store, memory_of(slow_seal)[0]) == []
    wipe_memory(slow_seal)
    async with opened(slow_seal) as store:
        for name, data in contents.items():
            assert await store.get(name) == data


async def test_those_who_wait_for_an_fsync_share_the_next_one(slow_seal):
    contents = {f"log{i}": os.urandom(20_000 + i) for i in range(30)}
    async with opened(slow_seal) as store:
        handles = [written(store, name, data) for name, data in contents.items()]
        inos = [handle.__enter__() for handle in handles]
        await fsync_all(store, inos)
        assert 1 <= appends(store) <= 2  # the first alone, then all others
        assert all(store.namespace.get(ino).home for ino in inos)
        for handle in handles:
            handle.__exit__(None, None, None)
    assert recount(slow_seal.store, memory_of(slow_seal)[0]) == []
    wipe_memory(slow_seal)
    async with opened(slow_seal) as store:
        for name, data in contents.items():
            assert await store.get(name) == data


@pytest.mark.parametrize(("dedup", "copies"), [("store", 2), ("off", 5)])
async def test_fsync_writes_what_the_extents_lack_and_no_more(slow_seal, dedup, copies):
    """Of two contents: one that is durable, one that is only in memory, and both again in files that are open."""
    settings = replace(slow_seal, dedup=dedup)
    durable, dirty = os.urandom(100 * KIB), os.urandom(100 * KIB)
    async with opened(settings) as store:
        await store.put("durable", durable)
        await store.flush()
        await store.put("dirty", dirty)
        await store.sealer.seal(store.find("dirty").ino)
        with written(store, "a", durable) as a, written(store, "b", dirty) as b, written(store, "c", dirty) as c:
            await fsync_all(store, (a, b, c))
            kept = [store.namespace.get(ino).durable_oid for ino in (a, b, c)]
            shared = kept == [store.find("durable").oid, store.find("dirty").oid, store.find("dirty").oid]
            assert shared == (dedup == "store")
        await store.flush()
        assert cold_bytes(store) // (100 * KIB) == copies
        assert len(store.residency.clean) == len({store.find(name).oid for name in ("durable", "dirty", "a", "b", "c")})
        assert await store.get("c") == dirty
    assert recount(settings.store, memory_of(settings)[0]) == []


async def test_an_fsync_that_finds_its_file_sealed_meanwhile_waits_for_the_object(slow_seal):
    async with opened(slow_seal) as store, trio.open_nursery() as nursery:
        async with store.mover.extent.lock:
            with written(store, "f", b"content" * 1000) as ino:
                nursery.start_soon(store.mover.fsync, ino)
                await trio.testing.wait_all_tasks_blocked()
            assert await store.sealer.seal(ino)
        await store.mover.fsync(ino)
        assert store.namespace.get(ino).durable_oid == store.namespace.get(ino).oid
        assert appends(store) == 1


async def test_an_fsync_whose_block_loses_its_place_meanwhile_writes_it(slow_seal):
    """The only other file with these bytes goes while the new one is being read: what was said to have a place has none."""
    data = os.urandom(100 * KIB)
    async with opened(slow_seal) as store:
        await store.put("old", data)
        await store.flush()
        lacking = store.files.bulk.lacking

        def said_too_early(prints):
            found = lacking(prints)
            if store.namespace.lookup(ROOT, b"old") is not None:
                assert not found
                store.files.forget_if_gone(store.namespace.unlink(ROOT, b"old").ino)
            return found

        store.files.bulk.lacking = said_too_early
        with written(store, "new", data) as ino:
            await store.mover.fsync(ino)
    wipe_memory(slow_seal)
    async with opened(slow_seal) as store:
        assert await store.get("new") == data
        await store.flush()
    assert recount(slow_seal.store, memory_of(slow_seal)[0]) == []


async def test_an_fsync_that_is_cancelled_leaves_the_others_to_be_served(slow_seal):
    data = os.urandom(50_000)
    async with opened(slow_seal) as store, trio.open_nursery() as nursery:
        with written(store, "a", data) as a, written(store, "b", data[1:]) as b:
            async with store.mover.extent.lock:
                async with trio.open_nursery() as given_up:
                    given_up.start_soon(store.mover.fsync, a)
                    await trio.testing.wait_all_tasks_blocked()
                    given_up.cancel_scope.cancel()
                nursery.start_soon(store.mover.fsync, b)
                await trio.testing.wait_all_tasks_blocked()
            await store.mover.fsync(a)
            assert None not in (store.namespace.get(a).durable_oid, store.namespace.get(b).durable_oid)


def test_a_capture_packs_what_is_lacking_and_reads_a_file_that_shrank_as_zeros(tmp_path):
    """Several writes; every second block is known already, so that records move up; one file ends too early."""
    tier = ColdTier(tmp_path / "extents", "ab" * 16, bytes(range(192)))
    block, sizes = 256 * KIB, [FIRST_BYTES + 3 * MIB + 17, 12 * MIB, 5000]
    fds = []
    for number, size in enumerate(sizes):
        path = tmp_path / str(number)
        path.write_bytes(os.urandom(size))
        fds.append(os.open(path, os.O_RDONLY))
    os.truncate(tmp_path / "1", 11 * MIB + 100)
    known = set()

    def lacking(prints):
        known.update(prints[::2])
        return set(prints) - known

    places = {}
    subjects = [Subject(fd, size, True, places) for fd, size in zip(fds, sizes, strict=True)]
    start, manifest = tier.create(1), b"manifest" * 1000
    end = Capture(tier, block, 1, start, lacking).run(subjects, lambda: manifest)
    lengths = [*(length for _, length in places), len(manifest)]
    assert os.path.getsize(tier.path(1)) == end == start + sum(map(record_bytes, lengths))
    for number, subject in enumerate(subjects):
        data = (tmp_path / str(number)).read_bytes().ljust(sizes[number], b"\0")
        parts = [data[at : at + block] for at in range(0, len(data), block)]
        assert subject.prints == [(hashing.fingerprint(part, tier.secret), len(part)) for part in parts]
    assert {one for subject in subjects for one in subject.prints} == known | places.keys()
    for (fingerprint, _), at in places.items():
        tier.verify(at, fingerprint)
    told = Location(1, end - record_bytes(len(manifest)), len(manifest))
    tier.verify(told, hashing.fingerprint(manifest, tier.secret), MANIFEST)
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("way", ["flush", "fsync"])
async def test_no_statement_looks_at_all_that_is_there(slow_seal, way):
    """Else the tenth thousand of files would take ten times as long as the first. SQLite counts its steps."""
    async with opened(slow_seal) as store:

        async def steps(name):
            made = []
            store.database.connection.set_progress_handler(lambda: made.append(1), 10)
            with written(store, name, os.urandom(20_000)) as ino:
                if way == "fsync":
                    await store.mover.fsync(ino)
            if way == "flush":
                await store.flush()
            store.database.connection.set_progress_handler(None, 0)
            return len(made)

        async def least(name):
            """Of three: background work comes in between."""
            return min([await steps(f"{name} {turn}") for turn in range(3)])

        await steps("warm")
        few = await least("few")
        for number in range(400):
            await store.put(f"f{number}", os.urandom(5000))
        await store.flush()
        assert 10 < await least("many") < 2 * few


async def test_a_file_that_is_cut_while_it_is_compared_is_durable_as_it_was_read(slow_seal, monkeypatch):
    equal = hashing.equal
    async with opened(slow_seal) as store:
        await store.put("old", data := os.urandom(20_000))
        await store.flush()
        with written(store, "f", data) as ino:
            path = store.files.staged_path(store.namespace.get(ino))

            def cut_and_compare(*arguments):
                os.truncate(path, 10)
                return equal(*arguments)

            monkeypatch.setattr(hashing, "equal", cut_and_compare)
            await store.mover.fsync(ino)
            monkeypatch.setattr(hashing, "equal", equal)
        assert await store.get("old") == data
        await store.flush()
        assert await store.get("f") == data[:10]
    assert recount(slow_seal.store, memory_of(slow_seal)[0]) == []
