"""Memory tiers as users meet them: stores that were copied, and mounted at once or in turn, also after a crash."""

import fcntl
import json
import mmap
import os
import shutil
import subprocess
import time
from functools import partial

import pytest
from conftest import MODES, Mount, cascadefs, need_root_and_fuse


@pytest.fixture(params=list(MODES))
def two(request, tmp_path):
    """A mount, and that of a copy of its store, which the test makes; neither started."""
    need_root_and_fuse()
    both = [Mount(tmp_path / name, "--shm-size", "64MiB", *MODES[request.param]) for name in ("one", "other")]
    for mount in both:
        mount.store.parent.mkdir()
    yield both
    for mount in both:
        mount.clean()


def copy(one, other):
    shutil.copytree(one.store, other.store)


def test_a_store_and_its_copy_are_mounted_at_once(two):
    one, other = two
    one.start().stop()
    copy(one, other)
    for mount, text in ((one, "of one"), (other, "of the other")):
        mount.start()
        (mount.path / "f").write_text(text)
    for mount, text in ((one, "of one"), (other, "of the other")):
        mount.flush()
        assert (mount.path / "f").read_text() == text
    assert one.status()["copy_id"] != other.status()["copy_id"]
    for mount in two:
        mount.kill()
    for mount, text in ((other, "of the other"), (one, "of one")):
        assert (mount.start().path / "f").read_text() == text


def test_a_copy_made_of_a_live_store_takes_nothing_from_its_crashed_original(two):
    one, other = two
    one.start("--seal", "flush")
    (one.path / "closed").write_text("only in memory")
    copy(one, other)
    one.kill()
    told = cascadefs("mount", other.path, "--store", other.store, *other.options)
    assert told.returncode == 0 and "is a copy of another store" in told.stdout, told
    assert other.status()["memory_folder"] != str(one.memory)
    (other.path / "closed").write_text("of the other")
    other.stop("--drop-memory")
    assert (one.start().path / "closed").read_text() == "only in memory"


def test_a_copy_can_be_told_to_be_a_store_of_its_own(two):
    one, other = two
    one.start().stop()
    copy(one, other)
    before = json.loads((other.store / "memory.json").read_text())["copy_id"]
    done = cascadefs("new-id", other.store)
    assert done.returncode == 0 and done.stdout, done
    assert json.loads((other.store / "memory.json").read_text())["copy_id"] != before
    assert "is a copy of" not in cascadefs("mount", other.path, "--store", other.store, *other.options).stdout
    refused = cascadefs("new-id", other.store)
    assert refused.returncode == 1 and "in use by a live mount" in refused.stderr
    assert cascadefs("new-id", other.path).stderr.startswith("cascadefs: ")


def empty(mount):
    for name in os.listdir(mount.memory):
        while (mount.memory / name).exists():  # new files come meanwhile
            shutil.rmtree(mount.memory / name, ignore_errors=True)


def test_a_tier_that_somebody_empties_is_noticed_and_made_anew(mount):
    mount.start()
    (mount.path / "durable").write_text("of before")
    mount.flush()
    (mount.path / "closed").write_text("only in memory")
    with open(mount.path / "open", "w") as file:
        file.write("first, ")
        file.flush()
        empty(mount)
        (mount.path / "next").write_text("made before it is noticed")
        file.write("then")
    wait_until(lambda: mount.status()["memory_notes"])
    assert "emptied by somebody else" in mount.status()["memory_notes"][0]
    mount.flush()
    assert (mount.path / "open").read_text() == "first, then"
    assert (mount.path / "durable").read_text() == "of before"
    assert (mount.path / "next").read_text() == "made before it is noticed"
    (mount.path / "after").write_text("goes on")
    mount.kill_worker()
    assert (mount.path / "after").read_text() == "goes on"
    mount.stop()
    assert {path.name for path in mount.start().path.iterdir()} - {"closed"} == {"after", "durable", "next", "open"}


def umount(mount):
    subprocess.run(["umount", "-l", mount.memory], check=True)


@pytest.mark.parametrize("emptied", [empty, umount])
def test_what_is_open_then_outlives_the_worker_too(mount, emptied):
    """Written before and after, by descriptor and mapping; synced, closed, and still open when it dies, and dies again."""
    mount.start("--seal", "flush")
    make = partial(open, mode="w+b", buffering=0)
    files = {name: make(mount.path / name) for name in ("synced", "closed", "open", "mapped")}
    expected = dict.fromkeys(files, b"before, " * 1000)
    for name, file in files.items():
        file.write(expected[name])
    emptied(mount)
    wait_until(lambda: mount.status()["memory_notes"] or (mount.memory / "staged").exists())
    (mount.path / "notice").write_bytes(b"x" * 1000)
    mount.flush()
    for turn in range(2):
        for name, file in files.items():
            if not file.closed and name != "mapped":
                file.write(b"after, " * 1000)
                expected[name] += b"after, " * 1000
        with mmap.mmap(files["mapped"].fileno(), len(expected["mapped"])) as area:
            area[turn] = ord("M")
        expected["mapped"] = b"M" * (turn + 1) + expected["mapped"][turn + 1 :]
        os.fsync(files["synced"].fileno())
        files["closed"].close()
        before = mount.kill_worker()
        wait_until(lambda before=before: mount.status()["worker_pid"] != before)
        assert {name: (mount.path / name).read_bytes() for name in files} == expected
    other = os.open(mount.memory, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)
    done = cascadefs("upgrade", mount.path)
    assert done.returncode == 0, done.stderr
    assert {name: (mount.path / name).read_bytes() for name in files} == expected
    for file in files.values():
        file.close()
    mount.flush()
    mount.kill()
    mount.start()
    assert {name: (mount.path / name).read_bytes() for name in files} == expected


@pytest.mark.parametrize("emptied", [empty, umount])
def test_the_keeper_has_the_lock_of_the_new_tier(one_mode, emptied):
    """Whoever asks while there is no worker finds it taken."""
    one_mode.start()
    emptied(one_mode)
    (one_mode.path / "notice").write_bytes(b"x" * 1000)
    one_mode.flush()
    status = one_mode.status()
    folder = os.stat(one_mode.memory)

    def is_held():
        held = (os.stat(f"/proc/{status['keeper_pid']}/fd/{fd}") for fd in os.listdir(f"/proc/{status['keeper_pid']}/fd"))
        return any(os.path.samestat(folder, found) for found in held)

    wait_until(is_held)


@pytest.mark.parametrize("emptied", [empty, umount])
def test_programs_see_durable_files_and_make_new_ones_right_after_it_was_emptied(mount, emptied):
    """ENOENT would tell a cache that it has no such key. Each thing in turn is the first to meet it."""
    mount.start("--seal", "flush")
    names = [f"durable{i}" for i in range(4)]
    for name in names:
        (mount.path / name).write_bytes(name.encode() * 5000)
    first = [
        lambda: [(mount.path / name).read_bytes() for name in names],
        lambda: (mount.path / f"new{turn}").write_bytes(b"new"),
        lambda: os.truncate(mount.path / names[0], len(names[0]) * 5000),
        lambda: (mount.path / names[1]).open("ab").close(),
        lambda: os.pwrite((file := (mount.path / names[2]).open("r+b", buffering=0)).fileno(), b"d", 0) and file.close(),
    ]
    for turn in range(2 * len(first)):
        mount.flush()
        wait_until((mount.memory / "staged").exists)
        emptied(mount)
        for work in first[turn % len(first) :] + first[: turn % len(first)]:
            work()
        assert [(mount.path / name).read_bytes() for name in names] == [name.encode() * 5000 for name in names]
        assert (mount.path / f"new{turn}").read_bytes() == b"new"


def wait_until(holds):
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
