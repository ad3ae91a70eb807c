"""The limits and the surroundings of the processes: few descriptors, closed streams, no home, signals, a read-only disk."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from conftest import CASCADEFS, Mount, cascadefs, need_root_and_fuse

FEW = 128


def limited(number):
    """What a child does before exec()."""
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))


@pytest.fixture
def mount(one_mode):
    """Limits are the same in both modes, where a test does not ask for each."""
    return one_mode


def test_too_few_descriptors_are_refused_and_nothing_is_touched(mount):
    done = cascadefs("mount", mount.path, "--store", mount.store, preexec_fn=limited(FEW // 2))
    assert done.returncode == 1 and "ulimit" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not mount.store.exists() and not mount.path.exists()


@pytest.mark.parametrize("most", [None, 1 << 30])
def test_a_limit_of_file_sizes_is_lifted_or_refused(mount, most):
    """Of the soft limit anybody may; more than that takes CAP_SYS_RESOURCE, which is taken away here."""
    program = "import resource, sys; from cascadefs.media import descriptors\n"
    program += "descriptors.lift_file_size(); print(resource.getrlimit(resource.RLIMIT_FSIZE)[0])"
    drop = ["setpriv", "--bounding-set", "-sys_resource", "--inh-caps", "-sys_resource"]
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is missing")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY if most is None else most))

    done = subprocess.run([*drop, sys.executable, "-c", program], preexec_fn=limit, capture_output=True, text=True, check=False)
    if most is None:
        assert done.stdout == f"{resource.RLIM_INFINITY}\n", done.stderr
    else:
        assert done.returncode == 1 and "ulimit -f unlimited" in done.stderr


def test_no_file_grows_beyond_what_can_be_stored(mount):
    """2 TiB. In the portable mode; in passthrough the kernel writes by itself, and --force leaves what cannot be flushed."""
    mount.start("--no-passthrough")
    with open(mount.path / "f", "wb", buffering=0) as file:
        for offset, data in ((1 << 41, b"x"), ((1 << 41) - 1, b"xy"), (1 << 50, b"x")):
            with pytest.raises(OSError) as refused:
                os.pwrite(file.fileno(), data, offset)
            assert refused.value.errno == errno.EFBIG
        with pytest.raises(OSError) as refused:
            os.posix_fallocate(file.fileno(), 1 << 41, 4096)
        assert refused.value.errno == errno.EFBIG
        assert os.pwrite(file.fileno(), b"x", 1000) == 1 and os.fstat(file.fileno()).st_size == 1001
    mount.flush()


def test_what_cannot_be_flushed_is_told_and_force_leaves_it_in_memory(mount):
    mount.start()
    if mount.status()["mode"] != "passthrough":
        pytest.skip("the portable mode refuses such a file")
    (mount.path / "small").write_bytes(b"small")
    with open(mount.path / "f", "wb", buffering=0) as file:
        os.pwrite(file.fileno(), b"xy", 1 << 41)
    done = cascadefs("umount", mount.path)
    assert done.returncode == 1 and "File too large" in done.stderr and os.path.ismount(mount.path)
    assert "umount --force" in done.stderr
    done = cascadefs("umount", "--force", mount.path)
    assert done.returncode == 0 and "stays in memory" in done.stderr and not os.path.ismount(mount.path)
    mount.start()
    assert (mount.path / "small").read_bytes() == b"small" and (mount.path / "f").stat().st_size == (1 << 41) + 2
    (mount.path / "f").unlink()


@pytest.mark.parametrize("mode", [(), ("--no-passthrough",)])
def test_with_few_descriptors_programs_are_told_and_everything_is_flushed(mount, mode):
    done = cascadefs("mount", mount.path, "--store", mount.store, *mount.options, *mode, preexec_fn=limited(FEW))
    assert done.returncode == 0, done.stderr
    contents = {f"f{i}": os.urandom(20_000) for i in range(400)}
    for name, data in contents.items():
        (mount.path / name).write_bytes(data)
    with contextlib.ExitStack() as held:
        with pytest.raises(OSError) as refused:
            for name in contents:
                held.enter_context(open(mount.path / name, "rb"))
        assert refused.value.errno == errno.ENFILE
        mount.flush()
        assert mount.status()["pending_bytes"] == 0
    assert {name: (mount.path / name).read_bytes() for name in contents} == contents
    mount.stop()
    assert "Too many open files" not in (mount.store / "cascadefs.log").read_text()


# --- signals


def wait_for_end(mount):
    end = time.monotonic() + 60
    while os.path.ismount(mount.path) or not (mount.store / "cascadefs.log").read_text().rstrip().endswith("leaves"):
        assert time.monotonic() < end, "the mount did not end"
        time.sleep(0.05)


@pytest.mark.parametrize("to", ["keeper_pid", "worker_pid"])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_hangup_is_as_good_as_sigterm(mount, number, to):
    mount.start()
    (mount.path / "f").write_bytes(b"kept" * 1000)
    os.kill(mount.status()[to], number)
    wait_for_end(mount)
    mount.start()
    assert (mount.path / "f").read_bytes() == b"kept" * 1000


def test_no_stray_signal_ends_the_keeper(mount):
    mount.start()
    before = mount.status()
    stray = {signal.SIGUSR2, signal.SIGALRM, signal.SIGPIPE, signal.SIGIO, signal.SIGINT, signal.SIGQUIT, signal.SIGRTMIN + 3}
    for number in stray:
        os.kill(before["keeper_pid"], number)
    time.sleep(0.2)  # a signal that ends a process does so at once
    after = mount.status()
    assert (after["keeper_pid"], after["worker_pid"]) == (before["keeper_pid"], before["worker_pid"])


# --- streams and folders


def test_closed_standard_streams(mount):
    streams = "<&- >&- 2>&-"
    command = f'"$0" -m cascadefs.mount.cli mount "$1" --store "$2" --shm-size 64MiB {streams}'
    words = ["sh", "-c", command, CASCADEFS[0], mount.path, mount.store]
    assert subprocess.run(words, timeout=60, check=False).returncode == 0
    (mount.path / "f").write_bytes(b"kept")
    words[2] = f'"$0" -m cascadefs.mount.cli umount "$1" {streams}'
    assert subprocess.run(words, timeout=60, check=False).returncode == 0
    mount.start()
    assert (mount.path / "f").read_bytes() == b"kept"


def test_without_a_home_a_store_must_be_named(mount):
    homeless = partial(cascadefs, lacking=("HOME", "SCRATCH"))
    unknown = ("setpriv", "--reuid", "4242", "--clear-groups", "--inh-caps", "+dac_read_search",
               "--ambient-caps", "+dac_read_search")  # fmt: skip
    done = homeless("mount", mount.path, by=unknown)
    assert done.returncode == 1 and "--store" in done.stderr and len(done.stderr.splitlines()) == 1
    done = homeless("mount", mount.path, "--store", mount.store, *mount.options)
    assert done.returncode == 0, done.stderr
    assert homeless("umount", mount.path).returncode == 0


def test_a_working_folder_that_is_gone(mount, tmp_path):
    (tmp_path / "gone").mkdir()
    command = 'cd "$1" && rmdir "$1" && shift && exec "$@"'
    words = ["sh", "-c", command, "sh", tmp_path / "gone", *CASCADEFS]
    for rest in (["mount", mount.path, "--store", mount.store, *mount.options], ["status", mount.path], ["umount", mount.path]):
        (tmp_path / "gone").mkdir(exist_ok=True)
        done = subprocess.run([*words, *rest], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
    (tmp_path / "gone").mkdir(exist_ok=True)
    done = subprocess.run([*words, "mount", "mnt", "--store", "s"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


# --- a disk that cannot be written


@pytest.fixture
def read_only(tmp_path):
    need_root_and_fuse()
    (tmp_path / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "cascadefs-test", tmp_path / "disk"], check=True)

    def close():
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        return tmp_path / "disk"

    yield close
    subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)


def test_a_store_on_a_read_only_disk_is_refused_and_can_be_checked(read_only, tmp_path):
    first = Mount(tmp_path / "disk", "--shm-size", "64MiB").start()
    (first.path / "f").write_bytes(b"kept" * 1000)
    first.stop("--drop-memory")
    disk = read_only()
    for store in (disk / "store", disk / "new"):
        done = cascadefs("mount", tmp_path / "mnt", "--store", store)
        assert done.returncode == 1 and "Read-only" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "mnt").exists()
    assert cascadefs("fsck", disk / "store").returncode == 0
    done = cascadefs("rebuild-index", disk / "store")
    assert done.returncode == 1 and "Read-only" in done.stderr and len(done.stderr.splitlines()) == 1
