"""Where mounts of containers differ: user namespaces, stacked filesystems, options that a user may not have."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import AS_NOBODY, CASCADEFS, Mount, cascadefs, need_root_and_fuse

IN_NAMESPACE = """
set -e
$CF mount --store "$1/store" --shm-size 32MiB "$1/mnt" > "$1/told"
echo hello > "$1/mnt/f"
head -c 40000000 /dev/urandom | tee "$1/mnt/big" | md5sum > "$1/written"
md5sum < "$1/mnt/big" > "$1/read"
$CF status --json "$1/mnt" > "$1/status"
$CF umount --drop-memory "$1/mnt"
"""


def test_root_of_a_user_namespace_gets_the_portable_mode(tmp_path):
    need_root_and_fuse()
    words = ["unshare", "-Urm", "bash", "-c", IN_NAMESPACE.replace("$CF", " ".join(CASCADEFS)), "bash", tmp_path]
    if subprocess.run(["unshare", "-Urm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine gives no user namespaces")
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "mode portable (passthrough needs root of the machine" in (tmp_path / "told").read_text()
    assert (tmp_path / "written").read_text() == (tmp_path / "read").read_text()
    assert json.loads((tmp_path / "status").read_text())["mode"] == "portable"


@pytest.fixture
def overlay(tmp_path):
    """A folder on an overlay filesystem, as the root of a container is."""
    need_root_and_fuse()
    base = tmp_path / "base"
    base.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "cascadefs-test", base], check=True)
    for name in ("lower", "upper", "work", "merged"):
        (base / name).mkdir()
    options = ",".join(f"{key}dir={base / key}" for key in ("lower", "upper", "work"))
    done = subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, base / "merged"], check=False)
    if done.returncode == 0:
        yield base / "merged"
        subprocess.run(["umount", base / "merged"], check=True)
    subprocess.run(["umount", base], check=True)
    if done.returncode:
        pytest.skip("this kernel has no overlay filesystem")


def test_a_store_on_an_overlay_takes_files_that_find_no_room_in_memory(overlay):
    mount = Mount(overlay, "--shm-size", "16MiB", "--seal", "flush").start()
    try:
        assert mount.status()["mode"] == "passthrough"
        first, second = os.urandom(15 << 20), os.urandom(5 << 20)
        with open(mount.path / "in-memory", "wb", buffering=0) as filling:  # open, so that it stays in memory
            filling.write(first)
            while mount.status()["spare_files"]:
                pass
            with open(mount.path / "parked", "w+b", buffering=0) as file:
                file.write(second)
                assert list((mount.store / "parking/staged").iterdir())
                assert (mount.path / "parked").read_bytes() == second
        mount.flush()
        assert (mount.path / "in-memory").read_bytes() == first and (mount.path / "parked").read_bytes() == second
    finally:
        mount.clean()


@pytest.mark.usefixtures("open_to_users")
def test_allow_other_is_refused_where_the_system_does_not_allow_it(home):
    conf = Path("/etc/fuse.conf")
    allowed = conf.exists() and "user_allow_other" in conf.read_text().splitlines()
    if allowed:
        pytest.skip("users may allow others here")
    done = cascadefs("mount", home / "mnt", "--store", home / "store", "-o", "allow_other", by=AS_NOBODY)
    assert done.returncode == 1 and "user_allow_other" in done.stderr and len(done.stderr.splitlines()) == 1
    assert cascadefs("status", home / "mnt").returncode == 1
