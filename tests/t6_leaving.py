"""Coming and going beside a mount's files: dead mounts, paths as they are typed, who else holds a mount."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import AS_NOBODY, Mount, cascadefs, need_root_and_fuse

from cascadefs.mount import asking, holders, mountinfo
from cascadefs.mount.fuse import device
from cascadefs.mount.leaving import is_running
from cascadefs.tiers import owner


def kill_all(mount):
    """SIGKILL both and leave the dead mount where it is."""
    status = mount.status()
    for pid in (status["keeper_pid"], status["worker_pid"]):
        os.kill(pid, signal.SIGKILL)
        while is_running(pid):
            time.sleep(0.01)


@pytest.fixture
def inner(mount):
    """A mount whose store lies in another one."""
    found = Mount(mount.store.parent / "inner", "--shm-size", "64MiB", *mount.options[2:])
    found.store = mount.path / "store"
    yield found
    if found.path in set(device.mounts()):
        device.unmount(found.path, lazy=True)
    for folder in Path("/dev/shm").glob("cascadefs-*"):
        known = owner.read_owner(folder)
        if known is not None and known.store == str(found.store):
            subprocess.run(["umount", "-l", folder], check=False, capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)


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


@pytest.mark.usefixtures("open_to_users")
def test_an_ordinary_user_clears_a_dead_mount(home):
    run = partial(cascadefs, by=AS_NOBODY)
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


def pids_as_nobody(run, path):
    status = json.loads(run("status", path, "--json").stdout)
    return status["keeper_pid"], status["worker_pid"]


# --- others hold it


@pytest.fixture
def in_namespace(mount):
    """A process in a mount namespace of its own that keeps what was mounted when it began."""
    mount.start()
    (mount.path / "f").write_bytes(b"kept" * 1000)
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", "echo ready; exec sleep 300"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def wait_until_free(mount):
    """The store's lock is given back when the keeper ends."""
    end = time.monotonic() + 60
    while not (mount.store / "cascadefs.log").read_text().rstrip().endswith("the daemon leaves"):
        assert time.monotonic() < end, "the daemon does not leave"
        time.sleep(0.05)


def is_kept(mount):
    """After the loss of all memory, too."""
    mount.wipe_memory()
    mount.start()
    assert (mount.path / "f").read_bytes() == b"kept" * 1000
    assert "Traceback" not in (mount.store / "cascadefs.log").read_text()


def test_umount_names_the_namespace_that_holds_the_mount_and_force_ends_it(mount, in_namespace):
    done = cascadefs("umount", mount.path)
    waiting, refusal = done.stderr.splitlines()
    assert done.returncode == 1 and "waiting" in waiting and "durable" in refusal
    assert f"process {in_namespace.pid} (sleep) at {mount.path}" in refusal
    assert "in use by a live mount" in one_line("mount", mount.path, "--store", mount.store)[1]
    done = cascadefs("umount", "--force", mount.path)
    assert done.returncode == 0, done.stderr
    is_kept(mount)


def test_umount_waits_no_longer_than_the_namespace_lives(mount, in_namespace):
    threading.Timer(3, in_namespace.kill).start()
    done = cascadefs("umount", mount.path)
    assert done.returncode == 0, done.stderr
    is_kept(mount)


def test_sigterm_ends_a_mount_that_a_namespace_holds(mount, in_namespace):
    os.kill(mount.status()["keeper_pid"], signal.SIGTERM)
    wait_until_free(mount)
    is_kept(mount)


@pytest.mark.parametrize("to", ["keeper_pid", "worker_pid"])
def test_sigterm_ends_a_mount_whose_parent_was_renamed(mount, tmp_path, to):
    mount.path = tmp_path / "parent/mnt"
    mount.path.parent.mkdir()
    mount.start()
    (mount.path / "f").write_bytes(b"kept" * 1000)
    pid = mount.status()[to]
    mount.path.parent.rename(tmp_path / "elsewhere")
    os.kill(pid, signal.SIGTERM)
    wait_until_free(mount)
    assert not os.path.ismount(tmp_path / "elsewhere/mnt")
    is_kept(mount)


@pytest.mark.parametrize("to", ["keeper_pid", "worker_pid"])
def test_sigterm_after_a_lazy_umount_with_a_file_open(mount, to):
    mount.start()
    (mount.path / "f").write_bytes(b"kept" * 1000)
    pid = mount.status()[to]
    with open(mount.path / "g", "wb", buffering=0) as file:
        file.write(b"written")
        subprocess.run(["umount", "-l", mount.path], check=True)
        os.kill(pid, signal.SIGTERM)
        wait_until_free(mount)
    is_kept(mount)
    assert (mount.path / "g").read_bytes() == b"written"


def test_umount_of_a_bind_mount_leaves_the_mount(mount, tmp_path):
    mount.start()
    (mount.path / "f").write_bytes(b"kept" * 1000)
    (mount.path / "sub").mkdir()
    for name, source in (("whole", mount.path), ("part", mount.path / "sub")):
        (tmp_path / name).mkdir()
        subprocess.run(["mount", "--bind", source, tmp_path / name], check=True)
        assert cascadefs("status", tmp_path / name).returncode == 0
        code, line = one_line("umount", tmp_path / name)
        assert code == 0 and str(mount.path) in line
        assert not os.path.ismount(tmp_path / name) and (mount.path / "f").exists()
    subprocess.run(["mount", "--bind", mount.path, tmp_path / "whole"], check=True)
    code, line = one_line("umount", mount.path)
    assert code == 0 and str(tmp_path / "whole") in line and not os.path.ismount(mount.path)
    assert cascadefs("umount", tmp_path / "whole").returncode == 0
    is_kept(mount)


def test_umount_names_who_uses_it_and_force_ends_it(mount):
    mount.start()
    (mount.path / "f").write_bytes(b"kept" * 1000)
    process = subprocess.Popen(["sleep", "300"], cwd=mount.path)
    try:
        code, line = one_line("umount", mount.path)
        assert code == 1 and f"process {process.pid} (sleep) at {mount.path}" in line
        assert os.path.ismount(mount.path)
        done = cascadefs("umount", "--force", mount.path)
        assert done.returncode == 0, done.stderr
    finally:
        process.kill()
        process.wait()
    is_kept(mount)


def test_force_ends_a_daemon_that_hangs(mount):
    mount.start()
    (mount.path / "f").write_bytes(b"kept" * 1000)
    mount.flush()
    status = mount.status()
    for pid in (status["keeper_pid"], status["worker_pid"]):
        os.kill(pid, signal.SIGSTOP)
    if not holders.daemons(mountinfo.topmost(mount.path, mountinfo.read()).device):
        for pid in (status["worker_pid"], status["keeper_pid"]):
            os.kill(pid, signal.SIGCONT)
        pytest.skip("this kernel does not tell whose a FUSE device is")
    code, line = one_line("umount", "--force", mount.path)
    assert code == 0 and "did not answer" in line
    is_kept(mount)


# --- what a mount is made of


def test_a_mount_over_or_in_its_own_folders_is_refused_and_nothing_is_made(tmp_path):
    need_root_and_fuse()
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    (tmp_path / "link").symlink_to(mnt)
    for store in (mnt, mnt / "s", tmp_path / "link", tmp_path / "link/s", f"{tmp_path}/./link//s/"):
        for path in (mnt, tmp_path / "link"):
            code, line = one_line("mount", path, "--store", store)
            assert code == 1 and "the store" in line
    code, line = one_line("mount", tmp_path / "s/mnt", "--store", tmp_path / "s")
    assert code == 1 and "lies in the store" in line and not (tmp_path / "s").exists()
    code, line = one_line("mount", mnt, "--store", tmp_path / "s", env={"CASCADEFS_SHM_DIR": str(mnt / "shm")})
    assert code == 1 and "memory tier" in line and not (tmp_path / "s").exists()
    assert os.listdir(mnt) == []


def test_a_relative_store_is_the_callers(mount, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mount.store = tmp_path / "store"
    for words, env in ((("--store", "store"), {}), ((), {"CASCADEFS_STORE": "store"}), ((), {"CASCADEFS_STORE": "~/store"})):
        env |= {"HOME": str(tmp_path)}
        done = cascadefs("mount", mount.path, *words, *mount.options, env=env)
        assert done.returncode == 0, done.stderr
        assert mount.status()["store"] == str(tmp_path / "store")
        mount.stop()
    (tmp_path / "toml").write_text('store = "~/store"\n')
    done = cascadefs("mount", mount.path, "--config", "toml", *mount.options, env={"HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    mount.stop()
    assert cascadefs("fsck", "store").returncode == 0


def test_a_mountpoint_that_was_made_goes_and_one_that_was_there_stays(mount):
    for was_there in (False, True):
        if was_there:
            mount.path.mkdir()
        mount.start()
        mount.kill_worker()  # the next one did not make it
        mount.stop()
        assert mount.path.exists() == was_there
    assert "cannot" in one_line("mount", mount.path / "new", "--store", mount.store, "-o", "max_read=x")[1]
    assert not (mount.path / "new").exists()


def test_a_store_that_somebody_deleted_keeps_nobody_from_leaving(mount):
    mount.start()
    (mount.path / "f").write_bytes(b"x")
    mount.flush()
    shutil.rmtree(mount.store)
    assert mount.status()["tiers"]["cold"]["used_bytes"] == 0
    done = cascadefs("umount", "--drop-memory", mount.path)
    assert done.returncode == 0, done.stderr
    assert not os.path.ismount(mount.path) and not mount.store.exists()


@pytest.mark.parametrize("option", ["--drop-memory", "--force", "--keep-memory"])
def test_a_read_only_mount_is_verified_and_left_like_another(mount, option):
    mount.start()
    (mount.path / "f").write_bytes(b"x" * 1000)
    memory = mount.memory
    mount.stop()
    mount.start("-o", "ro")
    assert cascadefs("verify", mount.path).returncode == 0
    mount.stop(*{"--force": ("--force", "--drop-memory"), "--keep-memory": ("--keep-memory", "boot")}.get(option, (option,)))
    assert memory.exists() == (option == "--keep-memory")
    assert option != "--keep-memory" or owner.read_owner(memory).until == 0


def test_a_mount_whose_disk_died_is_not_called_dead_and_can_be_left(mount, inner):
    mount.start()
    inner.path.parent.mkdir()
    inner.start()
    (inner.path / "f").write_bytes(b"kept")
    kill_all(mount)
    code, line = one_line("flush", inner.path)
    assert code == 1 and "is dead" not in line, line
    mount.start()
    done = cascadefs("umount", "--force", inner.path)
    assert done.returncode == 0, done.stderr
    assert inner.path not in set(device.mounts())
