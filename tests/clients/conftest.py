"""Gives each client test a fresh folder: on a live mount in each mode, or on a plain directory that proves the tests.

Owns the mounts: one per mode for the whole run, with a store of its own, started and ended through the command line
as a user would. Knows nothing of what the clients do, and imports nothing of cascadefs: the clients' environment
does not have it.

Must stay true: a mount that does not end by `cascadefs umount` fails the run, and so does one that works in another
mode than asked; nothing is deleted underneath a mountpoint that is still mounted.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# LMCache sends usage reports unless told not to; must be set before it is imported.
os.environ["LMCACHE_TRACK_USAGE"] = "false"
# The clients are tested on the CPU, also where there is a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

REPOSITORY = Path(__file__).resolve().parents[2]
CASCADEFS = os.environ.get("CASCADEFS_BIN", str(REPOSITORY / ".venv/bin/cascadefs"))
PLAIN_FOLDER = os.environ.get("CASCADEFS_CLIENT_FOLDER")
MODES = ["plain"] if PLAIN_FOLDER else ["passthrough", "portable"]

# Smaller than what the largest test writes, so that the cold tier takes part.
MEMORY_TIER = "1GiB"
# Two of them fit into the time of one test (pytest.ini), which the last one pays for its mount's end.
COMMAND_SECONDS_MAX = 40
CAP_SYS_ADMIN = 21
FIRST_PASSTHROUGH_KERNEL = (6, 9)


def may_administer() -> bool:
    """True if this process has CAP_SYS_ADMIN; being root is neither needed nor enough in a container."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> CAP_SYS_ADMIN & 1)


def why_not(mode: str) -> str:
    """The reason why this machine cannot mount in that mode; empty if it can."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "cannot mount: /dev/fuse is missing or closed to this user"
    if not may_administer() and shutil.which("fusermount3") is None:
        return "cannot mount: not root, and there is no fusermount3"
    if mode == "portable":
        return ""
    if not may_administer():
        return "passthrough needs root (CAP_SYS_ADMIN)"
    release = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
    return "" if release >= FIRST_PASSTHROUGH_KERNEL else f"passthrough needs Linux 6.9, this is {os.uname().release}"


def file_system_of(mountpoint: Path) -> str | None:
    """The type of file system mounted exactly there, None if there is none. Asks the kernel's list: never blocks."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ")
        if before.split()[4] == str(mountpoint):
            return after.split()[0]
    return None


class Mount:
    """One mount of cascadefs below a temporary directory, driven by the command line only."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        # realpath, because the kernel lists mountpoints without symbolic links.
        self.home = Path(os.path.realpath(tempfile.mkdtemp(prefix=f"cascadefs-clients-{mode}-")))
        self.mountpoint = self.home / "mnt"
        self.mountpoint.mkdir()

    def command(self, *words: str) -> str:
        """Run one subcommand and return what it said; a failure shows all of it."""
        # Into a file, not a pipe: a daemon that kept a pipe open would make the reader wait for ever.
        with open(self.home / f"{words[0]}.log", "w+b") as log:
            done = subprocess.run(
                [CASCADEFS, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=COMMAND_SECONDS_MAX
            )
            log.seek(0)
            said = log.read().decode(errors="replace")
        if done.returncode != 0:
            pytest.fail(f"'cascadefs {' '.join(words)}' exited with {done.returncode}:\n{said}", pytrace=False)
        return said

    def start(self) -> None:
        """Mount, and make sure that it is a FUSE file system: else the tests would prove nothing."""
        options = ["--store", str(self.home / "store"), "--shm-size", MEMORY_TIER]
        if self.mode == "portable":
            options.append("--no-passthrough")
        self.command("mount", str(self.mountpoint), *options)
        kind = file_system_of(self.mountpoint)
        assert kind is not None and kind.startswith("fuse"), f"{self.mountpoint} is {kind}, not a FUSE mount"
        self.check_mode()

    def check_mode(self) -> None:
        """The mount says of itself that it works in the mode that was asked for: at the start and at the end."""
        said = self.command("status", str(self.mountpoint), "--json")
        status = json.loads(said[said.index("{") :])
        assert status["mode"] == self.mode, f"asked for {self.mode}, status says {status['mode']}"

    def stop(self) -> None:
        """Unmount; a mount that will not go is detached, so that nothing is left behind, and fails the run."""
        try:
            self.command("umount", str(self.mountpoint), "--drop-memory")
            assert file_system_of(self.mountpoint) is None, f"'cascadefs umount' left {self.mountpoint} mounted"
        finally:
            if file_system_of(self.mountpoint) is not None:
                subprocess.run(["umount", "-l", str(self.mountpoint)], check=False, timeout=COMMAND_SECONDS_MAX)


@pytest.fixture(scope="session", params=MODES)
def place(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Where the folders of one mode are made; mounted once for all tests."""
    if PLAIN_FOLDER:
        yield Path(PLAIN_FOLDER)
        return
    mode: str = request.param
    if reason := why_not(mode):
        pytest.skip(reason)
    mount = Mount(mode)
    try:
        mount.start()
        yield mount.mountpoint
        mount.check_mode()
    finally:
        # Also after a start that failed half-way: whatever it mounted must go.
        if file_system_of(mount.mountpoint) is not None:
            mount.stop()
        shutil.rmtree(mount.home)


@pytest.fixture
def folder(place: Path) -> Iterator[Path]:
    """A fresh folder for one test; that it can be removed again is part of every test."""
    path = Path(tempfile.mkdtemp(prefix="client-", dir=place))
    yield path
    shutil.rmtree(path)
