"""The places that are measured: set up, and taken down again whatever happens.

Owns: temporary folders, tmpfs and FUSE mounts, and the programs behind them. Does not know what is measured. It starts
`cascadefs` as a user would, by its command line. Invariants:
(1) Everything lies in fresh temporary folders; what was set up is taken down in reverse order, also after an error.
(2) A mountpoint is removed with rmdir only: a mount that would not go is reported, never emptied.
(3) A place is yielded only when its mountpoint is a mount: the folder below is never measured in its stead.
"""

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from cascadefs.bench.io import GIB, MIB, Place
from cascadefs.config import absolute
from cascadefs.errors import UserError

SHM, HUGE, CASCADE, PORTABLE, EXAMPLE = "shm", "huge", "cascadefs", "portable", "example"
DISK, UNHASHED = "disk", "unhashed"
TITLES = {
    SHM: "raw /dev/shm",
    HUGE: "raw tmpfs huge=within_size",
    DISK: "raw disk",
    UNHASHED: "cascadefs, seal = flush",
    CASCADE: "cascadefs",
    PORTABLE: "cascadefs portable",
    EXAMPLE: "pyfuse3 passthroughfs",
}
SHM_FOLDER = Path("/dev/shm")
COMMAND_S = 120  # a mount, umount or flush that takes longer is given up
EXAMPLE_S = 20
PAUSE_S = 0.05  # after a flush: the last replies and the releases of the kernel still come in

Note = Callable[[str], None]


class LeftOut(UserError):
    """This place cannot be measured here; str() says why."""


@dataclass(frozen=True)
class Setup:
    """`shm_bytes`: memory tier of each cascadefs mount; `huge_bytes`: our tmpfs; `store_base`: where stores lie; `environment`:
    settings of the mounts."""

    shm_bytes: int
    huge_bytes: int
    store_base: Path
    cli: tuple[str, ...] | None
    example: Path
    is_root: bool
    environment: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def tidy_exit() -> Iterator[None]:
    """SIGTERM and SIGHUP end the run as Ctrl-C does: through every `finally`, so that no mount stays."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise UserError("/proc/meminfo has no MemAvailable: is this Linux?")


def memory_tier_bytes(available: int) -> int:
    """4 GiB, or a quarter of what is free: two mounts, the raw places and the buffers live side by side."""
    return min(4 * GIB, available // 4 // MIB * MIB)


def default_store_base() -> Path:
    """Beside the default store, so that the same disk is used; else /var/tmp: a disk, where /tmp may be memory."""
    store = os.environ.get("CASCADEFS_STORE")
    return absolute(store).parent if store else Path("/var/tmp")


def find_cli() -> tuple[str, ...] | None:
    """How to start cascadefs: the script beside this interpreter, or its module; None when neither is installed."""
    script = Path(sys.executable).parent / "cascadefs"
    if script.exists():
        return (str(script),)
    try:
        found = importlib.util.find_spec("cascadefs.mount.cli")
    except ModuleNotFoundError:
        return None
    return (sys.executable, "-m", "cascadefs.mount.cli") if found else None


def find_example() -> Path:
    """Where pyfuse3's example is looked for; it is not part of the installed pyfuse3."""
    return Path(os.environ.get("CASCADEFS_PASSTHROUGHFS") or Path(sys.prefix) / "share" / "passthroughfs.py")


def default_setup(store_base: Path | None = None) -> Setup:
    """What this machine offers now. The size of our tmpfs is a bound only: it holds one measure or the ballast."""
    shm_bytes = memory_tier_bytes(available_bytes())
    base = store_base or default_store_base()
    return Setup(shm_bytes, shm_bytes, base, find_cli(), find_example(), os.geteuid() == 0)


@dataclass(frozen=True)
class Mounted(Place):
    """A cascadefs mount. `remount(drop_memory)` takes it down and up again; the seconds that the mount command took."""

    remount: Callable[[bool], float]

    def status(self) -> dict[str, Any]:
        """What `cascadefs status --json` shows."""
        found: dict[str, Any] = json.loads((self.folder / ".cascade/stats").read_text())
        return found


def run_command(command: list[str], what: str, environment: dict[str, str] | None = None) -> str:
    """Run to the end; what it printed. Output goes to a file: a daemon that kept a pipe open would hold us for ever."""
    with tempfile.TemporaryFile("w+") as output:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=COMMAND_S,
                check=False,
                env=os.environ | (environment or {}),
            )
        except (OSError, subprocess.TimeoutExpired) as failure:
            raise LeftOut(f"{what}: {failure}") from failure
        output.seek(0)
        said = output.read().strip()
    if done.returncode:
        last = said.splitlines()[-1] if said else f"exit code {done.returncode}"
        raise LeftOut(f"{what}: {last}")
    return said


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def temporary_mountpoint(note: Note) -> Iterator[Path]:
    """An empty folder to mount on."""
    path = Path(tempfile.mkdtemp(prefix="cascadefs-bench-mnt-"))
    try:
        yield path
    finally:
        try:
            path.rmdir()
        except OSError as failure:
            note(f"left behind: {path} ({failure.strerror})")


@contextmanager
def temporary_folder(base: Path, note: Note) -> Iterator[Path]:
    """A fresh folder, gone with what is in it."""
    try:
        path = Path(tempfile.mkdtemp(prefix="cascadefs-bench-", dir=base))
    except OSError as failure:
        raise LeftOut(f"no folder in {base}: {failure.strerror}") from failure
    try:
        yield path
    finally:
        try:
            shutil.rmtree(path)
        except OSError as failure:
            note(f"left behind: {path} ({failure.strerror})")


def unmount(path: Path, first: list[str], note: Note) -> None:
    """By `first`; if that does not do it, lazily, so that no mount outlives the run."""
    lazy = ["umount", "-l", str(path)] if os.geteuid() == 0 else ["fusermount3", "-uz", str(path)]
    for command in (first, lazy):
        try:
            run_command(command, f"unmounting {path}")
        except LeftOut as failure:
            note(str(failure))
        if not os.path.ismount(path):
            return


def _nothing() -> None:
    """A plain tmpfs does all its work in the foreground."""


@contextmanager
def raw_shm(note: Note) -> Iterator[Place]:
    """A folder in the /dev/shm of the machine: 4 KiB pages."""
    if not SHM_FOLDER.is_dir():
        raise LeftOut(f"no {SHM_FOLDER}")
    with temporary_folder(SHM_FOLDER, note) as path:
        yield Place(SHM, path, _nothing)


@contextmanager
def huge_tmpfs(setup: Setup, note: Note) -> Iterator[Path]:
    """A tmpfs of our own with huge pages, for the raw place and as the backing of the example."""
    if not setup.is_root:
        raise LeftOut("mounting a tmpfs needs root")
    with temporary_mountpoint(note) as path:
        options = f"huge=within_size,size={setup.huge_bytes},mode=700"
        run_command(["mount", "-t", "tmpfs", "-o", options, "cascadefs-bench", str(path)], "mounting a tmpfs")
        try:
            yield path
        finally:
            unmount(path, ["umount", str(path)], note)


@contextmanager
def _raw_huge(tmpfs: Path) -> Iterator[Place]:
    path = tmpfs / "raw"
    path.mkdir()
    yield Place(HUGE, path, _nothing)


def _settle(cli: tuple[str, ...], mount: Path, note: Note) -> None:
    """Everything behind is done when a flush returns; a flush that fails makes the next figure worse, so it is told."""
    try:
        run_command([*cli, "flush", str(mount)], f"flushing {mount}")
    except LeftOut as failure:
        note(f"did not settle: {failure}")
    time.sleep(PAUSE_S)


@contextmanager
def cascade(key: str, setup: Setup, note: Note) -> Iterator[Place]:
    """A cascadefs mount with a store of its own; `key` PORTABLE mounts it without passthrough."""
    cli = setup.cli
    if cli is None:
        raise LeftOut("the cascadefs command is not installed")
    if key != PORTABLE and not setup.is_root:
        raise LeftOut("passthrough needs root")
    with temporary_folder(setup.store_base, note) as store, temporary_mountpoint(note) as path:
        command = [*cli, "mount", str(path), "--store", str(store / "store")]
        command += ["--shm-size", f"{setup.shm_bytes // MIB}MiB"]
        command += ["--no-passthrough"] if key == PORTABLE else []
        environment = {**setup.environment, **({"CASCADEFS_SEAL": "flush"} if key == UNHASHED else {})}
        try:
            said = _mount(command, path, environment)
            for line in said.splitlines() if key == CASCADE else ():
                note(f"{TITLES[key]} said: {line}")  # such as: no passthrough on this kernel
            remount = partial(_remount, cli, command, path, environment)
            yield Mounted(key, path, lambda: _settle(cli, path, note), remount)
        finally:
            if os.path.ismount(path):
                unmount(path, [*cli, "umount", str(path), "--drop-memory"], note)


def _mount(command: list[str], path: Path, environment: dict[str, str]) -> str:
    """Run a mount command; what it said."""
    said = run_command(command, shlex.join(command), environment)
    if not os.path.ismount(path):
        raise LeftOut(f"{shlex.join(command)}: returned, but nothing is mounted")
    return said


def _remount(cli: tuple[str, ...], command: list[str], path: Path, environment: dict[str, str], drop_memory: bool) -> float:
    run_command([*cli, "umount", str(path), *(["--drop-memory"] if drop_memory else [])], f"unmounting {path}")
    start = time.monotonic()
    _mount(command, path, environment)
    return time.monotonic() - start


@contextmanager
def raw_disk(setup: Setup, note: Note) -> Iterator[Place]:
    """A plain folder on the disk that the stores lie on."""
    with temporary_folder(setup.store_base, note) as path:
        yield Place(DISK, path, _nothing)


@contextmanager
def _example_process(script: Path, backing: Path, mount: Path) -> Iterator[None]:
    """Runs until its mount is gone; its complaints are kept for the case that it does not start."""
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, str(script), str(backing), str(mount)]
        # In a session of its own, as our daemon is: Linux shares a busy machine by session (autogroup), and a server in that of
        # its clients was up to twice as fast there (a bare C server wrote 1.69 GB/s, in a session of its own 0.84).
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
        try:
            _wait_until(lambda: os.path.ismount(mount) or process.poll() is not None, EXAMPLE_S)
            if not os.path.ismount(mount):
                output.seek(0)
                raise LeftOut(f"{script} did not mount: {(output.read().strip() or 'no output').splitlines()[-1]}")
            yield
        finally:
            if not os.path.ismount(mount):
                _wait_until(lambda: process.poll() is not None, EXAMPLE_S)
            process.kill()
            process.wait()


@contextmanager
def example(setup: Setup, tmpfs: Path, note: Note) -> Iterator[Place]:
    """pyfuse3's passthroughfs over the same tmpfs, with the options it has by default (no writeback cache)."""
    if not setup.example.is_file():
        raise LeftOut(f"no {setup.example} (`make bench` fetches it; CASCADEFS_PASSTHROUGHFS names another place)")
    backing = tmpfs / "backing"
    backing.mkdir()
    with temporary_mountpoint(note) as path, _example_process(setup.example, backing, path):
        try:
            yield Place(EXAMPLE, path, lambda: time.sleep(PAUSE_S))
        finally:
            unmount(path, ["umount", str(path)], note)


@contextmanager
def open_places(
    setup: Setup, note: Note, keys: Collection[str] = (SHM, HUGE, CASCADE, PORTABLE, EXAMPLE)
) -> Iterator[tuple[list[Place], Path]]:
    """Those of `keys` that can be had here, in the order of TITLES, and a folder in memory for a ballast.

    `note` gets one line for each place that cannot be had.
    """
    with ExitStack() as stack:
        places: list[Place] = []

        def add(key: str, opening: Callable[[], AbstractContextManager[Place]]) -> None:
            try:
                places.append(stack.enter_context(opening()))
            except LeftOut as why:
                note(f"{TITLES[key]} left out: {why}")

        add(SHM, lambda: raw_shm(note))
        if not places:
            raise UserError(f"{SHM_FOLDER} cannot be used, and every figure is compared with it")
        memory = places[0].folder
        tmpfs: Path | None = None
        try:
            memory = tmpfs = stack.enter_context(huge_tmpfs(setup, note))
        except LeftOut as why:
            note(f"{TITLES[HUGE]} and {TITLES[EXAMPLE]} left out: {why}")
        if tmpfs and HUGE in keys:
            add(HUGE, lambda: _raw_huge(tmpfs))
        if DISK in keys:
            add(DISK, lambda: raw_disk(setup, note))
        for key in (UNHASHED, CASCADE, PORTABLE):
            if key in keys:
                add(key, lambda key=key: cascade(key, setup, note))  # type: ignore[misc]
        if tmpfs and EXAMPLE in keys:
            add(EXAMPLE, lambda: example(setup, tmpfs, note))
        yield [place for place in places if place.key in keys], memory
