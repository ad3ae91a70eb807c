"""Listings: the packing inside SQLite, judged byte by byte by a slow twin; the way past pyfuse3; what a mount shows of both."""

import errno
import os
import random
import select
import stat
import struct
import subprocess
import sys
import threading
import time

import pytest
from t5_transport import READDIR, TIMEOUT_S, Wire, io_body

from cascadefs.bench.ops import Statx
from cascadefs.ext import listing
from cascadefs.metadata.namespace import NO_BOUND, ROOT, Namespace
from cascadefs.metadata.sqlite import Database
from cascadefs.mount.fuse.attributes import BLOCK, FOLDER_BLOCK, SETTLED_S, STAGED_S
from cascadefs.mount.fuse.listings import BOUNDS_MAX, Bounds
from cascadefs.store import Store
from cascadefs.types import Home

OPENDIR, RELEASEDIR, FSYNCDIR, READDIRPLUS = 27, 29, 30, 44
ENTRY, ATTRIBUTES, DIRENT = struct.Struct("<4Q2I"), struct.Struct("<6Q10I"), struct.Struct("<2Q2I")  # linux/fuse.h
TIMES = (0, 1, -1, 10**9, -(10**9) - 7, 1_700_000_000_123_456_789, (1 << 63) - 1, -(1 << 63))
U64 = (1 << 64) - 1


def packed(cookie, name, inode):
    """The slow twin: one struct fuse_direntplus of an inode whose staged file was looked at."""
    times = [divmod(t, 10**9) for t in (inode.atime_ns, inode.mtime_ns, inode.ctime_ns)]
    seconds, rest = [s & U64 for s, _ in times], [r for _, r in times]
    block = FOLDER_BLOCK if stat.S_ISDIR(inode.mode) else BLOCK
    found = ENTRY.pack(inode.ino, 0, SETTLED_S, STAGED_S if inode.home else SETTLED_S, 0, 0)
    numbers = (inode.mode, inode.nlink, inode.uid, inode.gid, inode.rdev, block, 0)
    found += ATTRIBUTES.pack(inode.ino, inode.size, inode.blocks, *seconds, *rest, *numbers)
    found += DIRENT.pack(inode.ino, cookie + listing.DOTS, len(name), stat.S_IFMT(inode.mode) >> 12) + name
    return found + bytes(-len(found) % 8)


@pytest.fixture
def names(tmp_path):
    listing.offer()
    database = Database(tmp_path / "store")
    yield Namespace(database)
    database.close()


def fill(names, rng):
    """Rows of every kind with names of every length; the staged ones have files of random size in one of two folders."""
    kinds = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR)
    for length in range(1, 256):
        mode = rng.choice(kinds) | rng.randrange(0o10000)
        name = bytes(rng.choices([c for c in range(1, 256) if c != ord("/")], k=length))
        made = names.make(ROOT, name, mode, rng.randrange(1 << 32), rng.randrange(1 << 32))
        home = rng.choice(list(Home)) if stat.S_ISREG(mode) else Home.NONE
        times = {f"{t}time_ns": rng.choice(TIMES) for t in "amc"}
        size = rng.randrange(1 << 40)
        names.update(made.ino, nlink=rng.randrange(1 << 20), rdev=rng.randrange(1 << 32), home=home, **times)
        names.update(made.ino, size=size, blocks=size // 512)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_kernel_packs_what_its_twin_packs(names, seed):
    fill(names, random.Random(seed))
    rows = list(names.listing(ROOT, 0))
    for room in (512, 4096, 32 << 10, 128 << 10):
        after, found = 0, list[bytes]()
        while entries := names.packed_listing(listing.FUNCTION, ROOT, after, NO_BOUND, room, room // listing.ENTRY_BYTES):
            inodes, staged, end = listing.told(entries)
            part = rows[len(found) : len(found) + len(inodes)]
            assert staged == any(inode.home for _, _, inode in part)
            assert listing.renewed(entries, b"/nowhere", b"/nowhere") == b"".join(packed(*row) for row in part)
            assert [inode.ino for _, _, inode in part] == inodes
            nxt = rows[len(found) + len(part) :][:1]
            assert not nxt or len(entries) + len(packed(*nxt[0])) > room or len(part) == room // listing.ENTRY_BYTES
            assert end == part[-1][0] + listing.DOTS
            after, found = part[-1][0], found + part
        assert len(found) == len(rows)
    dot = names.packed(listing.FUNCTION, ROOT, b"..", 2 - listing.DOTS)
    assert dot == packed(0, b"..", names.get(ROOT))


def test_staged_files_are_looked_at_as_python_does(settings):
    listing.offer()
    store = Store(settings)
    try:
        rng, rows = random.Random(3), []
        fill(store.namespace, rng)
        for _, _, inode in store.namespace.listing(ROOT, 0):
            if inode.home and rng.random() < 0.8:  # without a file the row stands
                path = store.files.staged_path(inode)
                with open(path, "wb") as file:
                    file.truncate(rng.randrange(1 << 30))
                    file.write(b"data" * rng.randrange(3000))
                mtime = inode.mtime_ns if rng.random() < 0.3 else rng.randrange(1 << 60)
                os.utime(path, ns=(0, mtime))
        for cookie, name, inode in store.namespace.listing(ROOT, 0):
            rows.append(packed(cookie, name, store.files.with_staged(inode)))
        folders = [os.fsencode(t.staged_folder) for t in (store.residency.memory, store.residency.parking)]
        entries = store.namespace.packed_listing(listing.FUNCTION, ROOT, 0, NO_BOUND, 1 << 20, 1000)
        assert listing.renewed(entries, *folders) == b"".join(rows)
        with pytest.raises(NotADirectoryError):
            listing.renewed(entries, b"/dev/null", b"/dev/null")
    finally:
        store.close()


def test_entries_out_of_order_are_refused(names):
    columns = ", ".join("0" * 12)
    with pytest.raises(Exception, match="out of order"):
        names._db.execute(f"SELECT direntplus(4096, id, x'61', {columns}) FROM (SELECT 2 id UNION ALL SELECT 1)").fetchone()


NEVER_OFFERED = """
import pathlib, sys
from cascadefs.metadata.sqlite import Database
print(Database(pathlib.Path(sys.argv[1])).has_function("direntplus"))
"""


def test_it_is_known_whether_sqlite_has_the_function(names, tmp_path):
    """A Python may bring an SQLite of its own: then nothing that is offered arrives there."""
    assert names._database.has_function(listing.FUNCTION)
    command = [sys.executable, "-c", NEVER_OFFERED, tmp_path / "another"]
    assert subprocess.run(command, check=True, capture_output=True).stdout == b"False\n"


# --- the transport


@pytest.fixture
def wire():
    found = Wire()
    yield found
    found.close()


def ask(wire, opcode, body=b"", folder=ROOT, unique=8):
    wire.kernel.send(struct.pack("<IIQQIIIHH", 40 + len(body), opcode, unique, folder, 0, 0, 0, 0, 0) + body)


def next_listing(wire, wake_fd):
    assert select.select([wake_fd], [], [], TIMEOUT_S)[0]
    return wire.transport.next_listing()


def test_listings_wait_for_python_and_are_answered_past_pyfuse3(wire):
    ask(wire, READDIRPLUS, io_body(5, 0, 4096))
    assert wire.forwarded()[0] == READDIRPLUS  # nobody has said yet that they are taken
    wake_fd = wire.transport.take_listings()
    ask(wire, READDIRPLUS, io_body(5, 77, 1 << 20), folder=5, unique=10)
    assert next_listing(wire, wake_fd) == (10, 5, 5, 77, 128 << 10)
    assert wire.transport.next_listing() is None
    assert not select.select([wake_fd], [], [], 0)[0]
    entries = os.urandom(100_000)
    assert wire.transport.answer_listing(10, entries) and wire.answered() == (0, 10, entries)
    assert wire.transport.answer_listing(12, b"") and wire.answered() == (0, 12, b"")
    assert wire.transport.answer_listing(14, b"", errno.ESTALE) and wire.answered() == (-errno.ESTALE, 14, b"")


def test_what_python_does_not_take_goes_to_pyfuse3(wire):
    wake_fd = wire.transport.take_listings()
    for opcode, folder, unique in ((READDIRPLUS, 1 << 61, 8), (READDIRPLUS, ROOT, 1 << 63 | 8), (READDIR, ROOT, 8)):
        ask(wire, opcode, io_body(5, 0, 1 << 20), folder, unique)
        kind, body = wire.forwarded()
        assert kind == opcode and struct.unpack_from("<QQI", body) == (folder, 0, 128 << 10)
    for unique in range(256):
        ask(wire, READDIRPLUS, io_body(5, 0, 4096), unique=unique)
    ask(wire, READDIRPLUS, io_body(5, 1, 4096), unique=256)
    assert wire.forwarded() == (READDIRPLUS, io_body(ROOT, 1, 4096))
    assert [next_listing(wire, wake_fd)[0]] + [wire.transport.next_listing()[0] for _ in range(255)] == list(range(256))
    assert wire.transport.next_listing() is None


def test_folders_are_opened_and_closed_without_python(wire):
    ask(wire, OPENDIR, bytes(8))
    assert wire.forwarded()[0] == OPENDIR
    wire.transport.take_listings()
    ask(wire, OPENDIR, bytes(8), folder=9)
    code, unique, first = wire.answered()
    ask(wire, OPENDIR, bytes(8), folder=9)
    cached = 8  # FOPEN_CACHE_DIR
    assert (code, unique) == (0, 8) and first[8:] == struct.pack("<Ii", cached, 0)
    assert wire.answered()[2] == struct.pack("<QIi", struct.unpack_from("<Q", first)[0] + 1, cached, 0)
    ask(wire, FSYNCDIR, struct.pack("<QII", 5, 1, 0), folder=9)
    assert wire.forwarded() == (FSYNCDIR, struct.pack("<QII", 9, 1, 0))
    ask(wire, RELEASEDIR, bytes(24), folder=9)
    assert wire.answered() == (0, 8, b"")
    for opcode in (OPENDIR, RELEASEDIR):
        ask(wire, opcode, bytes(24), folder=1 << 61)
        assert wire.forwarded()[0] == opcode


def test_each_listing_has_an_end_of_its_own():
    newest = [7]
    bounds = Bounds(lambda: newest[0])
    assert bounds.is_new(1, 5) and bounds.of(1, 0) == 7
    newest[0] = 9
    assert not bounds.is_new(1, 5) and bounds.of(1, 5) == 7 and bounds.of(2, 5) == 9
    newest[0] = 11
    assert bounds.is_new(1, 0) and bounds.of(1, 0) == 11 and bounds.of(2, 6) == 9
    for handle in range(100, 100 + BOUNDS_MAX - 1):
        bounds.of(handle, 0)
    assert not bounds.is_new(2, 6) and bounds.is_new(1, 5) and bounds.of(2, 6) == 9


# --- on a mount


def requests(mount):
    return mount.status()["requests"]


def until(done, limit_s=20):
    """A watchdog, not a measure."""
    end = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def drop_caches():
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("2")


class AskedStat(Statx):
    """What the filesystem says, not what the kernel remembers: the numbers of a struct statx but for its own bookkeeping."""

    def of(self, path):
        assert self(os.fsencode(path))
        raw = bytes(self._answer)
        return raw[4:8], raw[16:56], raw[64:76], raw[80:92], raw[96:108], raw[112:124], raw[128:136]


class RememberedStat(AskedStat):
    def __call__(self, path):
        return not self._call(-100, path, 0x4100, 0x7FF, self._answer)  # AT_STATX_DONT_SYNC | AT_SYMLINK_NOFOLLOW


def make_kinds(folder):
    """One of each kind, sealed or not."""
    (folder / "sub").mkdir()
    (folder / "settled").write_bytes(b"s" * 70_000)
    os.symlink("target" * 9, folder / "link")
    os.mkfifo(folder / "fifo", 0o601)
    os.mknod(folder / "device", stat.S_IFCHR | 0o640, os.makedev(0x123, 0x45678))
    (folder / ("n" * 255)).touch()
    (folder / os.fsdecode(b"\xff\xfe %")).touch()
    (folder / "old").touch()
    os.utime(folder / "old", ns=(-1, -1_000_000_001))
    os.chown(folder / "fifo", 7, 8)
    os.link(folder / "settled", folder / "twice")


def test_what_a_listing_tells_is_what_getattr_tells(mount):
    mount.start()
    folder = mount.path / "d"
    folder.mkdir()
    make_kinds(folder)
    mount.flush()
    with open(folder / "writing", "wb", buffering=0) as writer:
        for size in (1, 4096, 100_000):
            writer.write(b"w" * size)
            drop_caches()
            names = os.listdir(folder)
            assert len(names) == 10
            told = {name: RememberedStat().of(folder / name) for name in names}
            asked = {name: AskedStat().of(folder / name) for name in names if name != "link"}
            del told["link"]
            assert told == asked
            assert os.lstat(folder / "link").st_size == 54 and os.stat(folder / "writing").st_size == writer.tell()


def test_stat_after_a_listing_asks_nobody(mount):
    mount.start()
    for i in range(500):
        (mount.path / f"{i:04d}").touch()
    mount.flush()
    drop_caches()
    before = requests(mount)
    with os.scandir(mount.path) as entries:
        inodes = {entry.inode(): entry.stat(follow_symlinks=False).st_ino for entry in entries}
    after = requests(mount)
    assert len(inodes) == 500 and all(listed == found for listed, found in inodes.items())
    assert after["readdirplus"] > before.get("readdirplus", 0)
    looking = 50  # what `cascadefs status` itself asks
    assert after["lookup"] - before["lookup"] < looking and after["getattr"] - before["getattr"] < looking
    assert after["forwarded"] - before["forwarded"] < looking


def names_of(i):
    return f"{i:04d}"


def append(path):
    with open(path, "ab", buffering=0) as file:
        file.write(b"more")


def move(path):
    path.rename(path.with_name(f"moved-{path.name}"))


def test_an_answer_made_ahead_tells_what_is_so_when_it_is_sent(mount):
    mount.start()
    for i in range(1200):
        (mount.path / names_of(i)).write_bytes(b"%d" % (i % 7) * 100)
    mount.flush()
    changed = [mount.path / names_of(i) for i in range(900, 1000)]
    with open(mount.path / names_of(1100), "wb", buffering=0) as writer:
        for change in (None, lambda path: path.chmod(0o600), append, move):
            with os.scandir(mount.path) as entries:
                next(entries)
                time.sleep(0.05)  # the first answer has 819 names; the second is made ahead meanwhile
                writer.write(b"grows" * 1000)
                for path in changed if change else ():
                    change(path)
                seen = {entry.name for entry in entries}
            assert os.stat(mount.path / names_of(1100)).st_size == writer.tell()
            if change is not move:
                assert all(RememberedStat().of(path)[1] == AskedStat().of(path)[1] for path in changed)
    assert {path.stat().st_mode & 0o777 for path in mount.path.glob("moved-*")} == {0o600}
    assert {path.stat().st_size for path in mount.path.glob("moved-*")} == {104}
    assert {f"moved-{path.name}" for path in changed} <= seen and not {path.name for path in changed} & seen


def test_what_was_listed_goes_when_it_is_removed(mount):
    mount.start()
    for i in range(300):
        (mount.path / f"{i:04d}").write_bytes(b"%d" % i * 100)
    mount.flush()
    until(lambda: mount.status()["tiers"]["shm"]["objects"] == 300)
    for _ in range(3):
        assert len(os.listdir(mount.path)) == 300
    drop_caches()
    assert len(os.listdir(mount.path)) == 300
    for i in range(300):
        (mount.path / f"{i:04d}").unlink()
    until(lambda: mount.status()["tiers"]["shm"]["objects"] == 0)  # an inode that is believed to be known would keep its object


def test_listings_are_complete_while_the_worker_dies(mount):
    mount.start()
    names = {f"{i:05d}-{'n' * (i % 200)}" for i in range(3000)}
    for name in names:
        (mount.path / name).touch()
    found, done = list[list[str]](), threading.Event()

    def list_all():
        while not done.is_set():
            found.append(os.listdir(mount.path))

    readers = [threading.Thread(target=list_all) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(2):
        old, seen = mount.kill_worker(), len(found)
        until(lambda old=old, seen=seen: mount.status()["worker_pid"] != old and len(found) > seen + 5)
    done.set()
    for reader in readers:
        reader.join(20)
        assert not reader.is_alive()
    assert all(len(listed) == 3000 and set(listed) == names for listed in found)
