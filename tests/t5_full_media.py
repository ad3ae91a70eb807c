"""Full and failing media: a fault at the calls of the seam, in every tier.

TORTURE=1: at every call; else at a sample of them.
"""

import contextlib
import errno
import hashlib
import json
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest

from cascadefs.store import Store
from cascadefs.types import Home
from tests import faults
from tests.conftest import MODES, Mount, cascadefs, need_root_and_fuse
from tests.faults.control import DELAY, FAIL, Control, Fault
from tests.faults.media import FAULTS

LONG = bool(os.environ.get("TORTURE"))
EVERY = 1 if LONG else 23
PARTS = 2  # processes at a time
LIMIT_S = 1800 if LONG else 280  # watchdogs
pytestmark = pytest.mark.timeout(LIMIT_S + 20)
# Calls that the workload must make, or it proves nothing: every tier, and every way in which its calls can end.
MUST_MEET = {
    *("CREATE EXTENTS", "OPEN EXTENTS", "READ EXTENTS", "WRITE EXTENTS", "SYNC EXTENTS", "TRUNCATE EXTENTS", "PUNCH EXTENTS"),
    *("UNLINK EXTENTS", "CREATE PARKING", "WRITE PARKING", "LINK PARKING", "UNLINK PARKING", "READ PARKING", "OPEN PARKING"),
    *("CREATE MEMORY", "WRITE MEMORY", "READ MEMORY", "LINK MEMORY", "RENAME MEMORY", "UNLINK MEMORY"),
    *("CREATE INDEX", "READ INDEX", "WRITE INDEX", "SYNC INDEX", "TRUNCATE INDEX", "UNLINK INDEX"),
    *("CREATE IDENTITY", "WRITE IDENTITY", "SYNC IDENTITY", "RENAME IDENTITY", "MKDIR FOLDER", "SYNC FOLDER"),
}


def visited(in_memory, shim, name, part):
    folder = in_memory / f"{name}-{part}"
    folder.mkdir()
    Control(folder / "control")
    env = faults.environment(shim, folder / "b", control=folder / "control")
    text = faults.run("media", folder / "b", folder / "control", name, part, PARTS, EVERY, env=env, limit_s=LIMIT_S)
    return json.loads(text)


@pytest.mark.parametrize("name", FAULTS)
def test_at_every_call_the_errno_arrives_nothing_is_lost_and_it_recovers(in_memory, shim, name, capsys):
    with ThreadPoolExecutor(PARTS) as pool:
        results = list(pool.map(lambda part: visited(in_memory, shim, name, part), range(PARTS)))
    complaints = [complaint for result in results for complaint in result["complaints"]]
    with capsys.disabled():
        visited_sites = sum(result["visited"] for result in results)
        print(f"\n{name}: a fault at {visited_sites} of {results[0]['sites']} calls, {len(complaints)} complaints")
    assert not complaints, "\n".join(complaints)
    assert sum(result["met"] for result in results) == sum(result["visited"] for result in results) > 0
    if LONG:
        assert sum(result["visited"] for result in results) == results[0]["sites"] == results[1]["sites"]
    if name == "slow":
        assert set(results[0]["meets"]) >= MUST_MEET


# --- one copy that cannot be read


async def test_one_unreadable_copy_does_not_keep_others_from_the_cold_tier(settings):
    store = Store(settings)
    try:
        with mock.patch.object(store.residency, "home_for_new", lambda: Home.COLD):
            await store.put("bad", b"bad" * 5000)
        for i in range(5):
            await store.put(f"good{i}", bytes([i]) * 5000)
            assert await store.sealer.seal(store.find(f"good{i}").ino)
        assert await store.sealer.seal(store.find("bad").ino)
        (copy,) = (settings.store / "parking" / "objects").iterdir()
        kept = copy.read_bytes()
        os.truncate(copy, 100)  # reads end too early: EIO
        with pytest.raises(OSError, match="could not be flushed"):
            await store.flush()
        assert all(store.index.object(store.find(f"good{i}").oid).durable for i in range(5))
        with pytest.raises(OSError, match="cannot be read"):
            await store.mover.fsync(store.find("bad").ino)
        copy.write_bytes(kept)
        await store.flush()
        assert await store.get("bad") == kept
    finally:
        store.close()


# --- the background, and a real mount


FULL_AT_INDEX = Fault("index-full", FAIL, errno.ENOSPC, ("WRITE",), ("INDEX",), lasts=True)
COLD_FULL = Fault("cold-full", FAIL, errno.ENOSPC, ("WRITE",), ("EXTENTS",), lasts=True)
COLD_BROKEN = Fault("cold-broken", FAIL, errno.EIO, ("SYNC",), ("EXTENTS",), lasts=True)
SIZE_MIB = 64


def wait_until(done, limit_s=30):
    """A watchdog, not a measure."""
    end = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


@pytest.fixture
def faulty(request, shim, tmp_path):
    """(a mount whose daemon runs under the shim, its control)."""
    need_root_and_fuse()
    mode = MODES[getattr(request, "param", "passthrough")]
    mount, control = Mount(tmp_path, "--shm-size", "64MiB", *mode), Control(tmp_path / "control")
    env = faults.environment(shim, tmp_path, control=tmp_path / "control")
    done = cascadefs("mount", mount.path, "--store", mount.store, *mount.options, env=env)
    assert done.returncode == 0, done.stderr
    yield mount, control
    control.off()
    mount.clean()


def log_of(mount):
    return (mount.store / "cascadefs.log").read_text()


def error_of(work):
    with pytest.raises(OSError) as caught:
        work()
    return caught.value.errno


@pytest.mark.parametrize("faulty", MODES, indirect=True)
def test_an_index_without_space_refuses_changes_serves_reads_and_comes_back(faulty):
    mount, control = faulty
    (mount.path / "kept").write_bytes(b"kept" * 1000)
    mount.flush()
    control.arm(FULL_AT_INDEX, 0)
    assert error_of(lambda: (mount.path / "folder").mkdir()) == errno.ENOSPC
    wait_until(lambda: not mount.status()["spare_files"])  # none is made without asking the index from here on
    assert error_of(lambda: (mount.path / "new").write_bytes(b"x")) == errno.ENOSPC
    assert error_of(lambda: (mount.path / "kept").rename(mount.path / "moved")) == errno.ENOSPC
    assert (mount.path / "kept").read_bytes() == b"kept" * 1000
    assert sorted(path.name for path in mount.path.iterdir()) == ["kept"]
    assert "index" in mount.status()["trouble"][0] and "No space left" in mount.status()["trouble"][0]
    assert "No space left" in cascadefs("status", mount.path).stdout
    control.off()
    (mount.path / "new").write_bytes(b"new")
    (mount.path / "kept").rename(mount.path / "moved")
    mount.flush()
    assert mount.status()["trouble"] == []
    assert log_of(mount).count("changes are refused") == 1 and log_of(mount).count("index: works again") == 1
    mount.stop()
    mount.start()
    assert (mount.path / "moved").read_bytes() == b"kept" * 1000 and (mount.path / "new").read_bytes() == b"new"


def test_a_file_that_was_made_when_the_index_began_to_refuse_is_kept(faulty):
    """Its creation was acknowledged before anybody could know. Until the index takes it, no name is said to be absent."""
    mount, control = faulty
    (mount.path / "first").write_bytes(b"first")
    wait_until(lambda: mount.status()["spare_files"] > 100)
    control.arm(FULL_AT_INDEX, 0)
    (mount.path / "made").write_bytes(b"made")
    assert error_of(lambda: os.listdir(mount.path)) == errno.ENOSPC
    assert error_of(lambda: (mount.path / "folder").mkdir()) == errno.ENOSPC
    assert (mount.path / "first").read_bytes() == b"first"
    control.off()
    wait_until(lambda: mount.status()["trouble"] == [])
    assert sorted(os.listdir(mount.path)) == ["first", "made"] and (mount.path / "made").read_bytes() == b"made"
    mount.stop()
    mount.start()
    assert (mount.path / "made").read_bytes() == b"made"


@pytest.mark.parametrize("fault", [COLD_FULL, COLD_BROKEN], ids=lambda fault: fault.name)
def test_a_failing_cold_tier_is_tried_again_until_it_works(faulty, fault):
    mount, control = faulty
    control.arm(fault, 0)
    contents = {f"f{i}": os.urandom(1 << 20) for i in range(8)}
    for name, data in contents.items():
        (mount.path / name).write_bytes(data)
    wait_until(lambda: control.fired > 2)
    with (mount.path / "f0").open("rb+") as file:
        assert error_of(lambda: os.fsync(file.fileno())) == fault.error
    assert cascadefs("flush", mount.path).returncode == 1
    assert all((mount.path / name).read_bytes() == data for name, data in contents.items())
    assert any(line.startswith("cold tier: ") for line in mount.status()["trouble"])
    control.off()
    wait_until(lambda: mount.status()["pending_bytes"] == 0 and not mount.status()["trouble"])
    assert log_of(mount).count("cold tier: works again") == 1
    mount.stop("--drop-memory")
    mount.start()
    assert all((mount.path / name).read_bytes() == data for name, data in contents.items())


@pytest.fixture
def disk(tmp_path):
    """A filesystem of its own of SIZE_MIB."""
    need_root_and_fuse()
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "cascadefs-test", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def full_disk(disk, tmp_path):
    """A mount whose store is on that disk."""
    mount = Mount(disk, "--shm-size", "16MiB")
    mount.path = tmp_path / "mnt"
    yield mount.start()
    mount.clean()


def fill(folder):
    """Files of 1 MiB until the disk is full: name -> digest of those that were closed without an error."""
    kept = {}
    for i in range(4 * SIZE_MIB):
        data = os.urandom(1 << 20)
        try:
            with (folder / f"f{i}").open("wb") as file:
                file.write(data)
                os.fsync(file.fileno())
        except OSError as e:
            assert e.errno == errno.ENOSPC
            return kept
        kept[f"f{i}"] = hashlib.sha256(data).digest()
    raise AssertionError("the disk was never full")


def take_the_rest(path):
    """Somebody else fills what is left of the disk, to the last block."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_disk_that_is_really_full_can_be_emptied_and_goes_on(full_disk):
    mount = full_disk
    kept = fill(mount.path)
    assert len(kept) > SIZE_MIB // 4

    def intact():
        return all(hashlib.sha256((mount.path / name).read_bytes()).digest() == digest for name, digest in kept.items())

    assert intact()
    take_the_rest(mount.store.parent / "other")
    assert error_of(lambda: [(mount.path / f"folder{i}").mkdir() for i in range(5000)]) == errno.ENOSPC
    assert any(line.startswith("index: No space left") for line in mount.status()["trouble"])
    mount.kill()
    mount.start()  # a full disk opens, too
    assert intact()
    for name in list(kept)[: len(kept) // 2]:
        (mount.path / name).unlink()
        del kept[name]
    for path in mount.path.iterdir():
        if path.name not in kept:
            path.rmdir() if path.is_dir() else path.unlink()
    wait_until(lambda: cascadefs("flush", mount.path).returncode == 0)
    more = {f"more{i}": os.urandom(1 << 20) for i in range(8)}
    for name, data in more.items():
        (mount.path / name).write_bytes(data)
        kept[name] = hashlib.sha256(data).digest()
    mount.flush()
    assert intact() and mount.status()["trouble"] == []
    mount.stop("--drop-memory")
    mount.start()
    assert intact()


@pytest.mark.parametrize("tier", ["EXTENTS", "INDEX"])
@pytest.mark.parametrize("faulty", MODES, indirect=True)
def test_status_does_not_wait_for_a_flush_to_a_slow_disk(faulty, tier):
    mount, control = faulty
    with (mount.path / "f").open("wb", buffering=0) as file:  # open, so that only the flush writes it
        file.write(os.urandom(5 << 20))
        check_status_beside_a_slow_flush(mount, control, tier)


def check_status_beside_a_slow_flush(mount, control, tier):
    control.arm(Fault("slow", DELAY, 0, ("SYNC",), (tier,), lasts=True), 0, delay_us=4_000_000)
    fd = os.open(mount.path / ".cascade/flush", os.O_RDONLY)  # what `cascadefs flush` does
    flush = threading.Thread(target=os.fsync, args=(fd,))
    flush.start()
    try:
        wait_until(lambda: control.fired)
        assert mount.status()["files"] == 1 and "cascadefs_files 1" in (mount.path / ".cascade/metrics").read_text()
        assert flush.is_alive()
    finally:
        control.off()
        flush.join(60)
        os.close(fd)
