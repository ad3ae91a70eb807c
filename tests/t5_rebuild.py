"""rebuild-index: names, attributes and bytes come back from the extents alone."""

import os
import stat
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
from stores import flip, opened, wipe_memory, written

from cascadefs.config import MIB, Settings
from cascadefs.formats.manifest import Listed, Manifest, Told, decode, encode
from cascadefs.formats.record import RecordHeader
from cascadefs.integrity import fsck
from cascadefs.integrity.rebuild import Replay, Tree, rebuild
from cascadefs.metadata import manifests
from cascadefs.metadata.namespace import ROOT
from cascadefs.metadata.objects import digest_of
from cascadefs.store import Store
from cascadefs.tiers import scan
from cascadefs.writeback.sealing import Outcome


def quiet(done, total):
    assert 0 <= done <= total


def lose_index(settings):
    for name in ("index.db", "index.sums"):
        (settings.store / name).unlink()
    wipe_memory(settings)


def tree(store):
    """{path: what a user sees of it} of everything."""
    names, found, todo = store.namespace, {}, [(ROOT, b"")]
    while todo:
        folder, prefix = todo.pop()
        for _, name, inode in names.listing(folder, 0):
            xattrs = {key: names.xattrs.get(inode.ino, key) for key in names.xattrs.names(inode.ino)}
            times = (inode.atime_ns, inode.mtime_ns, inode.ctime_ns)
            owner = (inode.mode, inode.uid, inode.gid, inode.nlink, inode.rdev)
            found[prefix + b"/" + name] = (inode.ino, *owner, *times, inode.size, inode.target, xattrs)
            if stat.S_ISDIR(inode.mode):
                todo.append((inode.ino, prefix + b"/" + name))
    return found


async def furnish(store):
    """A bit of everything; returns {path: bytes}."""
    names, contents = store.namespace, {}
    folder = names.make(ROOT, b"folder", stat.S_IFDIR | 0o750, 5, 6)
    names.make(folder.ino, b"deep \xff\xfe", stat.S_IFDIR | 0o700, 0, 0)
    for path, size in {"a": 100, "folder/b": 5 * MIB + 3, "folder/c": 70_000, "zeros": 0}.items():
        contents[path] = os.urandom(size)
        await store.put(path, contents[path])
    await store.put("double", contents["folder/c"])
    contents["double"] = contents["folder/c"]
    ino = store.find("a").ino
    names.link(ino, folder.ino, b"a again")
    contents["folder/a again"] = contents["a"]
    names.xattrs.put(ino, b"user.note", b"\x00\xff kept")
    names.update(ino, mode=stat.S_IFREG | 0o640, uid=7, gid=8)
    names.make_in(ROOT, b"link", stat.S_IFLNK | 0o777, 1, 2, target=b"folder/b")
    names.make(ROOT, b"pipe", stat.S_IFIFO | 0o600, 1, 2)
    return contents


async def all_right(store, contents):
    for path, data in contents.items():
        assert await store.get(path) == data, path


@pytest.mark.parametrize("snapshot", [False, True])
async def test_everything_flushed_comes_back(settings, snapshot):
    async with opened(settings) as store:
        contents = await furnish(store)
        await store.flush()
        await store.put("a", b"changed")
        store.namespace.rename(store.find("folder").ino, b"c", ROOT, b"moved", 0)
        contents |= {"a": b"changed", "folder/a again": b"changed", "moved": contents.pop("folder/c")}
        store.namespace.unlink(ROOT, b"pipe")
        store.mover.journal.incomplete = snapshot
        await store.flush()
        before = tree(store)
    lose_index(settings)
    result = rebuild(settings.store, settings.shm_dir, quiet)
    assert result.absent == [] and result.lost_and_found == 0, result
    assert fsck.run(settings.store, settings.shm_dir, False, lambda *_: None).exit_code == 0
    async with opened(settings) as store:
        assert tree(store) == before
        await all_right(store, contents)
        await store.put("later", b"the store goes on")
        await store.flush()
    lose_index(settings)
    assert rebuild(settings.store, settings.shm_dir, quiet).absent == []
    async with opened(settings) as store:
        await all_right(store, contents | {"later": b"the store goes on"})


async def test_without_manifests_every_block_is_in_lost_and_found(settings):
    async with opened(settings) as store:
        await store.put("f", b"1" * 5000)
        await store.put("g", b"2" * 6000)
        await store.flush()
        digests = {store.index.object(store.find(n).oid).digest.hex(): n for n in "fg"}
        rows = store.database.connection.execute("SELECT extent, offset FROM manifests").fetchall()
    for extent, offset in rows:
        flip(settings.store / f"extents/{extent:08d}.cfx", (offset + 100) * 8)
    lose_index(settings)
    assert rebuild(settings.store, settings.shm_dir, quiet).lost_and_found == 2
    async with opened(settings) as store:
        assert {await store.get(f"lost+found/{d}") for d in digests} == {b"1" * 5000, b"2" * 6000}


async def test_a_damaged_newest_version_gives_way_to_the_one_before_or_is_named(settings):
    async with opened(settings) as store:
        await store.put("f", b"old" * 3000)
        await store.put("lone", b"x" * 9000)
        await store.put("keeper", b"old" * 3000)  # keeps the old block alive
        await store.flush()
        await store.put("f", b"new" * 3000)
        await store.flush()
        places = [store.index.blocks(store.find(n).oid)[0].location for n in ("f", "lone")]
    for at in places:
        flip(settings.store / f"extents/{at.extent:08d}.cfx", (at.offset + 200) * 8)
    lose_index(settings)
    assert rebuild(settings.store, settings.shm_dir, quiet).absent == ["/lone"]
    async with opened(settings) as store:
        assert await store.get("f") == b"old" * 3000 and store.namespace.lookup(ROOT, b"lone") is None


async def test_bytes_that_only_memory_has_are_kept(settings):
    async with opened(settings) as store:
        await store.put("told", b"first")
        await store.flush()
        store.mover.flush_batch = lambda first: _nothing()
        await store.put("dirty", b"d" * 5000)
        await store.sealer.seal(store.find("dirty").ino)
        inode = store.namespace.make(ROOT, b"open", stat.S_IFREG | 0o600, 0, 0, home=1)
        handle = store.files.create_content(inode)
        with open(store.files.staged_path(inode), "wb") as file:
            file.write(b"staged bytes")
        del handle
    for name in ("index.db", "index.sums"):
        (settings.store / name).unlink()
    assert rebuild(settings.store, settings.shm_dir, quiet).lost_and_found == 2
    async with opened(settings) as store:
        lost = [name for _, name, _ in store.namespace.listing(store.find("lost+found").ino, 0)]
        assert {await store.get("lost+found/" + name.decode()) for name in lost} == {b"d" * 5000, b"staged bytes"}
        assert await store.get("told") == b"first"


async def _nothing():
    return 0


async def test_a_record_that_was_dead_when_its_extent_was_sealed_can_live_again(settings):
    small = Settings(**{**settings.__dict__, "extent_size": 8 * MIB})
    async with opened(small) as store:
        store.mover._give_back = _nothing  # as a process that dies before it punches
        await store.put("gone", b"deleted, but not yet punched" * 100)
        await store.flush()
        store.files.forget_if_gone(store.namespace.unlink(ROOT, b"gone").ino)
        await store.put("large", os.urandom(8 * MIB))
        await store.flush()
    lose_index(settings)
    assert rebuild(settings.store, settings.shm_dir, quiet).lost_and_found == 1
    assert fsck.run(settings.store, settings.shm_dir, False, lambda *_: None).exit_code == 0


async def test_the_old_index_is_kept_and_dead_manifests_hold_no_extent(settings):
    async with opened(settings) as store:
        for _ in range(6):
            await store.put("f", os.urandom(3 * MIB))
            await store.flush()
        store.mover.journal.incomplete = True
        await store.mover.tell()
        manifests = store.database.connection.execute("SELECT count(*), sum(snapshot & 1) FROM manifests").fetchone()
        assert manifests == (1, 1)
    before = (settings.store / "index.db").read_bytes()
    kept = [rebuild(settings.store, settings.shm_dir, quiet).kept for _ in range(3)]
    assert (settings.store / kept[0]).read_bytes() == before
    assert len(set(kept)) == 3 and all((settings.store / name).exists() for name in kept)
    small = settings.__class__(**{**settings.__dict__, "extent_size": 8 * MIB})
    async with opened(small) as store:
        for _ in range(8):
            await store.put("f", os.urandom(5 * MIB))
            await store.flush()
        store.files.forget_if_gone(store.namespace.unlink(ROOT, b"f").ino)
        await store.flush()
        await store.flush()
        assert store.index.totals()["extents"] <= 2


after_a_death = pytest.mark.parametrize("died", [False, True], ids=["ended", "died"])


@asynccontextmanager
async def at_rest(settings, died):
    """A store without tasks of its own. `died`: the process before it did not end."""
    store = Store(settings)
    store.mover.journal.incomplete = died
    try:
        yield store
    finally:
        store.close()


async def rebuilt(settings, died, last):
    """Memory and index are lost after `last(store)`, and made anew: {path: bytes}, {path: as in tree()}, what was told."""
    async with at_rest(settings, died) as store:
        await last(store)
    lose_index(settings)
    result = rebuild(settings.store, settings.shm_dir, quiet)
    async with at_rest(settings, False) as store:
        seen = {path.decode(): entry for path, entry in tree(store).items()}
        files = {path: await store.get(path) for path, entry in seen.items() if stat.S_ISREG(entry[1])}
    return files, seen, result


async def fsync_together(store, *inos):
    async with trio.open_nursery() as nursery:
        for ino in inos:
            nursery.start_soon(store.mover.fsync, ino)


@after_a_death
@pytest.mark.parametrize("size", [0, 1, 70_000, 9 * MIB])
async def test_the_last_file_that_was_fsynced_has_its_name(slow_seal, died, size):
    data = os.urandom(size)

    async def last(store):
        top = store.namespace.make(ROOT, b"top", stat.S_IFDIR | 0o750, 5, 6)
        deep = store.namespace.make(top.ino, b"deep", stat.S_IFDIR | 0o700, 0, 0)
        store.namespace.make_in(ROOT, b"link", stat.S_IFLNK | 0o777, 1, 2, target=b"top/deep/new")
        with written(store, "new", data, deep.ino) as ino:
            store.namespace.xattrs.put(ino, b"user.note", b"kept")
            store.namespace.link(ino, ROOT, b"again")
            store.files.set_times(ino, 7, 8)
            await store.mover.fsync(ino)

    files, seen, result = await rebuilt(slow_seal, died, last)
    assert files == {"/top/deep/new": data, "/again": data}
    assert (result.lost_and_found, result.absent) == (0, [])
    _, mode, _, _, links, _, _, mtime_ns, _, _, _, xattrs = seen["/top/deep/new"]
    assert (mode, links, mtime_ns, xattrs) == (stat.S_IFREG | 0o600, 2, 8, {b"user.note": b"kept"})
    assert seen["/top"][1:4] == (stat.S_IFDIR | 0o750, 5, 6)


@after_a_death
async def test_so_has_one_whose_bytes_are_known_and_one_that_was_fsynced_before(slow_seal, died):
    data = os.urandom(50_000)

    async def last(store):
        await store.put("known", data)
        await store.flush()
        with written(store, "twin", data) as ino, written(store, "twice", b"first") as again:
            await fsync_together(store, ino, again)
            os.truncate(store.files.staged_path(store.namespace.get(again)), 2)
            store.namespace.rename(ROOT, b"twice", ROOT, b"renamed", 0)
            await fsync_together(store, again)

    files, _, result = await rebuilt(slow_seal, died, last)
    assert files == {"/known": data, "/twin": data, "/renamed": b"fi"} and result.lost_and_found == 0


@after_a_death
@pytest.mark.parametrize("of", ["file", "folder"])
async def test_what_was_fsynced_as_it_lay_there_keeps_its_new_name(slow_seal, died, of):
    async def last(store):
        names = store.namespace
        folder = names.make(ROOT, b"folder", stat.S_IFDIR | 0o755, 0, 0).ino
        for name in ("a", "b", "gone", "replaced"):
            await store.put(name, name.encode() * 100)
        await store.flush()
        ino = names.lookup(ROOT, b"a").ino
        names.rename(ROOT, b"a", folder, b"moved", 0)
        names.rename(ROOT, b"b", ROOT, b"replaced", 0)
        store.files.forget_if_gone(names.unlink(ROOT, b"gone").ino)
        names.update(ino, mode=stat.S_IFREG | 0o640)
        await (store.mover.fsync(ino) if of == "file" else store.mover.fsync_folder(folder))

    files, seen, _ = await rebuilt(slow_seal, died, last)
    assert seen["/folder/moved"][1] == stat.S_IFREG | 0o640
    named = {path: data for path, data in files.items() if "lost+found" not in path}  # deleted bytes are not punched yet
    assert named == {"/folder/moved": b"a" * 100, "/replaced": b"b" * 100}


@after_a_death
async def test_one_longer_than_a_batch_has_its_name(slow_seal, died):
    data, slow_seal = os.urandom(3 * MIB), replace(slow_seal, batch_size=MIB)

    async def last(store):
        with written(store, "long", data) as ino:
            await store.mover.fsync(ino)

    files, _, result = await rebuilt(slow_seal, died, last)
    assert files == {"/long": data} and result.lost_and_found == 0


def test_who_was_replaced_by_a_file_without_bytes_is_there_again():
    """As when power went while the last fsync wrote: its manifest is there, the bytes before it are not."""
    here, torn = digest_of(5, [b"f" * 16]), digest_of(6, [b"t" * 16])
    old, new = (
        Told(ino, 0o100644, 1, 2, 0, 3, 4, 5, None, digest, [(ROOT, b"f")]) for ino, digest in ((5, here), (6, torn))
    )
    manifests = [
        Manifest(1, False, [old], [], [Listed(here, 5, [b"f" * 16])]),
        Manifest(2, False, [new], [5], [Listed(torn, 6, [b"t" * 16])]),
    ]
    found = scan.Found(1, RecordHeader(b"f" * 16, 5, 4096), b"")
    tree = Tree(Replay(manifests, {(b"f" * 16, 5): found}, 4 * MIB), {})
    assert tree.entries == {(ROOT, b"f"): 5} and set(tree.inodes) == {ROOT, 5}


async def test_nothing_is_punched_before_the_extents_know_what_took_its_place(slow_seal):
    data = os.urandom(5 * MIB)
    async with at_rest(slow_seal, False) as store:
        await store.put("f", b"old" * MIB)
        await store.flush()
        await store.put("f", data)
        outcome = Outcome()
        await store.mover.straight.run([store.find("f").ino], MIB, outcome)
        assert outcome.sealed and store.files.dead
        await store.mover.flush_batch(())
    lose_index(slow_seal)
    assert rebuild(slow_seal.store, slow_seal.shm_dir, quiet).lost_and_found == 0
    async with at_rest(slow_seal, False) as store:
        assert await store.get("f") == data


def test_a_name_is_of_whom_was_told_of_it_last():
    """An old inode may have lost its name in a process that died before it said so."""
    first, second, third = (Told(ino, 0o100644, 1, 2, 0, 3, 4, 5, None, None, [(ROOT, b"f")]) for ino in (5, 6, 7))
    manifests = [Manifest(1, False, [third, first], [], []), Manifest(2, False, [second], [], [])]
    tree = Tree(Replay(manifests, {}, 4 * MIB), {})
    assert tree.entries[ROOT, b"f"] == 6 and tree.in_lost_and_found == 2


@pytest.mark.parametrize("hurried", [False, True])
async def test_a_snapshot_leaves_turns_to_requests(settings, hurried):
    turns, done = 0, False

    async def requests():
        nonlocal turns
        while not done:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with opened(settings) as store, trio.open_nursery() as nursery:
        for number in range(4 * manifests.SLICE):
            store.namespace.make(ROOT, b"%d" % number, stat.S_IFREG | 0o600, 0, 0)
        nursery.start_soon(requests)
        start = trio.current_time()
        taken = await store.mover.journal.everything(lambda: hurried)
        spent, done = trio.current_time() - start, True
    assert len(taken.manifest.inodes) > 4 * manifests.SLICE  # and the root
    assert turns >= 4
    assert hurried or spent >= 4 * manifests.SLICE_PAUSE_S


@pytest.mark.parametrize("hurried", [False, True])
async def test_a_long_manifest_is_written_down_with_pauses(monkeypatch, hurried):
    pauses = []
    monkeypatch.setattr(manifests.time, "sleep", pauses.append)
    told = [Told(ino, 0o100644, 1, 2, 0, 3, 4, 5, None, None, [(1, b"%d" % ino)]) for ino in range(2, 202)]
    manifest = Manifest(7, True, told, [], [])
    assert decode(await manifests.encoded(manifest, lambda: hurried)) == manifest
    assert not pauses if hurried else len(pauses) >= 10


def test_a_manifest_is_read_back_and_a_cut_one_is_refused():
    told = Told(5, 0o100644, 1, 2, 0, -1, 2**62, 3, b"t\xff", bytes(16), [(1, b"\x80name")], [(b"user.x", b"\0")])
    manifest = Manifest(7, True, [told], [8, 9], [Listed(bytes(16), 123, [b"f" * 16, b"g" * 16])])
    payload = encode(manifest)
    assert decode(payload) == manifest
    assert all(decode(payload[:n]) is None for n in range(len(payload)))
