"""mount(8), /etc/fstab and what `make install` puts where they look."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import cascadefs, need_root_and_fuse

from cascadefs.mount import mountinfo

HELPER = [sys.executable, "-c", "from cascadefs.mount.cli import mount_helper; mount_helper()"]
FSTAB = "nofail,relatime,x-systemd.automount,comment=mine,_netdev,noexec,shm_size=64MiB"


def helper(*words):
    environ = {k: v for k, v in os.environ.items() if not k.startswith("CASCADEFS_")}
    return subprocess.run([*HELPER, *map(str, words)], env=environ, capture_output=True, text=True, timeout=60, check=False)


def options_of(path):
    (line,) = [m for m in Path("/proc/self/mounts").read_text().splitlines() if m.split()[1] == str(path)]
    return line.split()[3].split(",")


@pytest.fixture
def one(mount):
    if mount.options[2:]:
        pytest.skip("the same in both modes")
    return mount


def test_options_of_fstab_and_the_store_as_source(one):
    done = helper(one.store, one.path, "-n", "-o", FSTAB)
    assert done.returncode == 0, done.stderr
    (found,) = [m for m in mountinfo.ours() if m.path == one.path]
    assert found.source == str(one.store)
    assert "noexec" in options_of(one.path) and one.status()["tiers"]["shm"]["capacity_bytes"] == 64 << 20


def test_remount_changes_flags_and_refuses_settings(one):
    assert helper(one.store, one.path, "-o", FSTAB).returncode == 0
    assert helper(one.store, one.path, "-o", f"remount,ro,{FSTAB}").returncode == 0
    with pytest.raises(OSError, match="Read-only"):
        (one.path / "f").touch()
    done = helper(one.store, one.path, "-o", "remount,rw,nofail,shm_size=128MiB")
    assert done.returncode == 32 and "cannot be changed" in done.stderr
    assert helper(one.store, one.path, "-o", "remount,rw").returncode == 0
    (one.path / "f").touch()


def test_mount_fuse_remounts_without_our_helper(one):
    """mount(8) finds mount.fuse3 then, which calls the command by its name."""
    one.start()
    known = "user_id=0,group_id=0,default_permissions,allow_other"
    for asked in ("ro", "rw"):
        done = cascadefs(one.store, one.path, "-o", f"{asked},relatime,remount,{known}")
        assert done.returncode == 0 and asked in options_of(one.path), done.stderr
    done = cascadefs(one.store, one.path, "-o", "remount,shm_size=128MiB")
    assert done.returncode == 32 and "cannot be changed" in done.stderr and len(done.stderr.splitlines()) == 1
    assert cascadefs("no-command", "-o", "ro").returncode == 2


def test_what_the_helper_refuses_and_how(one):
    for words, code, told in (
        (["-o", "bogus"], 1, "bogus"),
        (["-o", "bogus", "-f"], 1, "bogus"),
        (["-o", "shm_size=1"], 32, "out of bounds"),
        (["-f"], 0, ""),
        (["-o", "nofail,shm_size=1"], 32, "out of bounds"),
    ):
        done = helper(one.store, one.path, *words)
        assert done.returncode == code and told in done.stderr and len(done.stderr.splitlines()) == bool(told), words
    assert not one.store.exists() and not one.path.exists()
    assert helper(one.store, one.path, "-s", "-r", "-o", "bogus,shm_size=64MiB").returncode == 0
    assert "ro" in options_of(one.path)


def test_nofail_forgives_that_the_disk_of_the_store_is_not_there_and_nothing_else(one, tmp_path):
    for store, code, told in (
        (tmp_path / "no-disk/store", 0, "is missing"),
        (tmp_path / "file/store", 0, "is missing"),
        (tmp_path / "file", 32, "is not a folder"),
        (tmp_path / "full", 32, "not a cascadefs store"),
        (tmp_path, 32, "lies in the store"),
    ):
        (tmp_path / "file").touch()
        (tmp_path / "full").mkdir(exist_ok=True)
        (tmp_path / "full/of-others").touch()
        done = helper(store, one.path, "-o", "nofail,shm_size=64MiB")
        assert done.returncode == code and told in done.stderr and len(done.stderr.splitlines()) == 1, (store, done)
        assert helper(store, one.path, "-o", "shm_size=64MiB").returncode == 32
    assert helper(tmp_path / "no-disk/store", one.path, "-o", "remount,nofail").returncode == 32
    one.start()
    again = helper(one.store, tmp_path / "other", "-o", "nofail,shm_size=64MiB")
    assert again.returncode == 32 and "in use" in again.stderr


def test_any_name_of_a_store_is_told_as_source(one, tmp_path):
    one.store = tmp_path / "a b,c\\d"
    one.start()
    (found,) = [m for m in mountinfo.ours() if m.path == one.path]
    assert found.source == str(one.store)


def test_install_and_uninstall(tmp_path):
    need_root_and_fuse()
    root = Path(__file__).parent.parent
    make = ["make", "-s", "-C", root, f"DESTDIR={tmp_path}", "PREFIX=/opt"]
    made = [tmp_path / place for place in ("opt/bin/cascadefs", "sbin/mount.cascadefs", "sbin/mount.fuse.cascadefs")]
    script = "-o build"  # what is built already is not looked at again
    subprocess.run([*make, *script.split(), "install"], check=True, capture_output=True)
    assert all(os.path.lexists(path) for path in made)
    subprocess.run([*make, "uninstall"], check=True, capture_output=True)
    assert not any(os.path.lexists(path) for path in made)


def test_an_unknown_option_is_one_line(one):
    done = cascadefs("mount", one.path, "--store", one.store, "-o", "shmsize=1GiB")
    assert done.returncode == 1 and "did you mean shm_size" in done.stderr and len(done.stderr.splitlines()) == 1
