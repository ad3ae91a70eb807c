"""A disk that is full, and stays so: it is emptied through the mount, whatever was done before, and the store opens on it."""

import contextlib
import errno
import os
import shutil
import subprocess
import time

import pytest

from cascadefs.config import MIB
from cascadefs.media.reserve import PIECE_BYTES, SHARE, Reserve
from tests.conftest import MODES, Mount, cascadefs, mounted, need_root_and_fuse

SIZE_MIB = 24
pytestmark = pytest.mark.timeout(280)


@pytest.fixture(params=["tmpfs", "ext4"])
def disk(request, tmp_path):
    """A small filesystem of its own."""
    need_root_and_fuse()
    folder, image = tmp_path / "disk", tmp_path / "image"
    folder.mkdir()
    words = ("-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "cascadefs-test")
    if request.param == "ext4":
        if shutil.which("mkfs.ext4") is None or not os.path.exists("/dev/loop-control"):
            pytest.skip("mkfs.ext4 or loop devices are missing")
        image.touch()
        os.truncate(image, SIZE_MIB * MIB)
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
        words = ("-o", "loop", image)
    with mounted(*words, folder):
        yield folder


@pytest.fixture(params=MODES)
def small(request, disk, tmp_path):
    """A mount whose store is on that disk, started."""
    mount = Mount(disk, "--shm-size", "16MiB", *MODES[request.param])
    mount.path = tmp_path / "mnt"
    yield mount.start()
    mount.clean()


def take_the_rest(path):
    """Somebody else fills what is left of the disk, to the last block."""
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def fill(mount, first):
    """Files of 1 MB until there is no room; the number behind the last."""
    for number in range(first, first + 3 * SIZE_MIB):
        path = mount.path / str(number)
        try:
            path.write_bytes(os.urandom(1_000_000))
        except OSError as e:
            assert e.errno == errno.ENOSPC
            path.unlink(missing_ok=True)
            break
    cascadefs("flush", mount.path)
    return number


def names_in(mount):
    return sorted(mount.path.iterdir(), key=lambda path: int(path.name))


def wait_until(done, limit_s=60):
    """A watchdog, not a measure."""
    end = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def test_the_reserve_is_lent_piece_by_piece_and_comes_before_new_data(disk):
    reserve, made = Reserve(disk), disk / "made"
    assert reserve.fill() and reserve.held and reserve.bytes == reserve.wanted_bytes <= SIZE_MIB * MIB // SHARE
    take_the_rest(disk / "other")
    with pytest.raises(OSError, match="No space left"):
        made.write_bytes(bytes(PIECE_BYTES))
    reserve.lend(lambda: made.write_bytes(bytes(PIECE_BYTES * 3)))
    assert made.stat().st_size == PIECE_BYTES * 3 and reserve.bytes > reserve.wanted_bytes // 2
    take_the_rest(disk / "other")
    assert not reserve.fill() and not reserve.held
    made.unlink()
    os.truncate(disk / "other", MIB)
    assert reserve.fill() and reserve.held and (disk / "reserve").stat().st_blocks * 512 >= reserve.wanted_bytes
    assert Reserve(disk).held


def test_work_that_fits_nowhere_ends_with_the_reserve(disk):
    reserve = Reserve(disk)
    reserve.fill()
    take_the_rest(disk / "other")
    with pytest.raises(OSError, match="No space left"):
        reserve.lend(lambda: (disk / "large").write_bytes(bytes(SIZE_MIB * MIB)))
    assert reserve.bytes == 0


def test_it_can_be_emptied_again_and_again(small):
    number = 0
    for turn in range(3):
        number = fill(small, number)
        if turn % 2:
            take_the_rest(small.store.parent / "other")
        for path in names_in(small)[:8]:
            path.unlink()
        (small.store.parent / "other").unlink(missing_ok=True)
    take_the_rest(small.store.parent / "other")
    small.kill()
    small.start()
    for path in names_in(small):
        path.unlink()
    small.flush()
    (small.store.parent / "other").unlink()
    (small.path / "new").write_bytes(b"new" * MIB)
    small.flush()
    small.stop("--drop-memory")
    assert Reserve(small.store).held
    small.start()
    assert (small.path / "new").read_bytes() == b"new" * MIB


def test_truncating_and_renaming_over_free_space_too(small):
    fill(small, 0)
    take_the_rest(small.store.parent / "other")
    paths = names_in(small)
    for path in paths[: len(paths) // 2]:
        os.truncate(path, 0)
        assert path.stat().st_size == 0
    kept = paths[-1].read_bytes()
    for i, path in enumerate(paths[len(paths) // 2 :]):
        path.rename(paths[i])
    assert paths[len(paths) // 2 - 1 + len(paths) % 2].read_bytes() == kept
    for path in names_in(small):
        path.unlink()
    small.flush()


@pytest.mark.parametrize("disk", ["tmpfs"], indirect=True)
def test_a_store_opens_where_nothing_is_left_at_all(small):
    """Not even a reserve: somebody has taken that, too. What the WAL takes twice is all there is."""
    fill(small, 0)
    small.kill()
    (small.store / "reserve").unlink()
    take_the_rest(small.store.parent / "other")
    small.start()
    paths = names_in(small)
    assert len(paths[0].read_bytes()) == 1_000_000
    for path in paths:
        path.unlink()
    wait_until(lambda: cascadefs("flush", small.path).returncode == 0)
