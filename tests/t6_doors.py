"""Doors: what a second user can see and do on a mount, and what becomes of things planted in a store."""

import json
import os
import subprocess
import sys

import pytest
from conftest import AS_NOBODY, NOBODY, cascadefs, need_root_and_fuse

SECRET = b"a secret of root's " * 1000


def as_nobody(code, *arguments):
    """Run Python code as another user; what it printed, or the name of the exception that ended it."""
    prefix = f"import os, sys; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
    interpreter = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable
    words = [interpreter, "-c", prefix + code, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, cwd="/")
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1].split(":")[0]


@pytest.fixture
def mount(one_mode):
    """Doors are the same in both modes."""
    return one_mode


@pytest.fixture
def open_way(tmp_path):
    """pytest's folders are closed to others: only the doors of cascadefs itself may keep them out."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and folder.is_relative_to("/tmp") and folder.name.startswith(("pytest", "test", "judges")):
            folder.chmod(0o755)


def test_another_user_reads_nothing_that_permissions_deny(mount, open_way):
    mount.start()
    secret = mount.path / "secret"
    secret.write_bytes(SECRET)
    secret.chmod(0o600)
    (mount.path / "hello").write_text("for all")
    mount.flush()
    told = json.loads(cascadefs("info", secret, "--json").stdout)
    assert as_nobody("print(open(sys.argv[1]).read())", mount.path / "hello") == "for all"
    by_hash = mount.path / ".cascade/by-hash" / told["sha256"]
    copy = mount.memory / "objects" / told["hash"]
    for path in (secret, by_hash, mount.path / ".cascade/stats", copy, mount.store / "index.db"):
        assert os.path.exists(path)
        assert as_nobody("open(sys.argv[1], 'rb').read(1)", path) == "PermissionError", path
    for folder in (mount.path / ".cascade", mount.path / ".cascade/by-hash", mount.store, mount.memory):
        assert as_nobody("os.listdir(sys.argv[1])", folder) == "PermissionError", folder
    for fact in ("sha256", "hash", "refs", "info", "tier"):
        assert as_nobody("os.getxattr(sys.argv[1], sys.argv[2])", secret, f"user.cascade.{fact}") == "PermissionError"


def test_another_user_controls_nothing(mount, open_way):
    mount.start()
    (mount.path / "theirs").touch()
    (mount.path / "theirs").chmod(0o666)
    drop = "os.setxattr(sys.argv[1], 'user.cascade.drop-memory', b'1')"
    assert as_nobody(drop, mount.path / ".cascade") == "PermissionError"
    assert as_nobody("os.fsync(os.open(sys.argv[1], os.O_RDONLY))", mount.path / ".cascade") == "PermissionError"
    assert as_nobody(drop, mount.path / "theirs") == "PermissionError"
    forge = "os.setxattr(sys.argv[1], 'user.cascade.sha256', b'0' * 32)"
    assert as_nobody(forge, mount.path / "theirs") == "PermissionError"
    with pytest.raises(PermissionError):  # nor does root
        os.setxattr(mount.path / "theirs", "user.cascade.sha256", b"0" * 32)
    os.setxattr(mount.path / ".cascade", "user.cascade.drop-memory", b"0")


@pytest.mark.parametrize("domain, copies", [("user", 2), ("off", 3)])
def test_domains_of_deduplication(mount, open_way, domain, copies):
    mount.path.parent.joinpath("toml").write_text(f'dedup = "{domain}"\n')
    mount.start("--config", str(mount.path.parent / "toml"))
    for name, owner in (("a", 0), ("b", 0), ("theirs", NOBODY)):
        (mount.path / name).write_bytes(SECRET)
        os.chown(mount.path / name, owner, owner)
    mount.flush()
    assert mount.status()["unique_bytes"] == copies * len(SECRET)
    refs = as_nobody("print(os.getxattr(sys.argv[1], 'user.cascade.refs').decode())", mount.path / "theirs")
    assert refs == "1"  # of three
    mount.stop("--drop-memory")
    mount.start("--config", str(mount.path.parent / "toml"))
    assert all((mount.path / name).read_bytes() == SECRET for name in ("a", "b", "theirs"))


def test_an_open_store_is_closed_and_one_of_another_user_refused(mount):
    mount.start()
    mount.stop()
    mount.store.chmod(0o755)
    (mount.store / "extents").chmod(0o777)
    mount.start()
    assert mount.store.stat().st_mode & 0o777 == 0o700 and (mount.store / "extents").stat().st_mode & 0o777 == 0o700
    assert mount.memory.stat().st_mode & 0o777 == 0o700
    mount.stop()
    os.chown(mount.store, NOBODY, NOBODY)
    done = cascadefs("mount", mount.path, "--store", mount.store)
    assert done.returncode == 1 and "belongs to user 65534" in done.stderr and len(done.stderr.splitlines()) == 1
    os.chown(mount.store, 0, 0)


def test_planted_symbolic_links_are_not_followed(mount, tmp_path):
    mount.start()
    (mount.path / "f").write_bytes(SECRET)
    mount.flush()
    digest = json.loads(cascadefs("info", mount.path / "f", "--json").stdout)["hash"]
    mount.stop()
    target = tmp_path / "target"
    target.write_bytes(b"not of the store")
    (mount.memory / "objects" / digest).unlink()
    planted_names = (f"objects/{digest}", "objects/no-digest", "staged/2", "staged/no-number", "staged/\u00b2", "staged/007")
    for planted in planted_names:
        (mount.memory / planted).symlink_to(target)
    mount.start()
    assert (mount.path / "f").read_bytes() == SECRET
    (mount.path / "new").write_bytes(b"new")
    mount.flush()
    assert target.read_bytes() == b"not of the store"
    mount.stop("--drop-memory")
    extent = next((mount.store / "extents").iterdir())
    extent.rename(tmp_path / "elsewhere")
    extent.symlink_to(tmp_path / "elsewhere")
    mount.start()
    with pytest.raises(OSError):
        (mount.path / "f").read_bytes()
    mount.stop()
    (mount.store / "index.db").rename(tmp_path / "index.db")
    (mount.store / "index.db").symlink_to(tmp_path / "index.db")
    done = cascadefs("mount", mount.path, "--store", mount.store)
    assert done.returncode == 1 and "not a regular file of yours" in done.stderr


def test_an_identity_that_leads_out_of_the_memory_folder_is_refused(mount):
    mount.start()
    mount.stop("--drop-memory")
    text = (mount.store / "store.json").read_text()
    known = {key: value for key, value in json.loads(text).items() if key != "sum"}  # as stores had it before the checksum
    (mount.store / "store.json").write_text(json.dumps(known | {"store_id": "../../etc/aaaaaaaaaaaaaaaaaaaaaa"}))
    done = cascadefs("mount", mount.path, "--store", mount.store)
    assert done.returncode == 1 and "makes no sense" in done.stderr and len(done.stderr.splitlines()) == 1
    (mount.store / "store.json").write_text(text)


def test_a_device_that_is_closed_is_told_as_such(home):
    need_root_and_fuse()
    if os.stat("/dev/fuse").st_mode & 0o006:
        pytest.skip("/dev/fuse is open to all here")
    done = cascadefs("mount", home / "mnt", "--store", home / "store", by=AS_NOBODY)
    assert done.returncode == 1 and "closed to you" in done.stderr and "modprobe" not in done.stderr


def test_root_is_told_that_a_users_mount_is_asked_by_that_user(open_to_users, home):
    words = ("--store", home / "store", "--shm-size", "64MiB")
    assert cascadefs("mount", home / "mnt", *words, by=AS_NOBODY).returncode == 0
    try:
        done = cascadefs("status", home / "mnt")
        assert done.returncode == 1 and "only whoever mounted it" in done.stderr and done.stderr.count("\n") == 1
    finally:
        done = cascadefs("umount", "--drop-memory", home / "mnt", by=AS_NOBODY)
    assert done.returncode == 0, done.stderr
    checked = cascadefs("fsck", home / "store")
    assert checked.returncode == 1 and "belongs to user 65534" in checked.stderr and checked.stderr.count("\n") == 1
