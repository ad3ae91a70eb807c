"""RENAME answered by the transport: what it takes, what it records, what it leaves to Python, and what a crash makes of it."""

import os
import struct
import time

import pytest
from t5_creates import ATTRIBUTES, FOLDER, GETATTR, RESENT
from t5_grants import forwarded, until
from t5_removals import ENOENT, FILE, LOOKUP, Remover, is_known, names_and_a

from cascadefs.formats import name_ring
from cascadefs.formats.name_ring import Created, Moved, NameRing, Removed
from cascadefs.integrity.rebuild import rebuild
from cascadefs.store import Store

RENAME, OTHER_FOLDER = 12, 5


class Mover(Remover):
    """A transport with a file `.tmp` that it has made."""

    def __init__(self, folder, ino=FILE):
        super().__init__(folder)
        self.transport.add_name(FOLDER, b"known")
        self.offer(ino)
        self.create(b".tmp")
        self.answered()

    def rename(self, name, new_name, unique=8, folder=FOLDER, new_folder=FOLDER):
        body = struct.pack("<Q", new_folder) + name + b"\0" + new_name + b"\0"
        self.kernel.send(struct.pack("<IIQQIIIHH", 40 + len(body), RENAME, unique, folder, 0, 0, 0, 0, 0) + body)

    def know_other_folder(self):
        folder = ATTRIBUTES.pack(OTHER_FOLDER, 0, 0, 1, 1, 1, 0, 0, 0, 0o40755, 2, 0, 0, 0, 4096, 0)
        self.transport.set_attributes(OTHER_FOLDER, struct.pack("<QII", 3600, 0, 0) + folder)

    def attributes(self, ino):
        self.ask_of(ino, GETATTR, bytes(16))
        return ATTRIBUTES.unpack_from(self.answered()[2], 16)


@pytest.fixture
def mover(tmp_path):
    found = Mover(tmp_path)
    yield found
    found.close()


def changed_ns(attributes):
    return attributes[5] * 10**9 + attributes[8]


def test_a_move_is_answered_and_recorded(mover):
    before = mover.attributes(FILE)
    mover.rename(b".tmp", b"final", unique=12)
    assert mover.answered() == (0, 12, b"")
    made, found = mover.pending()
    assert isinstance(made, Created) and (made.at, found.at) == (0, 1)
    moved = (found.request, found.number, found.ino, found.folder, found.name, found.new_folder, found.new_name)
    assert moved == (12, 0, FILE, FOLDER, b".tmp", FOLDER, b"final")
    after = mover.attributes(FILE)
    assert changed_ns(after) == changed_ns(mover.attributes(FOLDER)) == found.time_ns
    assert after[:5] == before[:5] and after[6:8] == before[6:8] and after[9:] == before[9:]
    mover.ask(LOOKUP, b".tmp\0")
    assert mover.answered()[0] == ENOENT
    mover.ask(LOOKUP, b"final\0")
    assert mover.forwarded()[0] == LOOKUP


def test_a_name_is_moved_again_and_removed_in_that_order(mover):
    mover.know_other_folder()
    mover.rename(b".tmp", b"a", new_folder=OTHER_FOLDER)
    assert mover.answered()[0] == 0
    mover.rename(b"a", b".tmp", folder=OTHER_FOLDER)
    assert mover.answered()[0] == 0
    mover.unlink(b".tmp")
    assert mover.answered()[0] == 0
    assert not is_known(mover, FILE)
    assert [(type(one), one.at) for one in mover.pending()] == [(Created, 0), (Moved, 1), (Moved, 3), (Removed, 5)]
    assert changed_ns(mover.attributes(OTHER_FOLDER)) == mover.pending()[2].time_ns


@pytest.mark.parametrize(
    ("names", "options"),
    [
        ((b".tmp", b"known"), {}),
        ((b"known", b"new"), {}),
        ((b"absent", b"new"), {}),
        ((b".tmp", b".cascade"), {}),
        ((b".tmp", b"new"), {"new_folder": OTHER_FOLDER}),
        ((b".tmp", b"new"), {"new_folder": 1 << 60}),
        ((b".tmp", b"new"), {"unique": RESENT | 8}),
        ((b".tmp", b"n" * 256), {}),
        ((b".tmp", b""), {}),
    ],
    ids=["name taken", "whose is not known", "absent", "python's", "unknown folder", "virtual", "sent again", "long", "empty"],
)
def test_what_is_not_plain_is_for_python(mover, names, options):
    mover.rename(*names, **options)
    assert mover.forwarded()[0] == RENAME
    assert len(mover.pending()) == 1
    mover.rename(b".tmp", b"final")
    assert mover.answered()[0] == 0


def test_a_file_of_which_nothing_is_known_is_for_python(mover):
    mover.transport.drop_attributes(FILE)
    mover.rename(b".tmp", b"final")
    assert mover.forwarded()[0] == RENAME
    folder = ATTRIBUTES.pack(FILE, 0, 0, 1, 1, 1, 0, 0, 0, 0o40755, 2, 0, 0, 0, 4096, 0)
    mover.transport.set_attributes(FILE, struct.pack("<QII", 3600, 0, 0) + folder)  # nor is a folder moved here
    mover.rename(b".tmp", b"final")
    assert mover.forwarded()[0] == RENAME


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_request_that_is_cut_short_is_refused_or_for_python(mover, cut):
    body = struct.pack("<Q", FOLDER) + b".tmp\0new\0"
    body = body[:-cut] if cut < 8 else body[:4]
    mover.kernel.send(struct.pack("<IIQQIIIHH", 40 + len(body), RENAME, 8, FOLDER, 0, 0, 0, 0, 0) + body)
    if cut < 8:
        assert mover.forwarded()[0] == RENAME
    else:
        assert mover.answered()[0] < 0
    assert len(mover.pending()) == 1


def test_a_ring_without_room_for_both_records_takes_none(mover):
    for i in range(name_ring.RECORDS - 2):
        mover.transport.add_name(FOLDER, b"n%d" % i)
        mover.unlink(b"n%d" % i)
        mover.answered()
    mover.rename(b".tmp", b"final")
    assert mover.forwarded()[0] == RENAME and mover.ring.put == name_ring.RECORDS - 1
    mover.ring.settle(mover.ring.put)
    mover.rename(b".tmp", b"final")  # its records are the last and the first of the ring's memory
    assert mover.answered()[0] == 0
    assert [one.new_name for one in mover.pending()] == [b"final"]


def test_what_python_says_of_a_file_that_was_moved_meanwhile_is_not_kept(mover):
    mover.ring.settle(mover.ring.put)
    mover.rename(b".tmp", b"final")
    mover.answered()
    file = ATTRIBUTES.pack(FILE, 0, 0, 1, 1, 1, 0, 0, 0, 0o100644, 1, 0, 0, 0, 4096, 0)
    for ino in (FILE, FILE + 1):
        mover.transport.set_attributes(ino, struct.pack("<QII", 3600, 0, 0) + file)
    assert is_known(mover, FILE + 1) and not is_known(mover, FILE)
    mover.ring.settle(mover.ring.put)
    mover.transport.set_attributes(FILE, struct.pack("<QII", 3600, 0, 0) + file)
    assert is_known(mover, FILE)


def test_half_a_move_makes_no_sense(mover, caplog):
    mover.rename(b".tmp", b"final")
    mover.answered()
    assert len(mover.ring.pending(3)) == 2
    assert len(mover.ring.pending(2)) == 1 and "makes no sense" in caplog.text


# --- after a crash


async def crash_after(settings, act):
    """A store with the files a and b, whose process died when `act(mover)` had been answered and nothing of it entered."""
    store = Store(settings)
    for name in ("a", "b"):
        await store.put(name, b"old " + name.encode())
    await store.flush()
    mover = Mover(store.residency.memory.folder, store.namespace.reserve_ino())
    try:
        for name in (b"a", b"b"):
            mover.transport.add_name(FOLDER, name)
        act(mover)
        staged = mover.pending()[0].ino
        (store.residency.memory.folder / "staged" / str(staged)).write_bytes(b"new")
    finally:
        mover.close()
        store.close()
    return store.residency.memory.folder.joinpath(*name_ring.PLACE)


def put_a(mover):
    """As a writer that replaces: the old one goes, the new one comes by another name."""
    mover.unlink(b"a")
    mover.answered()
    mover.rename(b".tmp", b"a")
    assert mover.answered()[0] == 0


async def test_moves_that_the_index_never_heard_of_are_done_after_a_crash(settings):
    await crash_after(settings, put_a)
    assert await names_and_a(settings) == ([b"a", b"b"], b"new")


async def test_moves_that_were_entered_come_once_more_and_change_nothing(settings):
    """The crash came between the commit and the ring's hearing of it."""
    ring = await crash_after(settings, put_a)
    unsettled = ring.read_bytes()
    store = Store(settings)
    numbered = bytes(store.ring.memory)
    store.close()
    ring.write_bytes(unsettled[: name_ring._HEAD.size] + numbered[name_ring._HEAD.size :])
    assert all(one.number for one in NameRing(ring.parent.parent).pending(4))
    assert await names_and_a(settings) == ([b"a", b"b"], b"new")


async def test_moves_that_had_begun_and_were_not_committed_are_done(settings):
    ring = await crash_after(settings, put_a)
    begun = NameRing(ring.parent.parent)
    begun.begin(begun.pending(4), [time.time_ns()] * 3)
    assert await names_and_a(settings) == ([b"a", b"b"], b"new")


async def test_a_move_whose_new_name_is_taken_is_told_and_hurts_nobody(settings, caplog):
    def act(mover):
        mover.transport.remove_name(FOLDER, b"b")  # as if the transport were wrong
        mover.rename(b".tmp", b"b")
        mover.answered()

    await crash_after(settings, act)
    assert (await names_and_a(settings))[0] == [b".tmp", b"a", b"b"]
    assert "moved just before a crash cannot be entered" in caplog.text


async def test_an_index_that_is_rebuilt_is_told_of_moves_by_the_ring(settings):
    ring = await crash_after(settings, put_a)
    unsettled = ring.read_bytes()
    settings.store.joinpath("index.db").unlink()
    rebuild(settings.store, settings.shm_dir, lambda *_: None)
    assert ring.read_bytes() == unsettled
    assert await names_and_a(settings) == ([b"a", b"b"], b"new")


# --- at a mount


def by_rename(path, data):
    tmp = path.with_name(f".{path.name}.tmp")
    tmp.write_bytes(data)
    tmp.rename(path)


def test_files_that_come_by_rename_do_not_wake_python(mount):
    mount.start()
    (mount.path / "d").mkdir()
    (mount.path / "d").stat()

    def put_all():
        for i in range(20):
            by_rename(mount.path / "d" / f"{i}", b"%d" % i)
            assert (mount.path / "d" / f"{i}").exists()

    put_all()
    for i in range(20):
        (mount.path / "d" / f"{i}").unlink()
    made_by_python = 20 if mount.status()["mode"] == "portable" else 0
    assert forwarded(mount, put_all) < made_by_python + 10  # of the 20 moves none
    assert sorted(int(name) for name in os.listdir(mount.path / "d")) == list(range(20))
    assert all((mount.path / "d" / f"{i}").read_bytes() == b"%d" % i for i in range(20))


def test_moves_outlive_the_worker_and_the_store(mount):
    mount.start()
    for turn in range(3):
        old = mount.status()["worker_pid"]
        for i in range(20):
            path = mount.path / f"{turn}.{i}"
            by_rename(path, b"%d.%d" % (turn, i))
            if i % 3 == 1:
                path.rename(mount.path / f"{turn}.{i}.again")
            if i % 3 == 2:
                path.unlink()
        mount.kill_worker()
        until(lambda old=old: mount.status()["worker_pid"] != old)
    expected = {f"{turn}.{i}" + (".again" if i % 3 else "") for turn in range(3) for i in range(20) if i % 3 < 2}
    for again in range(2):
        assert set(os.listdir(mount.path)) == expected
        for name in expected:
            assert (mount.path / name).read_bytes() == b"%s.%s" % tuple(part.encode() for part in name.split(".")[:2])
        if not again:
            mount.stop("--force")  # a namespace made meanwhile may hold a copy of the mount
            mount.start()
