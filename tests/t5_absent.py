"""Names that are not there: the kernel keeps that, and knows of each that appears, however it does."""

import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import cascadefs
from t5_grants import until

MAKERS = {
    "created": lambda path, other: path.write_bytes(b"x"),
    "created exclusively": lambda path, other: os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR)),
    "folder": lambda path, other: path.mkdir(),
    "symlink": lambda path, other: path.symlink_to("nowhere"),
    "link": lambda path, other: os.link(other, path),
    "node": lambda path, other: os.mknod(path, stat.S_IFIFO | 0o600),
    "renamed": lambda path, other: other.rename(path),
    "copied": lambda path, other: shutil.copy(other, path),
}


@pytest.fixture
def mounted(mount):
    return mount.start()


def lookups(mount):
    return mount.status()["requests"].get("lookup", 0)


def is_there(path):
    return os.path.lexists(path)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_name_that_appears_is_seen_at_once(mounted, make):
    for name in ("plain", ".dot"):
        path, other = mounted.path / name, mounted.path / "other"
        other.write_bytes(b"other")
        for _ in range(3):
            assert not is_there(path) and name not in os.listdir(mounted.path)
            make(path, other)
            assert is_there(path) and name in os.listdir(mounted.path)
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            assert not is_there(path)
            other.write_bytes(b"other")


def test_the_kernel_does_not_ask_again_for_what_is_absent(mounted):
    names = [mounted.path / f"n{i}" for i in range(100)]
    until(lambda: not is_there(mounted.path / "first") and not is_there(mounted.path / "first"))
    assert not any(map(is_there, names))
    looking = -lookups(mounted) + lookups(mounted)
    before = lookups(mounted)
    assert not any(map(is_there, names))
    assert lookups(mounted) - before == looking
    names[7].touch()
    assert [path for path in names if is_there(path)] == [names[7]]


def test_what_appears_while_others_look_is_there_afterwards(mounted):
    def make(number):
        for i in range(300):
            path = mounted.path / f"{number}.{i}"
            assert not is_there(path)
            path.write_bytes(b"x") if i % 2 else os.mkdir(path)
            assert is_there(path)

    def look(number):
        for i in range(300):
            is_there(mounted.path / f"{number}.{i}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job: job[0](job[1]), [(make, 0), (look, 0), (make, 1), (look, 1)]))
    assert len(os.listdir(mounted.path)) == 600 and all(is_there(mounted.path / name) for name in os.listdir(mounted.path))


def test_names_appear_over_a_workers_death(mounted):
    names = [mounted.path / f"n{i}" for i in range(200)]
    for turn in range(3):
        assert not any(map(is_there, names[turn::3]))
        old = mounted.kill_worker() if turn else 0
        for path in names[turn::3]:
            path.write_bytes(b"x")
        until(lambda old=old: mounted.status()["worker_pid"] != old)
        assert all(map(is_there, names[turn::3]))
    assert cascadefs("flush", mounted.path).returncode == 0
    assert sorted(os.listdir(mounted.path)) == sorted(path.name for path in names)
