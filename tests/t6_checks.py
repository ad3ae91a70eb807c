"""fsck, verify and rebuild-index as a user runs them, against real mounts."""

import errno
import json
import os
import sqlite3
import stat

import pytest
from conftest import cascadefs
from stores import flip


def place(mount, name):
    """(file, offset) of the record of a one-block file of an unmounted store."""
    db = sqlite3.connect(mount.store / "index.db")
    extent, offset = db.execute(
        "SELECT extent, offset FROM entries e JOIN inodes i ON i.ino=e.ino JOIN object_blocks o ON o.oid=i.oid "
        "JOIN blocks b ON b.bid=o.bid WHERE e.name=?",
        (name.encode(),),
    ).fetchone()
    db.close()
    return mount.store / f"extents/{extent:08d}.cfx", offset


def damage(mount, name):
    path, offset = place(mount, name)
    for bit in (0, 9):
        flip(path, (offset + 5000) * 8 + bit)


def fsck(mount, *options):
    done = cascadefs("fsck", mount.store, "--json", *options)
    assert not done.stderr, done.stderr
    told = json.loads(done.stdout)
    assert told["exit_code"] == done.returncode
    return done.returncode, told


def filled(mount):
    mount.start()
    contents = {f"f{i}": os.urandom(200_000 + i) for i in range(6)}
    for name, data in contents.items():
        (mount.path / name).write_bytes(data)
    (mount.path / "folder").mkdir()
    os.link(mount.path / "f5", mount.path / "folder/f5")
    os.symlink("folder", mount.path / "link")
    (mount.path / "empty").touch(0o600)
    os.utime(mount.path / "empty", ns=(1, 2))
    return contents


def test_a_damaged_file_is_eio_on_the_mount_and_the_others_are_not(mount):
    contents = filled(mount)
    mount.stop()
    mount.wipe_memory()
    damage(mount, "f2")
    mount.start()
    for name, data in contents.items():
        if name == "f2":
            with pytest.raises(OSError) as caught:
                (mount.path / name).read_bytes()
            assert caught.value.errno == errno.EIO
        else:
            assert (mount.path / name).read_bytes() == data
    assert mount.status()["damaged_blocks"] == 1 and mount.status()["corrupt_reads"] > 0
    assert "/f2" in (mount.store / "cascadefs.log").read_text()


def test_verify_and_fsck_heal_from_memory_and_name_what_they_cannot(one_mode):
    mount = one_mode
    filled(mount)
    done = cascadefs("fsck", mount.store)
    assert done.returncode == 1 and "in use" in done.stderr and len(done.stderr.splitlines()) == 1
    mount.stop()
    damage(mount, "f1")
    mount.start()
    done = cascadefs("verify", mount.path)
    assert done.returncode == 1 and "1 blocks healed, 0 damaged" in done.stdout, done.stdout + done.stderr
    assert cascadefs("verify", mount.path, "--json").returncode == 0
    mount.stop()
    assert fsck(mount)[0] == 0
    damage(mount, "f0")
    assert fsck(mount, "--repair")[0] == 1
    mount.wipe_memory()
    damage(mount, "f2")
    code, told = fsck(mount, "--repair")
    assert code == 2 and told["left"][0]["paths"] == ["/f2"]
    assert "hurts /f2" in cascadefs("verify", mount.store).stdout


def test_a_damaged_index_is_one_line_and_rebuilt_from_the_extents(one_mode):
    mount = one_mode
    contents = filled(mount)
    before = {p: os.lstat(mount.path / p) for p in [*contents, "folder", "folder/f5", "link", "empty"]}
    mount.stop()
    mount.wipe_memory()
    index = mount.store / "index.db"
    index.write_bytes(index.read_bytes()[:2048] + os.urandom(4096) + index.read_bytes()[6144:])
    kept = {p: p.read_bytes() for p in mount.store.rglob("*") if p.is_file()}
    done = cascadefs("mount", mount.path, "--store", mount.store)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "rebuild-index" in done.stderr
    assert {p: p.read_bytes() for p in mount.store.rglob("*") if p.is_file()} == kept
    done = cascadefs("rebuild-index", mount.store, "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and (told["files"], told["folders"], told["absent"]) == (8, 1, []), done.stdout + done.stderr
    assert fsck(mount)[0] == 0
    mount.start()
    for name, data in contents.items():
        assert (mount.path / name).read_bytes() == data
    for path, old in before.items():
        new = os.lstat(mount.path / path)
        names = ("st_ino", "st_mode", "st_uid", "st_gid", "st_nlink", "st_size", "st_mtime_ns", "st_ctime_ns")
        assert [getattr(new, n) for n in names] == [getattr(old, n) for n in names], path
    assert stat.S_ISLNK(os.lstat(mount.path / "link").st_mode) and not (mount.path / "lost+found").exists()


def test_what_is_no_store_is_one_line(tmp_path):
    for command in ("fsck", "verify", "rebuild-index"):
        done = cascadefs(command, tmp_path)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "store" in done.stderr, command
