"""One operation on two folders: first the mount, then the judge; any difference in result or errno is an AssertionError.

Owns: the two roots, the open files and mappings in pairs, the comparison. Knows nothing of hypothesis or of stores.
Invariants: (1) After each step both sides hold the same handles and mappings, in the same order. (2) Nothing is compared that
README.md lists as different: inode numbers, allocated blocks, the size of a folder, atime by reading, mtime by mapped writes.
"""

import contextlib
import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import calls

MOUNT, JUDGE = 0, 1
CLOCK_SLACK_NS = 300_000_000  # tmpfs stamps by the tick, which is late by tens of milliseconds on a busy virtual machine


@dataclass(eq=False)
class Opened:
    """One open(2) on both sides. `ino` is the judge's, to tell which handles share a file."""

    fds: tuple[int, int]
    flags: int
    ino: int
    path: str

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY


@dataclass(eq=False)
class Mapped:
    """One mapping on both sides; `watchers` are O_PATH descriptors, which tell the size and count as no open file."""

    maps: tuple[calls.Area, calls.Area]
    watchers: tuple[int, int]
    writable: bool
    ino: int

    def end(self) -> int:
        """Bytes that may be touched without SIGBUS on either side."""
        return min(self.maps[JUDGE].size, *(os.fstat(fd).st_size for fd in self.watchers))


def outcome(call: Callable[[], Any]) -> tuple[str, Any]:
    """("ok", result) or ("errno", name)."""
    try:
        return "ok", call()
    except OSError as e:
        return "errno", errno.errorcode.get(e.errno or 0, e.errno)


@dataclass
class Sides:
    """Both folders and what is open in them."""

    roots: tuple[Path, Path]
    handles: list[Opened] = field(default_factory=list)
    mappings: list[Mapped] = field(default_factory=list)
    hazy: set[int] = field(default_factory=set)  # judge's inodes that were written through a mapping: their mtime is free
    trace: list[str] = field(default_factory=list)  # what was done, for people

    def at(self, side: int, path: str) -> str:
        """A string: pathlib would tidy "d/" and "d/.." away."""
        return f"{self.roots[side]}/{path}"

    def both(self, what: str, call: Callable[[int], Any]) -> tuple[str, Any]:
        """Do it on each side; the results must be equal."""
        mount, judge = outcome(lambda: call(MOUNT)), outcome(lambda: call(JUDGE))
        if not what.startswith(("lstat", "xattrs", "bytes", "fstat")):
            self.trace.append(f"    {what} -> {shown(judge)}")
        assert mount == judge, f"{what}: mount says {shown(mount)}, tmpfs says {shown(judge)}"
        return judge

    # --- handles and mappings

    def open(self, path: str, flags: int, mode: int) -> Opened | None:
        fds: list[int] = []

        def call(side: int) -> None:
            fds.append(os.open(self.at(side, path), flags | os.O_CLOEXEC, mode))

        try:
            self.both(f"open({path!r}, {flags:#o}, {mode:#o})", call)
        except AssertionError:
            for fd in fds:
                os.close(fd)
            raise
        if not fds:
            return None
        found = os.fstat(fds[JUDGE])
        if not stat.S_ISREG(found.st_mode):
            self.close_fds(fds)
            return None
        self.handles.append(Opened((fds[0], fds[1]), flags, found.st_ino, path))
        return self.handles[-1]

    @staticmethod
    def close_fds(fds: list[int] | tuple[int, int]) -> None:
        for fd in fds:
            os.close(fd)

    def close(self, opened: Opened) -> None:
        self.handles.remove(opened)
        self.close_fds(opened.fds)

    def map(self, opened: Opened, writable: bool) -> None:
        size = os.fstat(opened.fds[JUDGE]).st_size
        if not size:
            return
        first, second = (calls.Area(fd, size, writable) for fd in opened.fds)
        watchers = [os.open(f"/proc/self/fd/{fd}", os.O_PATH) for fd in opened.fds]
        self.mappings.append(Mapped((first, second), (watchers[0], watchers[1]), writable, opened.ino))

    def unmap(self, mapped: Mapped) -> None:
        self.mappings.remove(mapped)
        for area in mapped.maps:
            area.close()
        self.close_fds(mapped.watchers)

    def close_all(self) -> None:
        for opened in list(self.handles):
            self.close(opened)
        for mapped in list(self.mappings):
            self.unmap(mapped)

    def users(self, ino: int) -> list[Opened | Mapped]:
        """Handles and mappings of one file."""
        return [user for user in [*self.handles, *self.mappings] if user.ino == ino]

    # --- what is there

    def walk(self, side: int = JUDGE) -> Iterator[str]:
        """Every name below the root of a side, folders before what is in them."""
        for folder, folders, files in os.walk(self.roots[side]):
            base = Path(folder).relative_to(self.roots[side])
            folders.sort()
            for name in folders + sorted(files):
                yield str(base / name) if base != Path() else name

    # --- comparing

    def compare_name(self, path: str) -> None:
        """Attributes and extended attributes of one name, or that it is not there."""
        self.both(f"lstat({path!r})", lambda side: self._attributes(os.lstat(self.at(side, path)), path))
        self.both(f"xattrs of {path!r}", lambda side: calls.extended(self.at(side, path)))

    def expect_same_size(self, path: str, size: int) -> None:
        """A file is about to be cut to a size. To its own, that moves times where it has blocks: a hole that was read through a
        mapping has some on tmpfs, and none here, so its mtime is free from then on."""
        try:
            mount, judge = (os.stat(self.at(side, path)) for side in (MOUNT, JUDGE))
        except OSError:
            return
        if judge.st_size == size and bool(mount.st_blocks) != bool(judge.st_blocks):
            self.hazy.add(judge.st_ino)

    def compare_handle(self, opened: Opened) -> None:
        """Attributes by descriptor."""
        self.both(f"fstat of {opened.path!r}", lambda side: self._attributes(os.fstat(opened.fds[side]), opened.ino))

    def _attributes(self, found: os.stat_result, subject: str | int) -> dict[str, object]:
        ino = subject if isinstance(subject, int) else outcome(lambda: os.lstat(self.at(JUDGE, subject)).st_ino)[1]
        told = calls.attributes(found)
        if ino in self.hazy:
            told["mtime"] = "free"
        return told

    def compare_content(self, path: str) -> None:
        """All bytes of a file, and that what is told to be a hole reads as zeros."""
        kind = os.lstat(self.at(JUDGE, path)).st_mode
        if stat.S_ISLNK(kind):
            self.both(f"readlink({path!r})", lambda side: os.readlink(self.at(side, path)))
        elif stat.S_ISREG(kind):
            _, data = self.both(f"bytes of {path!r}", lambda side: Bytes(calls.read_all(self.at(side, path))))
            ino = os.lstat(self.at(JUDGE, path)).st_ino
            if not any(isinstance(user, Mapped) and user.writable for user in self.users(ino)):  # README: portable mode
                self._check_holes(path, data)

    def _check_holes(self, path: str, data: bytes) -> None:
        fd = os.open(self.at(MOUNT, path), os.O_RDONLY)
        try:
            at = 0
            for start, end in [*calls.data_ranges(fd), (len(data), len(data))]:
                assert not data[at:start].strip(b"\0"), f"{path!r}: data between {at} and {start} are called a hole"
                at = end
            assert at == len(data), f"{path!r}: data are told up to {at} of {len(data)}"
        finally:
            os.close(fd)

    def compare_all(self, contents: bool) -> None:
        """Both trees and all handles, whole."""
        names = {side: list(self.walk(side)) for side in (MOUNT, JUDGE)}
        assert names[MOUNT] == names[JUDGE], f"names differ: {set(names[MOUNT]) ^ set(names[JUDGE])}"
        for path in names[JUDGE]:
            self.compare_name(path)
            if contents:
                self.compare_content(path)
        groups = [self._links(side, names[JUDGE]) for side in (MOUNT, JUDGE)]
        assert groups[MOUNT] == groups[JUDGE], f"hard links differ: {groups}"
        for opened in self.handles:
            self.compare_handle(opened)

    def _links(self, side: int, names: list[str]) -> list[int]:
        """For each name the place of the first name of the same inode."""
        inodes = [os.lstat(self.at(side, path)).st_ino for path in names]
        return [inodes.index(ino) for ino in inodes]

    @contextlib.contextmanager
    def change_is_stamped(self, path: str) -> Iterator[None]:
        """ctime: where the judge stamps a change of this name, the mount does, and never goes back."""
        before, began = self._ctimes(path), time.time_ns()
        yield
        after = self._ctimes(path)
        if before is None or after is None or before[2] != after[2]:
            return
        assert after[MOUNT] >= before[MOUNT], f"{path!r}: ctime went back by {before[MOUNT] - after[MOUNT]} ns"
        if after[JUDGE] >= began:
            assert after[MOUNT] >= began - CLOCK_SLACK_NS, f"{path!r}: ctime not changed"
        if after[MOUNT] >= began and not self.users(after[2]):
            assert after[JUDGE] >= began - CLOCK_SLACK_NS, f"{path!r}: ctime changed"

    def _ctimes(self, path: str) -> tuple[int, int, int] | None:
        """(mount's, judge's, judge's inode) or None when there is none."""
        try:
            mount, judge = (os.lstat(self.at(side, path)) for side in (MOUNT, JUDGE))
        except OSError:
            return None
        return mount.st_ctime_ns, judge.st_ctime_ns, judge.st_ino


class Bytes(bytes):
    """Bytes that are shown by length and hash."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes {hashlib.sha256(self).hexdigest()[:8]}>"


def shown(result: tuple[str, Any]) -> str:
    return repr(result[1])[:300] if result[0] == "ok" else str(result[1])
