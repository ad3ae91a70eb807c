"""What the random walk, the races and the public judges found: each fault once more, by the shortest way to it."""

import contextlib
import os
import time

import pytest
from twin.calls import Area

SETTLE_S = 0.3  # sealing waits for 50 ms and a pause


def test_an_empty_file_with_a_reader_can_be_written_afterwards(mount):
    mount.start()
    (mount.path / "f").touch()
    with open(mount.path / "f", "rb") as reader:
        time.sleep(SETTLE_S)
        (mount.path / "f").write_bytes(b"seen by all")
        assert reader.read() == b"seen by all" and (mount.path / "f").read_bytes() == b"seen by all"


def test_a_synced_empty_file_outlives_memory(mount):
    mount.start()
    with open(mount.path / "f", "wb") as file:
        os.fsync(file.fileno())
        mount.kill()
        mount.wipe_memory()
    mount.start()
    assert (mount.path / "f").read_bytes() == b""
    (mount.path / "f").write_bytes(b"again")
    assert (mount.path / "f").read_bytes() == b"again"


def test_other_names_follow_a_writer_beside_readers_of_an_equal_file(mount):
    mount.start()
    for name in ("f", "equal"):
        (mount.path / name).write_bytes(b"1" * 10_000)
    os.link(mount.path / "f", mount.path / "second")
    mount.flush()
    assert (mount.path / "second").stat().st_size == 10_000
    with open(mount.path / "f", "rb"), open(mount.path / "equal", "rb"):
        (mount.path / "f").write_bytes(b"new")
        assert (mount.path / "second").read_bytes() == b"new"
        assert os.path.samefile(mount.path / "f", mount.path / "second")


def test_ctime_stays_when_an_mtime_of_the_future_is_replaced(mount):
    mount.start()
    file = mount.path / "f"
    file.write_bytes(b"1")
    os.utime(file, (1, 4_000_000_000))
    assert abs(file.stat().st_ctime - time.time()) < 60


@contextlib.contextmanager
def mapped(path):
    """A read-only mapping whose descriptor is closed: nobody can tell the daemon of it."""
    with open(path, "rb") as file:
        area = Area(file.fileno(), os.fstat(file.fileno()).st_size, writable=False)
    yield area
    area.close()


def test_a_mapping_of_an_equal_file_does_not_see_the_writes(mount):
    mount.start()
    for name in ("f", "equal"):
        (mount.path / name).write_bytes(b"1" * 10_000)
    mount.flush()
    with mapped(mount.path / "equal") as kept:
        with open(mount.path / "f", "r+b") as writer:
            writer.write(b"changed")
        assert kept.read(0, 10_000) == b"1" * 10_000
        assert (mount.path / "equal").read_bytes() == b"1" * 10_000
        assert (mount.path / "f").read_bytes()[:8] == b"changed1"


@pytest.mark.parametrize("mode", ["r+b", "wb"])
def test_a_mapping_sees_the_writes_to_its_file(mount, mode):
    mount.start()
    (mount.path / "f").write_bytes(b"1" * 10_000)
    mount.flush()
    with mapped(mount.path / "f") as kept:
        with open(mount.path / "f", mode) as writer:
            writer.write(b"changed" * 1000)
        assert kept.read(0, 7000) == b"changed" * 1000
