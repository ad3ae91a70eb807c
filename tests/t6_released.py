"""Stores that earlier releases left behind, killed in the middle of their work (data/make_store.py made them)."""

import json
import shutil
import stat
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import cascadefs
from stores import move_in

DATA = Path(__file__).parent / "data"
sys.path.insert(0, str(DATA))
from make_store import described  # noqa: E402


@pytest.fixture(params=sorted(path.name for path in DATA.glob("*.tar.xz")))
def left(request, mount):
    """A mount's store as a release left it, not started, its memory beside it; what was told of its names."""
    base = mount.store.parent
    with tarfile.open(DATA / request.param) as archive:
        archive.extractall(base, filter="fully_trusted")
    return mount, base / "memory", json.loads((base / "expected.json").read_text())


def checked(mount):
    """Everything reads back, and fsck finds nothing."""
    for words in (("verify", mount.path), ("flush", mount.path), ("umount", "--drop-memory", mount.path)):
        done = cascadefs(*words)
        assert done.returncode == 0, done.stderr
    done = cascadefs("fsck", mount.store)
    assert done.returncode == 0, done.stdout + done.stderr


def files_of(names):
    """What does not depend on what else lies in a folder."""
    return {name: told for name, told in names.items() if not stat.S_ISDIR(told["mode"])}


def test_with_its_memory_everything_is_there(left):
    mount, memory, expected = left
    folder = Path(json.loads((mount.store / "memory.json").read_text())["folder"])
    shutil.move(memory, folder)
    move_in(mount.store, folder.parent)
    mount.start()
    assert described(mount.path) == expected["with memory"]
    checked(mount)


def test_without_its_memory_everything_durable_is_there(left):
    mount, _, expected = left
    mount.start()
    found, durable = files_of(described(mount.path)), files_of(expected["durable"])
    for name in durable.keys() & expected["with memory"].keys():
        assert found[name] == durable[name], name
    checked(mount)


def test_a_new_index_finds_what_was_durable(left):
    mount, _, expected = left
    for path in mount.store.glob("index.*"):
        path.unlink()
    done = cascadefs("rebuild-index", mount.store)
    assert done.returncode == 0, done.stdout + done.stderr
    mount.start()
    found, durable = files_of(described(mount.path)), files_of(expected["durable"])
    for name in durable.keys() & expected["with memory"].keys():
        assert found[name] == durable[name], name
    checked(mount)
