"""Opens that the transport answers by itself: exact answers, and what writers, eviction, unlink and a crash see of them."""

import errno
import mmap
import os
import struct
import time

import pytest
from conftest import Mount, need_root_and_fuse
from stores import opened
from t5_creates import Maker
from t5_transport import OPEN

from cascadefs.ext.fuse_transport import FOPEN_NOFLUSH, FOPEN_PASSTHROUGH
from cascadefs.mount.fuse.delegations import Grants
from cascadefs.mount.fuse.handles import Handles
from cascadefs.mount.fuse.handover import Table

FOLDER, RELEASE, RESENT = 1, 18, 1 << 63  # Wire asks about inode 1


@pytest.fixture
def wire(tmp_path):
    found = Maker(tmp_path)
    found.transport.number_grants(500)
    yield found
    found.close()


def ask_open(wire, flags=os.O_RDONLY, unique=8):
    wire.ask(OPEN, struct.pack("<II", flags, 0), unique)


def events(wire):
    return wire.transport.take_events(wire.transport.events_put())


def test_an_open_is_answered_by_its_grant_until_that_is_revoked(wire):
    ask_open(wire)
    assert wire.forwarded()[0] == OPEN
    wire.transport.grant(FOLDER, -1, 77, FOPEN_NOFLUSH)
    for fh in (500, 501):
        ask_open(wire, unique=fh)
        answer = struct.pack("<QIi", fh, FOPEN_PASSTHROUGH | FOPEN_NOFLUSH, 77)
        assert wire.answered() == (0, fh, answer)
    wire.ask(RELEASE, struct.pack("<QIIQ", 500, 0, 0, 0))
    assert wire.answered() == (0, 7, b"")
    wire.transport.revoke(FOLDER)
    assert events(wire) == ([(500, FOLDER, 500, 77), (501, FOLDER, 501, 77)], [500], [])
    ask_open(wire)
    assert wire.forwarded()[0] == OPEN


@pytest.mark.parametrize(
    ("flags", "unique"), [(os.O_WRONLY, 8), (os.O_RDWR, 8), (os.O_RDONLY | os.O_TRUNC, 8), (os.O_RDONLY, RESENT | 8)]
)
def test_what_changes_content_or_comes_again_is_for_python(wire, flags, unique):
    wire.transport.grant(FOLDER, -1, 77, 0)
    ask_open(wire, flags, unique)
    assert wire.forwarded()[0] == OPEN
    assert events(wire) == ([], [], [])


# --- on a mount


@pytest.fixture
def mounted(tmp_path):
    need_root_and_fuse()
    mount = Mount(tmp_path, "--shm-size", "64MiB").start()
    if mount.status()["mode"] != "passthrough":
        mount.clean()
        pytest.skip("no passthrough here")
    yield mount
    mount.clean()


def until(done, limit_s=20):
    """A watchdog, not a measure."""
    end = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def settled(mount, files):
    """Write `files`, wait until the transport opens each by itself."""
    for name, data in files.items():
        (mount.path / name).write_bytes(data)
    until(lambda: mount.status()["granted_opens"] >= len(files))


def forwarded(mount, work):
    """How many requests Python saw while `work` was done, beyond those of looking."""

    def count():
        found = mount.status()["requests"]["forwarded"]
        time.sleep(0.1)  # the RELEASE of looking comes behind it, and belongs to it
        return found

    first = count()
    looking = count() - first
    before = count()
    work()
    return count() - before - looking


def test_readers_of_settled_files_do_not_wake_python(mounted):
    data = {f"f{i}": os.urandom(10_000) for i in range(20)}
    settled(mounted, data)
    found = {}

    def read_all():
        for name in data:
            found[name] = (mounted.path / name).read_bytes()

    assert forwarded(mounted, read_all) <= 0
    assert found == data


def test_handles_that_come_and_go_leave_nothing(mounted):
    settled(mounted, {"f": b"a" * 8192})
    for _ in range(2000):
        os.close(os.open(mounted.path / "f", os.O_RDONLY))
    with open(mounted.path / "f", "rb"):
        until(lambda: (told := mounted.status())["requests"]["known_handles"] == told["spare_files"] + 1)


def test_a_reader_by_a_grant_sees_the_writes_to_its_file(mounted):
    settled(mounted, {"f": b"a" * 8192})
    with open(mounted.path / "f", "rb", buffering=0) as reader, open(mounted.path / "f", "r+b", buffering=0) as writer:
        assert reader.read(4) == b"aaaa"
        writer.write(b"bbbb")
        assert os.pread(reader.fileno(), 8, 0) == b"bbbbaaaa"
    assert (mounted.path / "f").read_bytes()[:8] == b"bbbbaaaa"


@pytest.mark.parametrize(("changed", "kept"), ["ab", "ba"])
def test_of_equal_files_one_has_a_grant_and_both_stay_what_they_are(mounted, changed, kept):
    settled(mounted, {"a": b"same" * 4096})
    (mounted.path / "b").write_bytes(b"same" * 4096)
    until(lambda: mounted.status()["pending_bytes"] == 0)
    assert mounted.status()["granted_opens"] == 1
    for name in "abab":
        assert (mounted.path / name).read_bytes() == b"same" * 4096
        until(lambda: mounted.status()["granted_opens"] == 1)
    reader, other = os.open(mounted.path / kept, os.O_RDONLY), os.open(mounted.path / changed, os.O_RDONLY)
    with mmap.mmap(reader, 0, prot=mmap.PROT_READ) as mapped, mmap.mmap(other, 0, prot=mmap.PROT_READ) as seen:
        with open(mounted.path / changed, "r+b", buffering=0) as writer:
            writer.write(b"else")
            assert os.fstat(writer.fileno()).st_ino == os.fstat(other).st_ino
        assert seen[:8] == b"elsesame" and os.pread(other, 8, 0) == b"elsesame"
        os.truncate(mounted.path / changed, 4)
        assert os.pread(reader, 1 << 20, 0) == b"same" * 4096 and mapped[:] == b"same" * 4096 and seen[:4] == b"else"
    os.close(reader)
    os.close(other)
    assert (mounted.path / changed).read_bytes() == b"else" and (mounted.path / kept).read_bytes() == b"same" * 4096


def test_an_unlinked_file_gives_its_memory_back(mounted):
    settled(mounted, {f"f{i}": os.urandom(1 << 20) for i in range(8)})
    mounted.flush()  # on a busy machine they may have their grants and not be sealed yet
    reader = os.open(mounted.path / "f0", os.O_RDONLY)
    for i in range(8):
        (mounted.path / f"f{i}").unlink()
    until(lambda: mounted.status()["tiers"]["shm"]["objects"] == 1)
    assert len(os.pread(reader, 1 << 20, 0)) == 1 << 20
    os.close(reader)
    until(lambda: mounted.status()["tiers"]["shm"]["objects"] == 0)
    assert mounted.status()["granted_opens"] == 0


def test_granted_files_are_evicted_when_memory_is_short(mounted):
    data = {f"f{i:03d}": os.urandom(1 << 20) for i in range(40)}
    settled(mounted, data)
    more = {f"g{i:03d}": os.urandom(1 << 20) for i in range(120)}
    for name, content in more.items():
        (mounted.path / name).write_bytes(content)
    mounted.flush()
    until(lambda: mounted.status()["tiers"]["shm"]["used_bytes"] < 64 << 20)
    assert all((mounted.path / name).read_bytes() == content for name, content in (data | more).items())


def test_handles_of_grants_outlive_the_worker(mounted):
    settled(mounted, {f"f{i}": bytes([100 + i]) * 5000 for i in range(10)})
    old, readers = mounted.kill_worker(), list[tuple[int, int]]()
    until(lambda: mounted.status()["worker_pid"] != old)
    settled(mounted, {f"g{i}": bytes([i]) * 5000 for i in range(10)})
    for _ in range(3):
        readers += [(i, os.open(mounted.path / f"g{i}", os.O_RDONLY)) for i in range(10)]
        old = mounted.kill_worker()  # what the transport answered last has not been read of
        until(lambda old=old: mounted.status()["worker_pid"] != old)
        with open(mounted.path / "g3", "r+b", buffering=0) as writer:
            writer.write(b"new")
        for i, fd in readers:
            assert os.pread(fd, 5000, 0) == (b"new" + bytes([3]) * 4997 if i == 3 else bytes([i]) * 5000)
        until(lambda: mounted.status()["pending_bytes"] == 0)
    for _, fd in readers:
        os.close(fd)
    (mounted.path / "g3").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        os.stat(mounted.path / "g3")
    assert caught.value.errno == errno.ENOENT


async def test_a_grant_that_is_in_the_way_of_a_change_comes_when_that_is_over(settings, wire):
    async with opened(settings) as store:
        grants = Grants(store, Handles(store, wire.transport, Table.make(), False, False), lambda: None)
        await store.put("f", b"x" * 8192)
        await store.flush()
        ino = store.find("f").ino
        grants.want(ino)
        with grants.held_back(ino):
            grants.give_wanted()
        live = store.files.of(ino)
        await live.acquire()
        grants.give_wanted()
        assert grants.count == 0
        live.lock.release()
        grants.give_wanted()
        assert grants.count == 1
        grants.end_all()
