"""`cascadefs list` and `drop`, and how long memory stays after umount."""

import json
import os
import shutil
import time

import pytest
from conftest import cascadefs

from cascadefs.tiers import owner


def listed():
    done = cascadefs("list", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def tier_at(folder):
    return next((tier for tier in listed()["tiers"] if tier["folder"] == str(folder)), None)


def test_what_is_mounted_kept_and_orphaned_is_listed_and_dropped(mount):
    mount.start()
    (mount.path / "f").write_bytes(b"x" * 100_000)
    told = listed()
    assert str(mount.path) in [each["mountpoint"] for each in told["mounts"]]
    assert str(mount.store) in [each["store"] for each in told["stores"]]
    assert tier_at(mount.memory)["state"] == "in use" and tier_at(mount.memory)["used_bytes"] >= 100_000
    assert "in use" in cascadefs("drop", mount.store).stderr
    mount.stop()
    kept = tier_at(mount.memory)
    assert kept["state"] == "kept" and kept["is_durable"] and 3000 < kept["until"] - time.time() <= 3600
    assert str(mount.memory) in cascadefs("list").stdout
    assert cascadefs("drop", mount.store).returncode == 0 and not mount.memory.exists()
    assert (mount.start().path / "f").read_bytes() == b"x" * 100_000


def test_orphans_go_and_what_is_not_durable_only_by_force(mount):
    mount.start("--seal", "flush")
    memory = mount.memory
    (mount.path / "f").write_bytes(b"x" * 1000)
    mount.kill()
    refused = cascadefs("drop", mount.store)
    assert refused.returncode == 1 and "not durable" in refused.stderr and memory.exists()
    try:
        mount.store.rename(mount.store.parent / "moved")
        assert tier_at(memory)["state"] == "orphan"
        assert "--force" in cascadefs("drop", "--orphans").stderr and memory.exists()
        (mount.store.parent / "moved").rename(mount.store)
        assert (mount.start().path / "f").read_bytes() == b"x" * 1000
        mount.stop()
        shutil.rmtree(mount.store)
        assert cascadefs("drop", "--orphans").returncode == 0
    finally:
        assert not memory.exists() or cascadefs("drop", "--orphans", "--force").returncode == 0
    assert not memory.exists()


def test_memory_goes_when_its_time_is_over_and_nobody_runs(mount):
    mount.start()
    (mount.path / "f").write_bytes(b"x" * 1000)
    memory = mount.memory
    mount.stop("--keep-memory", "2s")
    end = time.monotonic() + 60
    while memory.exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    assert (mount.start().path / "f").read_bytes() == b"x" * 1000


@pytest.mark.parametrize(("time_", "until"), [("boot", 0), ("0", None)])
def test_memory_stays_until_the_next_boot_or_goes_at_once(mount, time_, until):
    mount.start()
    (mount.path / "f").write_bytes(b"x" * 1000)
    memory = mount.memory
    mount.stop("--keep-memory", time_)
    assert memory.exists() == (until is not None)
    assert until is None or owner.read_owner(memory).until == until


def test_what_cannot_be_dropped_is_one_line(tmp_path):
    for words in ((), (tmp_path, "--orphans"), (tmp_path,)):
        done = cascadefs("drop", *words)
        assert done.returncode == 1 and done.stderr.startswith("cascadefs: ") and done.stderr.count("\n") == 1
    refused = cascadefs("config", "show", env={"CASCADEFS_KEEP_MEMORY": "for ever"})
    assert refused.returncode == 1 and "boot" in refused.stderr


def test_each_command_follows_the_name_of_a_store_as_the_kernel_does(mount, tmp_path, monkeypatch):
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/deep")
    (tmp_path / "named").symlink_to("real/store")
    monkeypatch.chdir(tmp_path)
    assert cascadefs("mount", mount.path, "--store", "link/../store", *mount.options).returncode == 0
    (mount.path / "f").write_bytes(b"x")
    assert cascadefs("umount", mount.path).returncode == 0
    assert os.path.exists("real/store/store.json") and not os.path.exists("store")
    for typed in ("link/../store", "named", "named/"):
        for command in ("fsck", "verify", "rebuild-index", "new-id"):
            done = cascadefs(command, typed)
            assert done.returncode == 0, (command, typed, done.stderr)
        assert cascadefs("drop", typed).returncode == 0
