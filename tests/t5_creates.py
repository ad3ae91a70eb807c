"""Files that the transport makes by itself: exact answers, exact records, and what becomes of the records after a crash."""

import errno
import os
import struct
import time

import pytest
from stores import opened
from t5_transport import CREATE, INIT, INIT_EXT, PASSTHROUGH2, Wire

from cascadefs.ext.fuse_transport import FOPEN_NOFLUSH, FOPEN_PASSTHROUGH, NAME_RING_BYTES, SPARES_AT_MOST
from cascadefs.formats import name_ring
from cascadefs.formats.name_ring import NameRing
from cascadefs.integrity import fsck
from cascadefs.integrity.rebuild import rebuild
from cascadefs.mount.fuse.attributes import NO_FILE_YET
from cascadefs.store import Store

GETATTR, OPEN = 3, 14
FOLDER, RESENT = 1, 1 << 63
TICK_NS = 20_000_000  # the kernel's clock of files stands still so long
ATTRIBUTES = struct.Struct("<6Q10I")  # struct fuse_attr


class Maker(Wire):
    """A transport with a ring; `offer` gives it spares as mount/fuse/spares.py does."""

    def __init__(self, folder):
        self.folder = folder
        self.ring = NameRing(folder)
        super().__init__(ring=self.ring.memory)
        self.ask(INIT, struct.pack("<IIIII", 7, 41, 131072, INIT_EXT, PASSTHROUGH2) + bytes(44))
        self.forwarded()
        self.reply(struct.pack("<IIIIHHIIHHII", 7, 31, 131072, 1, 12, 9, 1 << 24, 1, 256, 0, 0, 0) + bytes(24))
        self.answered()
        self.transport.names_are_complete()
        self.know_folder(0o40755, 0)
        self.files = {}

    def know_folder(self, mode, gid):
        folder = ATTRIBUTES.pack(FOLDER, 0, 0, 1, 1, 1, 0, 0, 0, mode, 2, 0, gid, 0, 4096, 0)
        self.transport.set_attributes(FOLDER, struct.pack("<QII", 3600, 0, 0) + folder)

    def ask_of(self, ino, opcode, body, unique=9):
        self.kernel.send(struct.pack("<IIQQIIIHH", 40 + len(body), opcode, unique, ino, 11, 12, 13, 0, 0) + body)

    def offer(self, ino):
        (self.folder / "staged").mkdir(exist_ok=True)
        path = self.folder / "staged" / str(ino)
        path.touch()
        self.files[ino] = os.open(path, os.O_RDONLY)
        self.transport.set_handle(ino + 1000, fd=self.files[ino], backing_id=ino + 2000, open_flags=FOPEN_NOFLUSH)
        self.transport.set_attributes(ino, NO_FILE_YET, self.files[ino])
        self.transport.grant(ino, self.files[ino], ino + 2000, FOPEN_NOFLUSH)
        return self.transport.add_spare(ino, ino + 1000, self.files[ino], ino + 2000)

    def create(self, name, mode=0o100666, umask=0o22, unique=8, extensions=0, access=os.O_WRONLY):
        body = struct.pack("<IIII", os.O_CREAT | access, mode, umask, 0) + name + b"\0"
        head = struct.pack("<IIQQIIIHH", 40 + len(body), CREATE, unique, FOLDER, 11, 12, 13, extensions, 0)
        self.kernel.send(head + body)

    def pending(self):
        return self.ring.pending(self.ring.put)

    def close(self):
        super().close()
        for fd in self.files.values():
            os.close(fd)


@pytest.fixture
def maker(tmp_path):
    found = Maker(tmp_path)
    yield found
    found.close()


@pytest.mark.parametrize(("access", "valid_s"), [(os.O_RDWR, 0), (os.O_WRONLY, 30)])
def test_attributes_of_what_may_be_mapped_are_for_no_time(maker, access, valid_s):
    maker.offer(70)
    maker.create(b"block", access=access)
    assert struct.unpack_from("<4Q", maker.answered()[2])[3] == valid_s
    (found,) = maker.pending()
    assert found.for_both == (access == os.O_RDWR) and found.name == b"block"
    maker.ask_of(70, GETATTR, bytes(16))
    assert struct.unpack_from("<Q", maker.answered()[2])[0] == valid_s


def test_the_layouts_of_reader_and_writer_agree():
    assert name_ring.RING_BYTES == NAME_RING_BYTES


def test_a_create_is_answered_with_a_spare_and_recorded(maker):
    maker.offer(70)
    before = time.time_ns()
    maker.create(b"block", unique=8)
    error, unique, body = maker.answered()
    assert (error, unique) == (0, 8)
    ino, generation, entry_s, attr_s, entry_ns, attr_ns = struct.unpack_from("<4Q2I", body)
    assert (ino, generation, entry_s, attr_s, entry_ns, attr_ns) == (70, 0, 3600, 30, 0, 0)
    (found,) = maker.pending()
    assert before <= found.time_ns <= time.time_ns()
    s, ns = divmod(found.time_ns, 10**9)
    modified_ns = os.fstat(maker.files[70]).st_mtime_ns
    assert found.time_ns - TICK_NS < modified_ns <= found.time_ns  # by the clock that a write will have
    expected = (70, 0, 0, s, modified_ns // 10**9, s, ns, modified_ns % 10**9, ns, 0o100644, 1, 11, 12, 0, 4096, 0)
    assert ATTRIBUTES.unpack_from(body, 40) == expected
    assert struct.unpack("<QIi", body[128:]) == (1070, FOPEN_PASSTHROUGH | FOPEN_NOFLUSH, 2070)
    record = (found.request, found.folder, found.ino, found.fh, found.mode, found.uid, found.gid, found.backing_id, found.name)
    assert record == (8, FOLDER, 70, 1070, 0o100644, 11, 12, 2070, b"block")
    maker.ask(GETATTR, bytes(16))  # the folder has changed at that time
    folder = ATTRIBUTES.unpack_from(maker.answered()[2], 16)
    assert (folder[4], folder[5], folder[7], folder[8]) == (s, s, ns, ns)


def test_a_new_file_is_opened_and_looked_at_without_python(maker):
    maker.transport.number_grants(500)
    maker.offer(70)
    maker.ask_of(70, GETATTR, bytes(16))  # nobody can know it yet
    assert maker.forwarded()[0] == GETATTR
    maker.create(b"block")
    made = ATTRIBUTES.unpack_from(maker.answered()[2], 40)
    maker.ask_of(70, OPEN, bytes(8))
    assert maker.answered() == (0, 9, struct.pack("<QIi", 500, FOPEN_PASSTHROUGH | FOPEN_NOFLUSH, 2070))
    path = maker.folder / "staged" / "70"
    for mtime_ns in (1_000_000_001, 2_000_000_000 * 10**9 + 5):  # before its creation: its time of change stays, and after
        path.write_bytes(b"x" * 5000)
        os.utime(path, ns=(1, mtime_ns))
        maker.ask_of(70, GETATTR, bytes(16))
        body = maker.answered()[2]
        s, ns = divmod(mtime_ns, 10**9)
        changed = (made[5], made[8]) if mtime_ns < maker.pending()[0].time_ns else (s, ns)
        expected = (70, 5000, path.stat().st_blocks, made[3], s, changed[0], made[6], ns, changed[1], *made[9:])
        assert struct.unpack_from("<QII", body) == (30, 0, 0)
        assert ATTRIBUTES.unpack_from(body, 16) == expected
    maker.transport.drop_attributes(70)
    maker.ask_of(70, GETATTR, bytes(16))
    assert maker.forwarded()[0] == GETATTR


def test_a_setgid_folder_gives_its_group(maker):
    maker.offer(70)
    maker.know_folder(0o42755, 99)
    maker.create(b"shared")
    maker.answered()
    assert maker.pending()[0].gid == 99


@pytest.mark.parametrize(
    ("name", "options"),
    [(b".cascade", {}), (b"known", {}), (b"n" * 256, {}), (b"x", {"unique": RESENT | 8}), (b"x", {"extensions": 1})],
    ids=["python's", "known", "too long", "sent again", "extensions"],
)
def test_what_is_not_plain_is_for_python(maker, name, options):
    maker.offer(70)
    maker.transport.add_name(FOLDER, b"known")
    maker.create(name, **options)
    assert maker.forwarded()[0] == CREATE
    assert not maker.pending()


def test_no_spare_and_no_known_folder_are_for_python(maker):
    maker.create(b"a")
    assert maker.forwarded()[0] == CREATE
    maker.offer(70)
    maker.transport.drop_attributes(FOLDER)
    maker.create(b"a")
    assert maker.forwarded()[0] == CREATE
    assert maker.transport.withdraw_spare() == 70 and maker.transport.withdraw_spare() == 0
    maker.know_folder(0o40755, 0)
    maker.create(b"a")  # the name is not taken by the tries before
    assert maker.forwarded()[0] == CREATE


def test_a_name_is_there_from_its_create_on(maker):
    maker.offer(70)
    maker.offer(71)
    maker.create(b"once")
    maker.answered()
    maker.create(b"once")
    assert maker.forwarded()[0] == CREATE
    assert [one.ino for one in maker.pending()] == [70]


def test_a_full_ring_gives_nothing_until_it_is_settled(maker):
    made = 0
    while made < name_ring.RECORDS:
        while maker.transport.add_spare(made + 1, made + 1, -1, 5) and made < name_ring.RECORDS:
            maker.create(b"f%d" % made)
            maker.answered()
            made += 1
    maker.create(b"one more")
    assert maker.forwarded()[0] == CREATE
    assert [one.name for one in maker.pending()] == [b"f%d" % i for i in range(name_ring.RECORDS)]
    maker.ring.settle(maker.ring.put)
    assert not maker.pending()
    maker.create(b"one more")
    maker.answered()
    assert [one.name for one in maker.pending()] == [b"one more"]


def test_spares_are_bounded(maker):
    assert all(maker.transport.add_spare(i, i, -1, 0) for i in range(1, SPARES_AT_MOST + 1))
    assert not maker.transport.add_spare(9999, 1, -1, 0)


def test_a_ring_that_makes_no_sense_is_begun_anew(tmp_path):
    ring = NameRing(tmp_path)
    ring.memory[8:24] = struct.pack("<QQ", 5, 6)
    assert NameRing(tmp_path).pending(0) == [] and name_ring.pending_changes(tmp_path) == []
    tmp_path.joinpath(*name_ring.PLACE).write_bytes(b"short")
    assert NameRing(tmp_path).put == 0
    ring = NameRing(tmp_path)
    ring.memory[8:16] = struct.pack("<Q", 1)  # a record of zeros: no name, no file
    assert ring.pending(1) == []


# --- after a crash


def crash_with(settings, *names):
    """A store whose process died when the kernel had been told of files that the index does not know; their inode numbers."""
    store = Store(settings)
    folder, inos = store.residency.memory.folder, [store.namespace.reserve_ino() for _ in names]
    maker = Maker(folder)
    try:
        for ino, name in zip(inos, names, strict=True):
            maker.offer(ino)
            maker.create(name)
            maker.answered()
            (folder / "staged" / str(ino)).write_bytes(b"content of " + name)
    finally:
        maker.close()
        store.close()
    return folder, inos


async def test_a_file_that_the_index_never_heard_of_is_there_after_a_crash(settings):
    folder, inos = crash_with(settings, b"a", b"b")
    assert [one.ino for one in name_ring.pending_changes(folder)] == inos
    store = Store(settings)
    try:
        assert [store.find(name).ino for name in ("a", "b")] == inos
        assert await store.get("b") == b"content of b"
        assert not store.ring.pending(store.ring.put)
        assert store.namespace.reserve_ino() > max(inos)
    finally:
        store.close()


@pytest.mark.parametrize("index", ["kept", "rebuilt"])
async def test_spares_are_no_lost_files_and_names_in_the_ring_come_back(settings, index):
    """Of a mount that was killed: files that the index never heard of, and files made ahead that nobody got."""
    folder, inos = crash_with(settings, b"a", b"b")
    for ino in range(max(inos) + 1, max(inos) + 100):
        (folder / "staged" / str(ino)).touch()
    notes = fsck.run(settings.store, settings.shm_dir, False, lambda *_: None).after.notes
    assert len(notes) == len(inos) + 1 and "99 empty files made ahead" in notes[-1], notes
    if index == "rebuilt":
        (settings.store / "index.db").unlink()
        assert rebuild(settings.store, settings.shm_dir, lambda *_: None).lost_and_found == 0
    store = Store(settings)
    try:
        assert await store.get("a") == b"content of a" and await store.get("b") == b"content of b"
        assert sorted(os.listdir(folder / "staged")) == sorted(map(str, inos)) and store.find("a").ino == inos[0]
        assert store.namespace.lookup(FOLDER, b"lost+found") is None
    finally:
        store.close()


async def test_a_file_in_the_ring_whose_name_is_taken_by_then_is_kept(settings):
    async with opened(settings) as store:
        await store.put("a", b"told")
        await store.flush()
    _, (ino,) = crash_with(settings, b"a")
    (settings.store / "index.db").unlink()
    assert rebuild(settings.store, settings.shm_dir, lambda *_: None).lost_and_found == 1
    store = Store(settings)
    try:
        assert await store.get("a") == b"told"
        assert await store.get(f"lost+found/inode-{ino}") == b"content of a"
    finally:
        store.close()


async def test_records_that_were_entered_already_are_left_alone(settings):
    folder, _ = crash_with(settings, b"a")
    before = folder.joinpath(*name_ring.PLACE).read_bytes()
    Store(settings).close()
    folder.joinpath(*name_ring.PLACE).write_bytes(before)  # the crash came before the ring heard of the commit
    store = Store(settings)
    try:
        assert await store.get("a") == b"content of a"
        assert store.namespace.entries() == 1
    finally:
        store.close()


async def test_a_name_that_is_taken_is_told_and_hurts_nobody(settings, caplog):
    folder, _ = crash_with(settings, b"a")
    before = folder.joinpath(*name_ring.PLACE).read_bytes()
    store = Store(settings)
    store.namespace.unlink(1, b"a")
    store.namespace.delete_inode(store.namespace.orphans()[0])
    await store.put("a", b"another")
    store.close()
    folder.joinpath(*name_ring.PLACE).write_bytes(before)
    store = Store(settings)
    try:
        assert "cannot be entered" in caplog.text and os.strerror(errno.EEXIST) in caplog.text
        assert await store.get("a") == b"another"
    finally:
        store.close()
