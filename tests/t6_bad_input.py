"""Bad input: one clear line, an exit code, nothing touched."""

import errno
import json
import os

import pytest
from conftest import Mount, cascadefs, need_root_and_fuse


def refused(*words, env=None):
    """The one line that a command fails with."""
    done = cascadefs(*words, env=env)
    assert done.returncode != 0, done.stdout
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr
    return lines[-1] if "Usage" in done.stderr or len(lines) == 1 else pytest.fail(done.stderr)


def test_store_paths(tmp_path):
    need_root_and_fuse()
    mnt = tmp_path / "mnt"
    assert "is missing" in refused("mount", mnt, "--store", tmp_path / "no/such/store")
    (tmp_path / "file").touch()
    assert "not a folder" in refused("mount", mnt, "--store", tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thing").touch()
    assert "not a cascadefs store" in refused("mount", mnt, "--store", tmp_path / "other")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer/store.json").write_text(json.dumps({"format": 2}))
    assert "format 2" in refused("mount", mnt, "--store", tmp_path / "newer")
    assert os.listdir(tmp_path / "newer") == ["store.json"] and os.listdir(tmp_path / "other") == ["thing"]
    assert not mnt.exists() and not (tmp_path / "no").exists()


def test_mountpoints(tmp_path):
    need_root_and_fuse()
    store = tmp_path / "store"
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thing").touch()
    assert "not a folder" in refused("mount", tmp_path / "file", "--store", store)
    assert "not empty" in refused("mount", tmp_path / "full", "--store", store)
    assert "mounted" in refused("mount", "/proc", "--store", store)
    assert "no cascadefs is mounted" in refused("umount", tmp_path / "full")
    assert "does not" in refused("info", tmp_path / "full/thing") or "give a regular file" in refused("info", tmp_path / "file")


def test_a_live_mount_is_not_disturbed(tmp_path):
    need_root_and_fuse()
    mount = Mount(tmp_path, "--shm-size", "64MiB").start()
    try:
        (mount.path / "f").write_text("here")
        assert "already mounted" in refused("mount", mount.path, "--store", tmp_path / "second")
        assert "in use by a live mount" in refused("mount", tmp_path / "elsewhere", "--store", mount.store)
        assert not (tmp_path / "elsewhere").exists()
        assert (mount.path / "f").read_text() == "here"
    finally:
        mount.clean()


def test_settings(tmp_path):
    words = ("mount", tmp_path / "mnt", "--store", tmp_path / "store")
    for size in ("0", "1KiB", "-5", "nonsense", "9EiB"):
        assert "shm_size" in refused(*words, f"--shm-size={size}")
    assert "more than this machine" in refused(*words, "--shm-size", "63TiB")
    (tmp_path / "toml").write_text("shm-size = 5\n")
    assert "unknown setting" in refused(*words, "--config", tmp_path / "toml")
    assert "cannot read" in refused(*words, "--config", tmp_path / "absent")
    assert "sync" in refused(*words, "--sync", "sometimes")
    assert not (tmp_path / "mnt").exists() and not (tmp_path / "store").exists()


def test_missing_libfuse_is_one_line(tmp_path):
    (tmp_path / "pyfuse3.py").write_text("raise ImportError('libfuse3.so.3: cannot open shared object file')\n")
    need_root_and_fuse()
    words = ("mount", tmp_path / "mnt", "--store", tmp_path / "store")
    assert "apt-get install" in refused(*words, env={"PYTHONPATH": str(tmp_path)})
    assert not (tmp_path / "mnt").exists()


def test_origins_of_settings(tmp_path):
    (tmp_path / "toml").write_text('extent_size = "64MiB"\n')
    env = {"CASCADEFS_SEAL_DELAY": "0.5", "CASCADEFS_CONFIG": str(tmp_path / "toml")}
    told = json.loads(cascadefs("config", "show", "--json", env=env).stdout)
    assert (told["extent_size"], told["seal_delay"]["origin"]) == ({"value": str(64 << 20), "origin": "file"}, "environment")
    assert told["shm_dir"]["origin"] == "default"
    assert "extent_size" in cascadefs("config", "show", env=env).stdout


def test_unknown_variables_warn_and_do_not_stop():
    done = cascadefs("config", "show", "--json", env={"CASCADEFS_SHMSIZE": "1GiB"})
    assert done.returncode == 0 and json.loads(done.stdout)["shm_size"]["origin"] == "default"
    assert done.stderr.splitlines() == [
        "cascadefs: warning: CASCADEFS_SHMSIZE in the environment is not a setting and is ignored; "
        "did you mean CASCADEFS_SHM_SIZE?"
    ]


def test_unknown_names_have_the_right_errno(tmp_path):
    need_root_and_fuse()
    mount = Mount(tmp_path, "--shm-size", "64MiB").start()
    try:
        (mount.path / "f").touch()
        for name, code in (("x", errno.ENOENT), ("f/x", errno.ENOTDIR), ("x/y", errno.ENOENT), ("n" * 256, errno.ENAMETOOLONG)):
            with pytest.raises(OSError) as caught:
                os.stat(mount.path / name)
            assert caught.value.errno == code, name
        for name in (".cascade/none", ".cascade/by-hash/0123"):
            with pytest.raises(FileNotFoundError):
                os.stat(mount.path / name)
        with pytest.raises(OSError) as caught:
            os.truncate(mount.path / "f", 3 << 40)
        assert caught.value.errno == errno.EFBIG
    finally:
        mount.clean()


def test_usage_is_one_line_that_names_the_help():
    for words, told in (
        (("--bogus",), "see: cascadefs --help"),
        (("bogus",), "see: cascadefs --help"),
        (("mount",), "see: cascadefs mount --help"),
        (("mount", "--bogus", "m"), "see: cascadefs mount --help"),
        (("bench", "io", "--repeats", "0"), "see: cascadefs bench io --help"),
    ):
        done = cascadefs(*words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and told in done.stderr, done.stderr
    assert "Commands:" in cascadefs("bench").stderr


def test_paths_that_are_not_there_or_elsewhere(tmp_path):
    need_root_and_fuse()
    (tmp_path / "file").touch()
    assert "No such file" in refused("info", tmp_path / "absent")
    assert "not one" in refused("info", tmp_path / "file")
    for command in ("list", "drop"):
        assert "is not a folder" in refused(command, "--shm-dir", tmp_path / "absent", *["--orphans"] * (command == "drop"))
    mount = Mount(tmp_path, "--shm-size", "64MiB").start()
    try:
        (mount.path / "f").touch()
        assert "does not lie on the mount" in refused("flush", mount.path, tmp_path / "file")
        assert "does not lie on the mount" in refused("flush", mount.path, "../file")
        for word in ("f", mount.path / "f"):
            assert cascadefs("flush", mount.path, word).returncode == 0
    finally:
        mount.clean()
