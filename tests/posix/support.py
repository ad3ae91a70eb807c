"""What the POSIX cases share: the registry, refusals, byte comparison, bounded children, calls Python lacks.

Knows the C library and fork; does not know any case, any file system or pytest.
1. No wait is longer than PATIENCE_S; a child that exceeds it is killed and the case fails.
2. A child process never returns into the caller: it ends with os._exit and reports through a pipe.
"""

import contextlib
import ctypes
import errno
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

Case = Callable[[Path], None]

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB
BLOCK = 512  # the unit of st_blocks, whatever st_blksize says
PAGE = 4096
PATIENCE_S = 30
NOBODY = 65534
OTHER = 1000

_cases: dict[str, dict[str, Case]] = {}
libc = ctypes.CDLL(None, use_errno=True)


def case(function: Case) -> Case:
    topic = _cases.setdefault(function.__module__, {})
    assert function.__name__ not in topic, f"two cases are called {function.__name__}"
    topic[function.__name__] = function
    return function


def cases_of(module: ModuleType) -> dict[str, Case]:
    topic = module.__name__.rpartition("cases_")[2]
    return {f"{topic}/{name}": function for name, function in _cases[module.__name__].items()}


def run_case(name: str, function: Case, folder: Path) -> None:
    path = folder / name.replace("/", "-")
    umask = os.umask(0o022)
    try:
        path.mkdir()
        function(path)
    finally:
        os.umask(umask)
        shutil.rmtree(path)


def pattern(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def same(actual: bytes, expected: bytes) -> None:
    """Equality of long byte strings that reports the first difference, not both strings."""
    if actual == expected:
        return
    assert len(actual) == len(expected), f"{len(actual)} bytes where {len(expected)} were expected"
    at = next(i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b)
    raise AssertionError(f"bytes differ first at {at}: {actual[at : at + 16]!r}, expected {expected[at : at + 16]!r}")


def zeros(data: bytes, size: int) -> None:
    assert len(data) == size, f"{len(data)} bytes where {size} zeros were expected"
    assert data.count(0) == size, f"{size - data.count(0)} of {size} bytes are not zero"


def refused(codes: int | set[int], call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """The call must fail, with one of these errno values and no other."""
    wanted = {codes} if isinstance(codes, int) else codes
    names = " or ".join(sorted(errno.errorcode[code] for code in wanted))
    try:
        result = call(*args, **kwargs)
    except OSError as error:
        got = errno.errorcode.get(error.errno or 0, str(error.errno))
        assert error.errno in wanted, f"{got}, expected {names}"
        return
    raise AssertionError(f"succeeded with {result!r}, expected {names}")


@contextlib.contextmanager
def opened(path: Path | str | bytes, flags: int = os.O_RDONLY, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def tick() -> None:
    """Lets the coarse clock of the kernel move on (10 ms at the slowest usual HZ)."""
    time.sleep(0.02)


def settle() -> None:
    """Gives whatever happens behind the last close time to happen; correctness may never depend on it."""
    time.sleep(0.15)


def rest(path: Path) -> None:
    """Makes a closed file durable, so that its bytes may have moved to where they live in the long run."""
    with opened(path) as fd:
        os.fsync(fd)
    settle()


@contextlib.contextmanager
def elsewhere(path: Path) -> Iterator[Path]:
    """A folder on another file system than that of path."""
    device = path.stat().st_dev
    base = next(b for b in ("/dev/shm", "/var/tmp", "/tmp", "/run") if os.stat(b).st_dev != device)
    made = Path(tempfile.mkdtemp(prefix="posix-", dir=base))
    try:
        yield made
    finally:
        shutil.rmtree(made)


def run(*command: str | os.PathLike[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stderr.strip()}"
    return done.stdout


class Child:
    """A forked process that runs one function; `finish` raises what went wrong in it."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._report, write_end = os.pipe()
        with warnings.catch_warnings():
            # Python 3.12 warns when any thread lives; this child touches no lock of another thread.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            self._work(work, write_end)
        os.close(write_end)

    @staticmethod
    def _work(work: Callable[[], None], write_end: int) -> None:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            os.write(write_end, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(code)

    def finish(self) -> None:
        if not select.select([self._report], [], [], PATIENCE_S)[0]:
            self.kill()
            raise AssertionError(f"child did not finish in {PATIENCE_S} s")
        report = os.read(self._report, 8000).decode(errors="replace")
        os.close(self._report)
        status = self._reap()
        assert status == 0, f"in the child (wait status {status}): {report}"

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.close(self._report)
        self._reap()

    def _reap(self) -> int:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return status
            time.sleep(0.001)
        raise AssertionError(f"child {self.pid} cannot be reaped")


def in_child(work: Callable[[], None]) -> None:
    Child(work).finish()


def user_work(
    path: Path, work: Callable[[], None], uid: int = NOBODY, groups: tuple[int, ...] = ()
) -> Callable[[], None]:
    """work as uid (gid alike), with path as working folder so that the way to path need not be open to uid."""

    def drop_then_work() -> None:
        os.chdir(path)
        os.setgroups(groups)
        os.setgid(uid)
        os.setuid(uid)
        work()

    return drop_then_work


def as_user(path: Path, work: Callable[[], None], uid: int = NOBODY, groups: tuple[int, ...] = ()) -> None:
    in_child(user_work(path, work, uid, groups))


class Gate:
    """One process tells another, across fork, that it has come this far."""

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe()

    def open(self) -> None:
        os.write(self._write_end, b"!")

    def wait(self) -> None:
        assert select.select([self._read_end], [], [], PATIENCE_S)[0], "the other process never came this far"
        os.read(self._read_end, 1)

    def close(self) -> None:
        os.close(self._read_end)
        os.close(self._write_end)


@contextlib.contextmanager
def gates(count: int) -> Iterator[list[Gate]]:
    made = [Gate() for _ in range(count)]
    try:
        yield made
    finally:
        for gate in made:
            gate.close()


def checked(result: int) -> int:
    """Turns the -1 of a C call into OSError."""
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


AT_FDCWD = -100
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2


def renameat2(source: Path, target: Path, flags: int) -> None:
    checked(libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags)))


class Timespec(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]


UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2


def utimensat(path: Path | str, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """os.utime cannot say UTIME_OMIT; times are (seconds, nanoseconds)."""
    pair = (Timespec * 2)(Timespec(*atime), Timespec(*mtime))
    checked(libc.utimensat(AT_FDCWD, os.fsencode(path), pair, 0))


STATX_BTIME = 0x800


def birth_ns(path: Path | str) -> int | None:
    """Time of birth by statx(2), which Python lacks; None where it is not told."""
    answer = ctypes.create_string_buffer(256)
    checked(libc.statx(AT_FDCWD, os.fsencode(path), 0, ctypes.c_uint(0x7FF | STATX_BTIME), answer))
    seconds, rest = struct.unpack_from("<qI", answer, 80)
    return seconds * 10**9 + rest if struct.unpack_from("<I", answer)[0] & STATX_BTIME else None


FALLOC_KEEP_SIZE = 1
FALLOC_PUNCH_HOLE = 2
FALLOC_COLLAPSE_RANGE = 8
FALLOC_ZERO_RANGE = 16
FALLOC_INSERT_RANGE = 32


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    checked(libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))
