"""Fixtures shared by the layers: an open database, and real mounts driven by the command line as a user would."""

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import faults
import pytest
from stores import unmount_memory

from cascadefs.config import MIB, Settings
from cascadefs.metadata.namespace import Namespace
from cascadefs.metadata.objects import Index
from cascadefs.metadata.sqlite import Database
from cascadefs.mount.fuse import device
from cascadefs.mount.leaving import is_running

CASCADEFS = [sys.executable, "-m", "cascadefs.mount.cli"]
COMMAND_S = 120
NOBODY = 65534
# A user, who may read wherever the interpreter lies.
AS_NOBODY = ("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups",
             "--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search")  # fmt: skip


@pytest.fixture
def database(tmp_path):
    found = Database(tmp_path / "store")
    yield found
    found.close()


@pytest.fixture
def settings(tmp_path):
    """Of a store of a test's own, without a mount (stores.py); sealed at once."""
    (tmp_path / "shm").mkdir()
    found = Settings(store=tmp_path / "store", shm_dir=tmp_path / "shm", shm_size=64 * MIB, seal_delay=0.0)
    yield found
    unmount_memory(found)


@pytest.fixture
def slow_seal(settings):
    """The same; nothing is sealed by itself."""
    return replace(settings, seal_delay=60.0)


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """The library that records calls and makes them fail (faults/shim.c)."""
    return faults.built_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def in_memory():
    """A folder in memory for thousands of stores: one is written and opened in about 6 ms there."""
    folder = Path(tempfile.mkdtemp(prefix="cascadefs-test-", dir="/dev/shm"))
    yield folder
    for left in folder.glob("*/shm/*"):
        subprocess.run(["umount", "-l", left], check=False, capture_output=True)
    shutil.rmtree(folder)


@pytest.fixture
def namespace(database):
    return Namespace(database)


@pytest.fixture
def index(database):
    return Index(database)


def cascadefs(*words, env=None, lacking=(), by=(), **how):
    """Run one command to its end, without settings from outside. `env`: more variables, `lacking`: not these; `by`: a command
    that runs it; `how`: for subprocess.run()."""
    kept = {k: v for k, v in os.environ.items() if k not in lacking and not k.startswith("CASCADEFS_")}
    how = {"stdin": subprocess.DEVNULL, "errors": "surrogateescape", "text": True, "env": kept | (env or {})} | how
    return subprocess.run([*by, *CASCADEFS, *map(str, words)], capture_output=True, timeout=COMMAND_S, check=False, **how)


class Mount:
    """One store and mountpoint below a folder; started, stopped and killed as often as a test likes."""

    def __init__(self, base: Path, *options: str, env: dict[str, str] | None = None) -> None:
        self.store, self.path, self.options, self.env = base / "store", base / "mnt", options, env

    def start(self, *options: str) -> "Mount":
        done = cascadefs("mount", self.path, "--store", self.store, *self.options, *options, env=self.env)
        assert done.returncode == 0, done.stderr
        return self

    def stop(self, *options: str) -> None:
        done = cascadefs("umount", self.path, *options)
        assert done.returncode == 0, done.stderr
        assert (self.store / "cascadefs.log").read_text().rstrip().endswith("the daemon leaves")  # it did not just die

    def flush(self) -> None:
        done = cascadefs("flush", self.path)
        assert done.returncode == 0, done.stderr

    def status(self) -> dict:
        done = cascadefs("status", self.path, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def kill(self) -> None:
        """SIGKILL keeper and worker and take the dead mount away."""
        status = self.status()
        for pid in (status["keeper_pid"], status["worker_pid"]):
            os.kill(pid, signal.SIGKILL)
            while is_running(pid):
                time.sleep(0.01)
        device.unmount(self.path, lazy=True)

    def kill_worker(self) -> int:
        """SIGKILL the worker; the keeper starts another. The pid that it had."""
        pid = self.status()["worker_pid"]
        os.kill(pid, signal.SIGKILL)
        return pid

    @property
    def memory(self) -> Path:
        return Path(json.loads((self.store / "memory.json").read_text())["folder"])

    def wipe_memory(self) -> None:
        for folder in self.memory.iterdir():
            shutil.rmtree(folder)

    def clean(self) -> None:
        """By force: a namespace that somebody else made meanwhile may hold a copy of the mount."""
        if self.path in set(device.mounts()):
            failed = cascadefs("umount", "--force", "--drop-memory", self.path).returncode
            if failed and self.path in set(device.mounts()):
                device.unmount(self.path, lazy=True)
        if (self.store / "memory.json").exists() and self.memory.exists():
            subprocess.run(["umount", "-l", self.memory], check=False, capture_output=True)
            shutil.rmtree(self.memory, ignore_errors=True)


MODES = {"passthrough": (), "portable": ("--no-passthrough",)}


def need_root_and_fuse() -> None:
    if not device.may_mount():
        pytest.skip("mounting as these tests do needs root (CAP_SYS_ADMIN)")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse is missing")


@pytest.fixture
def open_to_users(tmp_path_factory):
    """/dev/fuse as udev makes it: ordinary users may mount. Where it is root's alone, another node covers it for the test."""
    need_root_and_fuse()
    if not (shutil.which("setpriv") and shutil.which("fusermount3")):
        pytest.skip("setpriv or fusermount3 is missing")
    if os.stat("/dev/fuse").st_mode & 0o006 == 0o006:
        yield
        return
    folder = tmp_path_factory.mktemp("device")
    with mounted("-t", "tmpfs", "-o", "dev", "device", folder):
        try:
            os.mknod(folder / "fuse", stat.S_IFCHR, os.stat("/dev/fuse").st_rdev)
        except PermissionError:
            pytest.skip("/dev/fuse is root's alone, and no other node can be made")
        (folder / "fuse").chmod(0o666)
        with mounted("--bind", folder / "fuse", "/dev/fuse"):
            yield


@contextlib.contextmanager
def mounted(*words):
    """As mount(8) does; the last word is the place."""
    subprocess.run(["mount", *map(str, words)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", words[-1]], check=True)


def lasting(mode, tmp_path_factory):
    need_root_and_fuse()
    mount = Mount(tmp_path_factory.mktemp(mode), "--shm-size", "1GiB", *MODES[mode]).start()
    if mount.status()["mode"] != mode:
        mount.clean()
        pytest.skip(f"this kernel cannot mount in {mode} mode")
    yield mount.path
    mount.stop("--drop-memory")


@pytest.fixture(scope="session")
def mount_passthrough(tmp_path_factory):
    """A folder on a mount that lasts for the whole run."""
    yield from lasting("passthrough", tmp_path_factory)


@pytest.fixture(scope="session")
def mount_portable(tmp_path_factory):
    yield from lasting("portable", tmp_path_factory)


@pytest.fixture(params=list(MODES))
def mount(request, tmp_path):
    """A mount of a test's own, not started, in each mode; 64 MiB of memory."""
    need_root_and_fuse()
    found = Mount(tmp_path, "--shm-size", "64MiB", *MODES[request.param])
    yield found
    found.clean()


@pytest.fixture
def one_mode(tmp_path):
    """As `mount`, in the better mode only: for what is the same in both."""
    need_root_and_fuse()
    found = Mount(tmp_path, "--shm-size", "64MiB")
    yield found
    found.clean()


@pytest.fixture
def home(tmp_path):
    """A folder of an ordinary user's, whom the folders above let pass."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    found = tmp_path / "home"
    found.mkdir()
    os.chown(found, NOBODY, NOBODY)
    return found
