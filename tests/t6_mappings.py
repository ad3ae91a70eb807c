"""Times of a file that is written to through a mapping, as tmpfs moves them: at the first store to a page, whoever asked
before; and that files which nobody can map are asked about once."""

import contextlib
import mmap
import os
import time

import pytest

# A page of the memory tier may be so large. Files of 8 MiB that are opened to be updated are served as in the portable mode.
PART, PARTS = 2 << 20, 3
ASKERS = {
    "stat": lambda path: os.stat(path),
    "listing": lambda path: [entry.stat() for entry in os.scandir(path.parent)],
    "chmod": lambda path: os.chmod(path, 0o640),
    "utimens": lambda path: os.utime(path, ns=(0, 0)),
    "link": lambda path: os.link(path, f"{path}.link"),
    "rename": lambda path: (os.rename(path, f"{path}.other"), os.rename(f"{path}.other", path)),
    "reader": lambda path: path.open("rb").close(),
}


@pytest.fixture
def mount(one_mode):
    one_mode.start()
    if one_mode.status()["mode"] != "passthrough":
        pytest.skip("the kernel tells of stores when it writes the pages")
    return one_mode


@contextlib.contextmanager
def mapped(path, flags=0):
    """(a mapping of its own, its descriptor)."""
    fd = os.open(path, os.O_RDWR | flags, 0o644)
    if os.fstat(fd).st_size == 0:
        for at in range(PARTS):
            os.pwrite(fd, bytes(PART), at * PART)
    with mmap.mmap(fd, PARTS * PART) as area:
        yield area, fd
    with contextlib.suppress(OSError):
        os.close(fd)


def times(state):
    return state.st_mtime_ns, state.st_ctime_ns


def moves(path, area, part, state=os.stat):
    """Whether a store to that part moves the times that `state` tells."""
    before = times(state(path))
    time.sleep(0.02)  # the kernel's clock has moved on
    area[part * PART] = 1  # without reading: that would map the page writable, and tmpfs hears of no store
    return all(a > b for a, b in zip(times(os.stat(path)), before, strict=True))


def settle(mount, path):
    mount.flush()
    assert os.getxattr(path, "user.cascade.tier")


@pytest.mark.parametrize("asker", ASKERS)
@pytest.mark.parametrize("kind", ["new", "old"])
def test_a_store_moves_the_times_whoever_asked_before(mount, asker, kind):
    path = mount.path / "file"
    if kind == "old":
        with mapped(path, os.O_CREAT):
            pass
        settle(mount, path)
    with mapped(path, os.O_CREAT if kind == "new" else 0) as (area, _):
        for part in range(2):
            if not (asker == "link" and part):
                ASKERS[asker](path)
            assert moves(path, area, part)


def test_who_has_asked_before_the_writer_came_sees_it(mount):
    path = mount.path / "file"
    with mapped(path, os.O_CREAT):
        pass
    settle(mount, path)
    with open(path, "rb") as reader:
        os.stat(path)
        with mapped(path) as (area, _):
            assert moves(path, area, 0)
            assert moves(reader.fileno(), area, 1, os.fstat)


@pytest.mark.parametrize("flags", [os.O_CREAT | os.O_SYNC, os.O_CREAT | os.O_EXCL, os.O_CREAT | os.O_TRUNC])
def test_of_each_kind_of_open(mount, flags):
    path = mount.path / "file"
    with mapped(path, flags) as (area, _):
        assert moves(path, area, 0) and moves(path, area, 1)


def test_a_nameless_file(mount):
    with mapped(mount.path, os.O_TMPFILE) as (area, fd):
        assert moves(fd, area, 0, os.fstat)


def test_a_mapping_that_outlives_its_handle(mount):
    path = mount.path / "file"
    with mapped(path, os.O_CREAT) as (area, fd):
        os.close(fd)
        time.sleep(0.1)  # a release is taken in within 10 ms
        assert moves(path, area, 0)
        time.sleep(0.5)  # sealing has looked at it, more than once
        assert moves(path, area, 1)


def test_a_mapping_that_outlives_a_worker(mount):
    path = mount.path / "file"
    with mapped(path, os.O_CREAT) as (area, fd):
        mount.kill_worker()
        os.stat(path)
        assert moves(path, area, 0)
        os.close(fd)
        mount.kill_worker()
        os.stat(path)
        assert moves(path, area, 1)


def asked(mount):
    return mount.status()["requests"]["getattr"]


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR])
def test_files_that_nobody_can_map_are_asked_about_once(mount, flags):
    """Also soon after a close, and while they are not sealed."""
    mount.stop()
    mount.start("--seal", "flush")
    for name in "abc":
        fd = os.open(mount.path / name, flags | os.O_CREAT, 0o644)
        os.write(fd, b"x" * 1000)
        os.close(fd)
    time.sleep(0.1)  # a release is taken in within 10 ms
    before = asked(mount)
    for _ in range(200):
        for name in "abc":
            os.stat(mount.path / name)
    assert asked(mount) - before < 100
