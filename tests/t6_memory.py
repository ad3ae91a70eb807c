"""Memory tiers as users meet them: stores that were copied, and mounted at once or in turn, also after a crash."""

import json
import os
import shutil
import time

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
        shutil.rmtree(mount.memory / name)


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


def wait_until(holds):
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
