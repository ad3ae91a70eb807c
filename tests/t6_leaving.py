"""Coming and going beside a mount's files: dead mounts, paths as they are typed, who else holds a mount."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import CASCADEFS, cascadefs, need_root_and_fuse

from cascadefs.mount import asking, mountinfo
from cascadefs.mount.leaving import is_running


def kill_all(mount):
    """SIGKILL both and leave the dead mount where it is."""
    status = mount.status()
    for pid in (status["keeper_pid"], status["worker_pid"]):
        os.kill(pid, signal.SIGKILL)
        while is_running(pid):
            time.sleep(0.01)


def one_line(*words, env=None):
    done = cascadefs(*words, env=env)
    lines = (done.stderr or done.stdout).strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return done.returncode, lines[0]


def test_a_dead_mount_is_told_of_and_cleared_by_umount(mount):
    mount.start()
    (mount.path / "f").write_bytes(b"kept")
    os.stat(mount.path)  # the kernel keeps these attributes
    kill_all(mount)
    file = mount.path / "f"
    for words in (["status", mount.path], ["flush", mount.path], ["flush", mount.path, "f"], ["info", file],
                  ["verify", mount.path], ["upgrade", mount.path]):  # fmt: skip
        code, line = one_line(*words)
        assert code == 1 and "is dead" in line, (words, line)
    code, line = one_line("umount", mount.path)
    assert code == 0 and "was dead" in line
    mount.start()
    assert (mount.path / "f").read_bytes() == b"kept"


def test_a_dead_mount_is_cleared_by_mount_also_when_several_lie_there(mount):
    mount.start()
    (mount.path / "f").write_bytes(b"kept")
    subprocess.run(["mount", "--bind", mount.path, mount.path], check=True)
    os.stat(mount.path)
    kill_all(mount)
    mount.start()
    assert (mount.path / "f").read_bytes() == b"kept"
    assert [m.path for m in mountinfo.ours()].count(mount.path) == 1


def test_a_daemon_that_hangs_holds_up_nobody(mount, monkeypatch):
    mount.start()
    status = mount.status()
    monkeypatch.setattr(asking, "ANSWER_S", 0.5)
    for pid in (status["keeper_pid"], status["worker_pid"]):
        os.kill(pid, signal.SIGSTOP)
    try:
        for question in (asking.check_alive, asking.stats):
            with pytest.raises(asking.SilentMount):
                question(mount.path)
        assert mountinfo.resolve(mount.path / ".." / mount.path.name) == mount.path
    finally:
        for pid in (status["worker_pid"], status["keeper_pid"]):
            os.kill(pid, signal.SIGCONT)
    asking.check_alive(mount.path)


def test_every_command_knows_the_mount_however_it_is_typed(mount, tmp_path, monkeypatch):
    mount.path = tmp_path / "größe キャッシュ" / os.fsdecode(b"m \\n\xff")
    mount.path.parent.mkdir()
    (tmp_path / "link").symlink_to(mount.path.parent.name)
    (tmp_path / "far").symlink_to(mount.path)
    monkeypatch.chdir(tmp_path)
    name = mount.path.name
    done = cascadefs("mount", f"link/{name}/", "--store", mount.store, *mount.options)
    assert done.returncode == 0, done.stderr
    (mount.path / "f").write_bytes(b"x")
    foreign = tmp_path / "a\nb\u2028- c"
    foreign.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", os.fsdecode(b"so\xfe urce"), foreign], check=True)
    try:
        for typed in (f"link//{name}", "far", "./far/", f"link/../link/{name}/.", Path("far").absolute()):
            for command in ("status", "flush", "verify"):
                assert cascadefs(command, typed).returncode == 0, (command, typed)
            assert cascadefs("info", f"{typed}/f").returncode == 0
            assert "already mounted" in one_line("mount", typed, "--store", tmp_path / "s2")[1]
        done = cascadefs("umount", "far/")
        assert done.returncode == 0, done.stderr
    finally:
        subprocess.run(["umount", foreign], check=True)
    assert not os.path.ismount(mount.path)


AS_NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups",
             "--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search")  # fmt: skip


def test_an_ordinary_user_clears_a_dead_mount(tmp_path):
    need_root_and_fuse()
    if shutil.which("fusermount3") is None:
        pytest.skip("fusermount3 is missing")
    home = Path(subprocess.run(["mktemp", "-d"], check=True, capture_output=True, text=True).stdout.strip())
    os.chown(home, 65534, 65534)

    def run(*words):
        environ = {k: v for k, v in os.environ.items() if not k.startswith("CASCADEFS_")}
        command = [*AS_NOBODY, *CASCADEFS, *map(str, words)]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)

    mounting = ("mount", home / "mnt", "--store", home / "store", "--shm-size", "32MiB")
    try:
        done = run(*mounting)
        assert done.returncode == 0, done.stderr
        for again in (True, False):
            for pid in pids_as_nobody(run, home / "mnt"):
                os.kill(pid, signal.SIGKILL)
                while is_running(pid):
                    time.sleep(0.01)
            assert "is dead" in run("status", home / "mnt").stderr
            done = run(*mounting) if again else run("umount", home / "mnt")
            assert done.returncode == 0, done.stderr
        assert not os.path.ismount(home / "mnt")
        assert run(*mounting).returncode == 0
        done = run("umount", "--drop-memory", home / "mnt")
        assert done.returncode == 0, done.stderr
    finally:
        subprocess.run(["umount", "-l", home / "mnt"], check=False, capture_output=True)
        shutil.rmtree(home)


def pids_as_nobody(run, path):
    status = json.loads(run("status", path, "--json").stdout)
    return status["keeper_pid"], status["worker_pid"]
