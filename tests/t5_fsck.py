"""fsck: one flipped bit in any field of any file is found; what has a good copy is healed, what has none is named."""

import json
import os
import random
import shutil
import sqlite3
import stat
import struct
from dataclasses import replace

import flips
import pytest
from stores import flip, memory_of, move_in, opened, wipe_memory

from cascadefs.config import MIB, Settings
from cascadefs.errors import StoreError
from cascadefs.formats.record import record_bytes
from cascadefs.integrity import fsck
from cascadefs.metadata.namespace import ROOT
from cascadefs.store import Store
from cascadefs.tiers.extents import Piece

TORTURE = bool(os.environ.get("TORTURE"))  # every byte of a small store, not a sample


@pytest.fixture
def settings(settings, in_memory):
    """In memory: on a disk each flip is written back before fsck reads it past the page cache."""
    return replace(settings, store=in_memory / "store", extent_size=8 * MIB)


def checked(settings, repair=False):
    return fsck.run(settings.store, settings.shm_dir, repair, lambda what, done, total: None)


async def furnish(store):
    """Files, folders, links and one dead record, flushed twice; {path: bytes}."""
    contents = {f"f{i}": os.urandom(200 + 4500 * i) for i in range(6)}
    for path, data in contents.items():
        await store.put(path, data)
    await store.flush()
    folder = store.namespace.make(ROOT, b"folder", stat.S_IFDIR | 0o755, 0, 0)
    store.namespace.link(store.find("f3").ino, folder.ino, b"again")
    store.namespace.xattrs.put(folder.ino, b"user.note", b"x" * 3000)
    await store.flush()
    return contents


async def filled(settings):
    async with opened(settings) as store:
        return await furnish(store)


async def test_a_store_in_use_is_refused_and_a_sound_one_is_clean(settings):
    contents = await filled(settings)
    found = checked(settings)
    assert found.exit_code == 0 and found.after.findings == [] and found.after.bytes_read > sum(map(len, contents.values()))
    async with opened(settings):
        with pytest.raises(StoreError, match="in use"):
            checked(settings)
    before = {p: p.read_bytes() for p in settings.store.rglob("*") if p.is_file()}
    checked(settings)
    assert {p: p.read_bytes() for p in settings.store.rglob("*") if p.is_file()} == before


async def test_punched_space_does_not_count_as_read(settings):
    async with opened(settings) as store:
        await store.put("gone", os.urandom(6 * MIB))
        await store.put("kept", os.urandom(MIB))
        await store.flush()
        store.files.forget_if_gone(store.namespace.unlink(ROOT, b"gone").ino)
        await store.flush()
        size = store.index.open_extent()[1]
    assert size > 7 * MIB
    wipe_memory(settings)
    found = checked(settings)
    assert found.exit_code == 0 and MIB < found.after.bytes_read < 2 * MIB


@pytest.mark.timeout(60)
async def test_a_store_with_many_files_is_judged_in_linear_time(settings):
    async with opened(settings) as store:
        for i in range(1500):
            await store.put(f"f{i}", b"%d" % i * 50)
        await store.flush()
    assert checked(settings).exit_code == fsck.CLEAN


def record_fields(at, length):
    """Byte ranges of the fields of a record that starts at `at`."""
    names = ("magic", "version", "fingerprint", "length", "offset", "zeros", "sum")
    start = at
    for name, size in zip(names, (4, 4, 16, 8, 8, 16, 8), strict=True):
        yield f"record {name}", start, start + size
        start += size
    yield "payload", start, start + length
    yield "padding", start + length, at + record_bytes(length)


def extent_fields(db, path, number):
    """(field, first byte, end) of every field of an extent, the dead record and the holes included."""
    for name, start, end in (("magic", 0, 4), ("version", 4, 8), ("store id", 8, 24), ("number", 24, 32), ("sum", 32, 40)):
        yield f"extent {name}", start, end
    yield "zeros of the header page", 40, 4096
    for kind in ("blocks", "manifests"):
        for offset, length in db.execute(f"SELECT offset, length FROM {kind} WHERE extent=?", (number,)):
            for field, start, end in record_fields(offset, length):
                yield f"{kind[:-1]} {field}", start, end
    size, sealed = db.execute("SELECT size, sealed FROM extents WHERE number=?", (number,)).fetchone()
    if sealed:
        yield from footer_fields(path.read_bytes(), size)


def footer_fields(data, size):
    at, length = struct.unpack_from("<QQ", data, size - 24)
    for name, start, end in (("magic", 0, 4), ("version", 4, 8), ("number", 8, 16), ("count", 16, 24)):
        yield f"footer {name}", at + start, at + end
    yield "footer entries", at + 24, at + length - 8
    yield "footer sum", at + length - 8, at + length
    yield "zeros behind the footer", at + length, size - 32
    for name, start in (("magic", 32), ("version", 28), ("offset", 24), ("length", 16), ("sum", 8)):
        yield f"tail {name}", size - start, size - start + (4 if start > 24 else 8)


def chosen(start, end, count=2):
    """A few bits to flip in a range of bytes."""
    return [8 * random.randrange(start, end) + random.randrange(8) for _ in range(min(count, end - start))]


def assert_found(settings, path, fields):
    """Each flip is found by fsck, and undone; returns how many there were."""
    count = 0
    for field, start, end in fields:
        for bit in chosen(start, end):
            flip(path, bit)
            assert checked(settings).exit_code == 2, f"{path.name}: bit {bit % 8} of byte {bit // 8} ({field}) was not noticed"
            flip(path, bit)
            count += 1
    return count


async def test_a_flip_in_any_field_of_an_extent_is_found(settings):
    await filled(settings)
    async with opened(settings) as store:  # a sealed extent, and a dead record in the open one
        await store.put("large", os.urandom(8 * MIB))
        await store.flush()
        await store.put("small", b"1" * 5000)
        await store.flush()
    wipe_memory(settings)
    db = sqlite3.connect(settings.store / "index.db")
    assert db.execute("SELECT count(*) FROM extents WHERE sealed=1").fetchone() == (1,)
    for path in sorted((settings.store / "extents").iterdir()):
        assert assert_found(settings, path, extent_fields(db, path, int(path.stem))) > 30
    db.close()
    assert checked(settings).exit_code == 0


def kept_copy(settings, base):
    """Store and memory as they are now, for flips.py; the reserve has no content."""
    shutil.copytree(settings.store, base / "store", ignore=shutil.ignore_patterns("reserve"))
    shutil.copytree(settings.shm_dir, base / "shm")
    move_in(base / "store", base / "shm")


async def furnish_smallest(settings, killed):
    """All there is in a store, as small as it can be: a sealed extent with a dead record, an open one, manifests, copies in
    memory. `killed`: a copy with transactions that only the WAL has."""
    async with opened(replace(settings, extent_size=16384)) as store:
        await store.put("f", b"some payload" * 100)
        await store.put("gone", os.urandom(300))
        await store.flush()
        await store.put("g", os.urandom(2000))
        await store.flush()
        store.files.forget_if_gone(store.namespace.unlink(ROOT, b"gone").ino)
        store.files.dead.clear()  # not punched: a dead record
        store.database.checkpoint()
        for i in range(3):
            store.namespace.make(ROOT, b"late-%d" % i, stat.S_IFIFO | 0o600, 0, 0)
        kept_copy(settings, killed)


@pytest.mark.timeout(1800 if TORTURE else 120)
async def test_every_byte_of_a_small_store(settings, tmp_path, capsys):
    """One bit of each byte of each file (of a sample of them without TORTURE), with and without a WAL."""
    await furnish_smallest(settings, tmp_path / "killed")
    kept_copy(settings, tmp_path / "closed")
    db = sqlite3.connect(settings.store / "index.db")
    assert db.execute("SELECT size, live, sealed FROM extents").fetchall() == [(20480, 4096, 1), (12288, 4096, 0)]
    assert db.execute("SELECT count(*) FROM manifests").fetchone() == (2,)
    db.close()
    chosen = flips.spots(tmp_path, random.Random())
    assert len({flips.region(spot) for spot in chosen}) == 7
    chosen = chosen if TORTURE else chosen[:200]
    missed = flips.on_all_cores(tmp_path, chosen) if TORTURE else flips.unnoticed(tmp_path, chosen)
    with capsys.disabled():
        print("\n" + flips.summary(chosen, missed))
    assert not missed


async def test_bytes_where_nothing_should_be_are_found_and_punched(settings):
    async with opened(settings) as store:
        for name in ("a", "b", "c"):
            await store.put(name, os.urandom(9000))
        await store.flush()
        at = store.index.blocks(store.find("b").oid)[0].location
        store.files.forget_if_gone(store.namespace.unlink(ROOT, b"b").ino)
        await store.flush()
    path = settings.store / f"extents/{at.extent:08d}.cfx"
    assert checked(settings).exit_code == 0
    flip(path, (at.offset + 5000) * 8 + 3)
    assert checked(settings).exit_code == 2
    assert checked(settings, repair=True).exit_code == 1
    assert checked(settings).exit_code == 0 and path.read_bytes()[at.offset : at.offset + 9000] == bytes(9000)


async def test_a_flip_in_store_json_or_the_sums_is_found_and_healed(settings):
    await filled(settings)
    for name in ("store.json", "index.sums"):
        path = settings.store / name
        good = path.read_bytes()
        bits = random.sample(range(len(good) * 8), 25)
        for bit in bits:
            flip(path, bit)
            assert checked(settings).exit_code == 2, (name, bit)
            with pytest.raises(StoreError, match="cascadefs fsck --repair"):
                Store(settings)
            flip(path, bit)
        flip(path, bits[0])
        assert checked(settings, repair=True).exit_code == 1
        assert checked(settings).exit_code == 0 and (name == "index.sums" or path.read_bytes() == good)


def pages_by_kind(path):
    """{kind of page: a page of that kind}: header, interior and leaf of tables and indexes, freelist."""
    data = path.read_bytes()
    names = {2: "interior index", 5: "interior table", 10: "leaf index", 13: "leaf table"}
    found = {"header": 1}
    for page in range(2, len(data) // 1024 + 1):
        kind = data[(page - 1) * 1024]
        if kind in names:
            found.setdefault(names[kind], page)
    freelist = struct.unpack_from(">I", data, 32)[0]
    return found | ({"freelist trunk": freelist} if freelist else {})


async def test_a_flip_in_any_kind_of_index_page_is_found_and_healed(settings):
    await filled(settings)
    async with opened(settings) as store:
        folder = store.namespace.make(ROOT, b"many", stat.S_IFDIR | 0o755, 0, 0)
        for i in range(400):
            store.namespace.make(folder.ino, b"name-%d" % i + b"x" * 100, stat.S_IFIFO | 0o600, 0, 0)
        for i in range(200):
            store.files.forget_if_gone(store.namespace.unlink(folder.ino, b"name-%d" % i + b"x" * 100).ino)
        for i in range(200):
            gone = store.namespace.make(folder.ino, b"y%d" % i + b"y" * 200, stat.S_IFIFO | 0o600, 0, 0).ino
            store.namespace.unlink(folder.ino, b"y%d" % i + b"y" * 200)
            store.files.forget_if_gone(gone)
    path = settings.store / "index.db"
    kinds = pages_by_kind(path)
    assert set(kinds) == {"header", "interior index", "interior table", "leaf index", "leaf table", "freelist trunk"}
    good = path.read_bytes()
    for kind, page in kinds.items():
        for bit in chosen((page - 1) * 1024, page * 1024, 4):
            flip(path, bit)
            assert checked(settings).exit_code == 2, (kind, bit)
            with pytest.raises(StoreError, match="cascadefs rebuild-index"):
                Store(settings)
            assert checked(settings, repair=True).exit_code == 1 and path.read_bytes() == good
    path.write_bytes(good + bytes(1024))
    assert checked(settings).exit_code == 2
    path.write_bytes(good[:-1024])
    assert checked(settings).exit_code == 2


def copy_of(settings, base):
    """A store as kill -9 leaves it: its WAL has not been copied into index.db."""
    shutil.rmtree(base, ignore_errors=True)
    shutil.copytree(settings.store, base)
    return Settings(store=base, shm_dir=settings.shm_dir)


async def test_a_flip_in_the_wal_is_found_and_put_right_or_the_store_is_not_opened(settings, tmp_path):
    await filled(settings)
    async with opened(settings) as store:
        for i in range(40):
            store.namespace.make(ROOT, b"late-%d" % i, stat.S_IFIFO | 0o600, 0, 0)
        killed = copy_of(settings, tmp_path / "killed")
    path = killed.store / "index.db-wal"
    size = path.stat().st_size
    fields = [("header", 0, 32), ("last frame", size - 1048, size)]
    for frame in range((size - 32) // 1048):
        start = 32 + frame * 1048
        fields += [("frame header", start, start + 24), ("frame body", start + 24, start + 1048)]
    assert checked(killed).exit_code == 0
    sample = fields[:2] + random.sample(fields[2:], 12)
    good, healed = path.read_bytes(), 0
    for field, start, end in sample:
        for bit in random.sample(range(start * 8, end * 8), 4):
            flip(path, bit)
            found = checked(killed)
            assert found.exit_code == 2, (field, bit)
            with pytest.raises(StoreError, match="index.db-wal"):
                Store(killed)
            if any(finding.heal for finding in found.before.findings):
                assert checked(killed, repair=True).exit_code == 1 and path.read_bytes() == good
                healed += 1
            path.write_bytes(good)
    assert healed > len(sample)


async def test_a_torn_tail_of_the_wal_is_no_damage(settings, tmp_path):
    await filled(settings)
    async with opened(settings) as store:
        for i in range(5):
            store.namespace.make(ROOT, b"late-%d" % i, stat.S_IFIFO | 0o600, 0, 0)
        killed = copy_of(settings, tmp_path / "killed")
    path = killed.store / "index.db-wal"
    data = path.read_bytes()
    path.write_bytes(data[:-700] + os.urandom(700))
    found = checked(killed)
    assert found.exit_code == 0 and any("belong to none" in note for note in found.after.notes)
    store = Store(killed)
    assert store.namespace.lookup(ROOT, b"late-3") is not None and store.namespace.lookup(ROOT, b"late-4") is None
    store.close()


async def test_a_damaged_block_is_healed_from_memory_a_double_or_its_own_bits_or_named(settings):
    contents = await filled(settings)
    big = os.urandom(300_000)
    async with opened(settings) as store:
        await store.put("folder/big", big)
        await store.flush()
        at = store.index.blocks(store.find("folder/big").oid)[0].location
    path = settings.store / f"extents/{at.extent:08d}.cfx"
    flip(path, (at.offset + 150_000) * 8)
    found = checked(settings)
    assert found.exit_code == 2 and found.after.findings[0].paths == ("/folder/big",)
    assert checked(settings, repair=True).exit_code == 1  # from memory
    wipe_memory(settings)
    async with opened(settings) as store:
        assert await store.get("folder/big") == big
        at = store.index.blocks(store.find("folder/big").oid)[0].location
        small = store.index.blocks(store.find("f1").oid)[0].location
    wipe_memory(settings)
    flip(path, (small.offset + 64 + 77) * 8 + 5)
    assert checked(settings, repair=True).exit_code == 1  # one bit of a small block
    flip(path, (at.offset + 150_000) * 8)
    left = checked(settings, repair=True)
    assert left.exit_code == 2 and [f.paths for f in left.after.findings] == [("/folder/big",)]
    async with opened(settings) as store:
        for name, data in contents.items():
            assert await store.get(name) == data
        with pytest.raises(OSError, match="damaged"):
            await store.get("folder/big")


async def test_a_double_elsewhere_heals(settings):
    data = os.urandom(100_000)
    async with opened(settings) as store:
        await store.put("f", data)
        await store.flush()
        block = store.index.blocks(store.find("f").oid)[0]
    wipe_memory(settings)
    path = settings.store / "extents/00000001.cfx"
    async with opened(settings) as store:  # a second record of the same block, which nothing points to
        first = block.location
        store.files.dead.clear()
        fd = os.open(path, os.O_RDONLY)
        number, end = store.index.open_extent()
        piece = Piece(block.bid, block.fingerprint, fd, first.offset + 64, 100_000)
        placed, end = store.residency.cold.append(number, end, [piece])
        os.close(fd)
        assert store.files.bulk.relocate(block.bid, placed[0][1], end) == [first]
    flip(path, (placed[0][1].offset + 5000) * 8)
    assert checked(settings).exit_code == 2
    assert checked(settings, repair=True).exit_code == 1
    async with opened(settings) as store:
        assert await store.get("f") == data


WRONG_ROWS = {
    "nlink": "UPDATE inodes SET nlink=nlink+1 WHERE ino=(SELECT ino FROM entries WHERE name=x'6631')",
    "folder nlink": "UPDATE inodes SET nlink=5 WHERE ino=1",
    "dangling name": "INSERT INTO entries VALUES(1, 9999, x'4142', 4242)",
    "lost inode": "DELETE FROM entries WHERE name=x'6632'",
    "loop": "UPDATE entries SET parent=ino WHERE name=x'666f6c646572'",
    "xattr of nothing": "INSERT INTO xattrs VALUES(4242, x'75', x'31')",
    "object refs": "UPDATE objects SET refs=refs+3 WHERE oid=2",
    "block refs": "UPDATE blocks SET refs=refs-1 WHERE bid=3",
    "live bytes": "UPDATE extents SET live=live+4096",
    "lonely object": "INSERT INTO objects VALUES(777, x'00112233445566778899aabbccddeeff', 0, 0, 1, NULL)",
}


@pytest.mark.parametrize("wrong", WRONG_ROWS)
async def test_wrong_rows_are_found_and_put_right(settings, wrong):
    contents = await filled(settings)
    store = Store(settings)
    store.database.connection.execute(WRONG_ROWS[wrong])
    store.close()
    assert checked(settings).exit_code == 2
    healed = checked(settings, repair=True)
    assert healed.exit_code == 1, healed.after.findings
    async with opened(settings) as store:
        for name, data in contents.items():
            path = name
            if wrong == "lost inode" and name == "f2":
                ((_, found, _),) = store.namespace.listing(store.find("lost+found").ino, 0)
                path = "lost+found/" + found.decode()
            assert await store.get(path) == data
    assert checked(settings).exit_code == 0


async def test_a_damaged_copy_in_memory_is_dropped_when_the_extents_have_it(settings):
    contents = await filled(settings)
    (folder,) = memory_of(settings)
    copy = max((folder / "objects").iterdir(), key=lambda p: p.stat().st_size)
    flip(copy, 999)
    found = checked(settings)
    assert found.exit_code == 2 and found.after.findings[0].check == "copies"
    assert checked(settings, repair=True).exit_code == 1 and not copy.exists()
    async with opened(settings) as store:
        for name, data in contents.items():
            assert await store.get(name) == data


async def test_leftovers_are_notes_and_a_lost_index_is_damage(settings):
    await filled(settings)
    (folder,) = memory_of(settings)
    (folder / "staged/4711").write_bytes(b"left")
    (settings.store / "parking/objects/unfinished.new").touch()
    (settings.store / "extents/00000099.cfx").write_bytes(bytes(4096))
    found = checked(settings)
    assert found.exit_code == 0 and len(found.after.notes) == 3, found.after.notes
    (settings.store / "index.db").unlink()
    assert checked(settings).exit_code == 2
    with pytest.raises(StoreError, match="rebuild-index"):
        Store(settings)
    assert json.dumps(fsck.document(found))
