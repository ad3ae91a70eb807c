"""The random walk: hypothesis draws operations, and now and then what a store does behind them (seal, evict, restart).

Owns: the rules and how they choose names, sizes and contents. Knows the mount only by `Plant`, which can flush, evict and
restart it. Invariant: a rule does one thing to both sides and compares; it never repairs a difference.
"""

import contextlib
import os
import random
import shutil
import stat
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar, Protocol, TypeAlias

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from . import calls
from .sides import JUDGE, MOUNT, Bytes, Mapped, Opened, Sides

NAMES = ["a", "b", "c", "d", "d/a", "d/b", "d/e", "d/e/a", "f", "f/a", "f/b", "n" * 255]
ODD_NAMES = ["m" * 256, "d/", "a/x", "f/../b", ".", "d/..", "missing/a", "d/e/", "."]
SIZES = [0, 1, 7, 4095, 4096, 4097, 10_000, 65_536, 70_001, 300_000]
BIG = 5 * 1024 * 1024 + 3  # more than one block, more than the machine's promote limit
OFFSETS = [0, 0, 0, 1, 100, 4096, 8191, 65_536, 200_000, 1 << 20]
MODES = [0o000, 0o400, 0o600, 0o644, 0o755, 0o777, 0o2755, 0o4755, 0o6711, 0o1777]
TIMES = [(0, 0), (1, 1), (1_000_000_007, 123_456_789), (4_294_967_296, 5), (0, calls.UTIME_OMIT), (0, calls.UTIME_NOW), (-7, 0)]
XATTRS = ["user.a", "user.b", "trusted.t", "security.s", "user." + "x" * 250, "user.", "plain"]  # no ACLs: README
ACCESS = [os.O_RDONLY, os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR]
FLAGS = [0, 0, 0, os.O_CREAT, os.O_CREAT, os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_NOFOLLOW, os.O_DIRECTORY, os.O_DIRECT]
ON_MAPPINGS = ["unmap", "write_mapped", "read_mapped"]
ON_HANDLES = ["close", "write", "read", "ftruncate", "fallocate", "lseek", "seek_content", "fsync", "copy_range", "map"]
ON_NAMES = ["mkdir", "rmdir", "unlink", "link", "rename", "symlink", "mknod", "listdir", "statfs"]
ATTRIBUTES = ["chmod", "chown", "utimens", "setxattr", "removexattr"]
CONTENTS = ["write_file", "write_file", "read_file", "truncate", "copy", "open", "open", "open"]
BEHIND = ["compare", "contents", "seal", "seal", "seal", "settle"]
# One in 700 restarts the mount, one in 90 pushes everything out of memory: they cost 2 and 0.2 seconds.
# hypothesis likes the first of a list best.
MOVES = [*CONTENTS, *ON_NAMES, *ATTRIBUTES, *ON_HANDLES, *ON_HANDLES, *ON_MAPPINGS, *ON_MAPPINGS, *BEHIND]
MOVES = [*MOVES * 11, *["flush", "evict"] * 8, "restart"]
Draw: TypeAlias = Callable[[Any], Any]
PICK = st.integers(0, 1 << 16)
CONTENT = st.tuples(st.sampled_from([*SIZES, *SIZES, *SIZES, BIG]), st.integers(0, 2))


@lru_cache(64)
def content(size: int, seed: int) -> bytes:
    """Few different contents, so that files are often equal; seed 0 is zeros."""
    return random.Random(seed).randbytes(size) if seed else bytes(size)


class Plant(Protocol):
    """What can be done to the mount behind the operations."""

    def fresh_roots(self) -> tuple[Any, Any]: ...
    def seal(self, path: Any) -> None: ...
    def settle(self) -> None: ...
    def flush(self) -> None: ...
    def evict(self) -> None: ...
    def restart(self, cold: bool) -> None: ...
    def kill_worker(self) -> None: ...
    def has_keeper(self) -> bool: ...


class Walk(RuleBasedStateMachine):
    """See the file's head. `plant` is set by whoever runs it; `counts` tells what was done, over all examples."""

    plant: ClassVar[Plant]
    counts: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.sides = Sides(self.plant.fresh_roots())
        for side in (MOUNT, JUDGE):
            self.furnish(side)

    def furnish(self, side: int) -> None:
        """Something to start with: two equal files, one under two names, one of more than a block, a folder."""
        for folder in ("d", "d/e"):
            os.mkdir(self.sides.at(side, folder))
        for path, what in (("a", (70_001, 1)), ("b", (70_001, 1)), ("d/a", (BIG, 2)), ("d/e/a", (0, 0))):
            with open(self.sides.at(side, path), "wb") as file:
                file.write(content(*what))
        os.link(self.sides.at(side, "b"), self.sides.at(side, "d/b"))

    def teardown(self) -> None:
        sides = self.sides
        try:
            sides.compare_all(contents=True)
        finally:
            sides.close_all()
            for root in sides.roots:
                shutil.rmtree(root)

    def count(self, what: str) -> None:
        for key in (what, "steps"):
            self.counts[key] = self.counts.get(key, 0) + 1

    @rule(what=st.sampled_from(MOVES), data=st.data())
    def step(self, what: str, data: Any) -> None:
        """One operation; those on handles and mappings need some."""
        if what in ON_MAPPINGS and not self.sides.mappings:
            what = "map"
        if what in ON_HANDLES and len(self.sides.handles) < 1 + (what == "copy_range"):
            what = "open"
        self.count(what)
        self.sides.trace.append(what)
        try:
            getattr(self, what)(data.draw)
        except AssertionError as e:
            e.add_note("the last operations:\n  " + "\n  ".join(self.sides.trace[-120:]))
            raise

    # --- choosing

    def name(self, pick: int) -> str:
        """Mostly a name that exists, else one that could, now and then one that cannot."""
        kind, rest = pick % 8, pick // 8
        existing = list(self.sides.walk()) if kind < 5 else []
        pool = existing or (ODD_NAMES if kind == 7 and rest % 4 == 0 else NAMES)
        return pool[rest % len(pool)]

    def file(self, pick: int) -> str:
        """A regular file, if there is one."""
        files = [path for path in self.sides.walk() if stat.S_ISREG(os.lstat(self.sides.at(JUDGE, path)).st_mode)]
        return files[pick % len(files)] if files else NAMES[pick % len(NAMES)]

    def opened(self, pick: int) -> Opened:
        return self.sides.handles[pick % len(self.sides.handles)]

    def did(self, what: str, path: str, call: Callable[[int], Any]) -> tuple[str, Any]:
        """One operation on a name: same result, same attributes afterwards, a sane ctime."""
        with self.sides.change_is_stamped(path):
            result = self.sides.both(f"{what} {path!r}", call)
        self.sides.compare_name(path)
        return result

    def leave_equal_readers(self, path: str) -> Callable[[], None]:
        """README: when files of equal content are open, a writer gets a new inode. The handles of before are closed after."""
        try:
            ino = os.stat(self.sides.at(JUDGE, path)).st_ino
        except OSError:
            return lambda: None
        if self.sides.users(ino) and self.sides.has_twin(ino):
            return lambda: self.sides.drop_users(ino)
        return lambda: self.sides.drop_unseen(ino)

    # --- names

    def mkdir(self, draw: Draw) -> None:
        pick = draw(PICK)
        mode = draw(st.sampled_from(MODES))
        path = self.name(pick)
        self.did("mkdir", path, lambda side: os.mkdir(self.sides.at(side, path), mode))

    def rmdir(self, draw: Draw) -> None:
        pick = draw(PICK)
        path = self.name(pick)
        self.did("rmdir", path, lambda side: os.rmdir(self.sides.at(side, path)))

    def unlink(self, draw: Draw) -> None:
        pick = draw(PICK)
        path = self.name(pick)
        self.did("unlink", path, lambda side: os.unlink(self.sides.at(side, path)))
        for opened in self.sides.handles:
            self.sides.compare_handle(opened)

    def link(self, draw: Draw) -> None:
        old = draw(PICK)
        new = draw(PICK)
        source, target = self.name(old), self.name(new)
        self.did(
            "link",
            target,
            lambda side: os.link(self.sides.at(side, source), self.sides.at(side, target), follow_symlinks=False),
        )
        self.sides.compare_name(source)

    def rename(self, draw: Draw) -> None:
        old = draw(PICK)
        new = draw(PICK)
        flags = draw(st.sampled_from([0, 0, 0, calls.RENAME_NOREPLACE, calls.RENAME_EXCHANGE, 3, 64]))
        source, target = self.name(old), self.name(new)
        self.did(
            "rename", target, lambda side: calls.renameat2(self.sides.at(side, source), self.sides.at(side, target), flags)
        )
        self.sides.compare_name(source)
        for folder in (source, target):
            self.sides.compare_name(os.path.dirname(folder) or ".")

    def symlink(self, draw: Draw) -> None:
        pick = draw(PICK)
        shows = draw(st.sampled_from(["a", "d", "d/a", "missing", "..", "x" * 4000, "loop"]))
        path = self.name(pick)
        self.did("symlink", path, lambda side: os.symlink(shows, self.sides.at(side, path)))

    def mknod(self, draw: Draw) -> None:
        pick = draw(PICK)
        kind = draw(st.sampled_from([stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFREG, stat.S_IFCHR]))
        mode = draw(st.sampled_from(MODES))
        path = self.name(pick)
        self.did("mknod", path, lambda side: os.mknod(self.sides.at(side, path), kind | mode, os.makedev(1, 3)))

    def listdir(self, draw: Draw) -> None:
        pick = draw(PICK)
        path = self.name(pick)

        def call(side: int) -> list[tuple[str, bool, bool, bool]]:
            with os.scandir(self.sides.at(side, path)) as entries:
                return sorted(
                    (e.name, e.is_dir(follow_symlinks=False), e.is_symlink(), e.is_file(follow_symlinks=False)) for e in entries
                )

        self.sides.both(f"listdir {path!r}", call)

    # --- attributes

    def chmod(self, draw: Draw) -> None:
        pick = draw(PICK)
        mode = draw(st.sampled_from(MODES))
        path = self.name(pick)
        self.did("chmod", path, lambda side: os.chmod(self.sides.at(side, path), mode))

    def chown(self, draw: Draw) -> None:
        pick = draw(PICK)
        owner = draw(st.sampled_from([(0, 0), (1, -1), (-1, 7), (65534, 65534), (-1, -1)]))
        path = self.name(pick)
        self.did("chown", path, lambda side: os.lchown(self.sides.at(side, path), *owner))

    def utimens(self, draw: Draw) -> None:
        pick = draw(PICK)
        atime = draw(st.sampled_from(TIMES))
        mtime = draw(st.sampled_from(TIMES))
        path = self.name(pick)
        self.did("utimens", path, lambda side: calls.utimensat(self.sides.at(side, path), atime, mtime))

    def setxattr(self, draw: Draw) -> None:
        pick = draw(PICK)
        key = draw(st.sampled_from(XATTRS))
        size = draw(st.sampled_from([0, 1, 100, 4000]))
        flags = draw(st.sampled_from([0, 0, 1, 2]))
        path = self.name(pick)
        self.did(
            "setxattr",
            path,
            lambda side: os.setxattr(self.sides.at(side, path), key, b"v" * size, flags, follow_symlinks=False),
        )

    def removexattr(self, draw: Draw) -> None:
        pick = draw(PICK)
        key = draw(st.sampled_from(XATTRS))
        path = self.name(pick)
        self.did("removexattr", path, lambda side: os.removexattr(self.sides.at(side, path), key, follow_symlinks=False))

    def statfs(self, draw: Draw) -> None:

        def call(side: int) -> tuple[int, int, int]:
            told = os.statvfs(self.sides.roots[side])
            assert told.f_bavail <= told.f_bfree <= told.f_blocks and told.f_favail <= told.f_files
            return told.f_bsize, told.f_frsize, told.f_namemax

        self.sides.both("statfs", call)

    # --- contents by name

    def write_file(self, draw: Draw) -> None:
        pick = draw(PICK)
        what = draw(CONTENT)
        path = self.name(pick)
        close_readers = self.leave_equal_readers(path)

        def call(side: int) -> None:
            fd = os.open(self.sides.at(side, path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o644)
            try:
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    os.write(fd, content(*what))
            finally:
                os.close(fd)

        self.sides.both(f"write_file {path!r}", call)
        close_readers()
        self.sides.compare_name(path)

    def read_file(self, draw: Draw) -> None:
        pick = draw(PICK)
        path = self.file(pick)
        self.sides.both(f"read_file {path!r}", lambda side: Bytes(calls.read_all(self.sides.at(side, path))))

    def truncate(self, draw: Draw) -> None:
        pick = draw(PICK)
        size = draw(st.sampled_from([*SIZES, BIG, -1, 1 << 40]))
        path = self.file(pick) if pick % 4 else self.name(pick)
        close_readers = self.leave_equal_readers(path)
        self.did("truncate", path, lambda side: os.truncate(self.sides.at(side, path), size))
        close_readers()
        if size == 1 << 40:
            self.sides.both("truncate", lambda side: os.truncate(self.sides.at(side, path), 5))

    def copy(self, draw: Draw) -> None:
        old = draw(PICK)
        new = draw(PICK)
        source, target = self.file(old), self.name(new)
        close_readers = self.leave_equal_readers(target)

        def call(side: int) -> None:
            one, other = self.sides.at(side, source), self.sides.at(side, target)
            if not os.path.exists(other) or stat.S_ISREG(os.stat(other).st_mode):
                shutil.copyfile(one, other)

        with contextlib.suppress(shutil.SameFileError):
            self.sides.both(f"copy {source!r} {target!r}", call)
        close_readers()
        self.sides.compare_name(target)

    # --- handles

    def open(self, draw: Draw) -> None:
        pick = draw(PICK)
        access = draw(st.sampled_from(ACCESS))
        one = draw(st.sampled_from(FLAGS))
        two = draw(st.sampled_from(FLAGS))
        mode = draw(st.sampled_from(MODES))
        path, flags = self.name(pick) if pick % 2 else self.file(pick), access | one | two | os.O_NONBLOCK
        if flags & os.O_CREAT and flags & os.O_DIRECTORY:
            return  # what that means depends on the kernel's version
        changes = access != os.O_RDONLY or flags & os.O_TRUNC
        close_readers = self.leave_equal_readers(path) if changes else lambda: None
        known = len(self.sides.handles)
        opened = self.sides.open(path, flags, mode)
        if opened is not None:
            self.sides.handles.remove(opened)
        close_readers()
        if opened is not None:
            self.sides.handles.insert(min(known, len(self.sides.handles)), opened)
            self.sides.compare_handle(opened)

    def close(self, draw: Draw) -> None:
        pick = draw(PICK)
        self.sides.close(self.opened(pick))

    def write(self, draw: Draw) -> None:
        pick = draw(PICK)
        what = draw(CONTENT)
        offset = draw(st.sampled_from(OFFSETS))
        at_position = draw(st.booleans())
        opened, data = self.opened(pick), content(*what)
        if opened.flags & os.O_DIRECT:
            return self.write_direct(opened, what[1], offset // calls.PAGE)

        def call(side: int) -> tuple[int, int]:
            fd = opened.fds[side]
            done = os.write(fd, data) if at_position else os.pwrite(fd, data, offset)
            return done, os.lseek(fd, 0, os.SEEK_CUR)

        self.sides.both(f"write {opened.path!r} {len(data)} at {'position' if at_position else offset}", call)
        return self.sides.compare_handle(opened)

    def write_direct(self, opened: Opened, seed: int, page: int) -> None:
        def call(side: int) -> int:
            with calls.mmap.mmap(-1, calls.PAGE) as buffer:
                buffer.write(content(calls.PAGE, seed))
                return os.pwrite(opened.fds[side], buffer, page * calls.PAGE)

        self.sides.both(f"direct write {opened.path!r}", call)
        self.sides.compare_handle(opened)

    def read(self, draw: Draw) -> None:
        pick = draw(PICK)
        size = draw(st.sampled_from([*SIZES, BIG]))
        offset = draw(st.sampled_from(OFFSETS))
        at_position = draw(st.booleans())
        opened = self.opened(pick)
        if opened.flags & os.O_DIRECT:
            aligned = offset // calls.PAGE * calls.PAGE
            pages = -(-size // calls.PAGE) * calls.PAGE
            self.sides.both(
                f"direct read {opened.path!r}", lambda side: Bytes(calls.pread_direct(opened.fds[side], pages, aligned))
            )
            return

        def call(side: int) -> tuple[Bytes, int]:
            fd = opened.fds[side]
            data = os.read(fd, size) if at_position else calls.pread_fully(fd, size, offset)
            return Bytes(data), os.lseek(fd, 0, os.SEEK_CUR)

        self.sides.both(f"read {opened.path!r} {size} at {'position' if at_position else offset}", call)

    def ftruncate(self, draw: Draw) -> None:
        pick = draw(PICK)
        size = draw(st.sampled_from([*SIZES, BIG, -1]))
        opened = self.opened(pick)
        self.sides.both(f"ftruncate {opened.path!r} {size}", lambda side: os.ftruncate(opened.fds[side], size))
        self.sides.compare_handle(opened)

    def fallocate(self, draw: Draw) -> None:
        pick = draw(PICK)
        mode = draw(st.sampled_from([0, 0, 1, 3, 3, 2, 8, 64]))
        offset = draw(st.sampled_from(OFFSETS))
        length = draw(st.sampled_from([*SIZES, -1]))
        opened = self.opened(pick)
        self.sides.both(
            f"fallocate {opened.path!r} {mode} {offset} {length}",
            lambda side: calls.fallocate(opened.fds[side], mode, offset, length),
        )
        self.sides.compare_handle(opened)

    def lseek(self, draw: Draw) -> None:
        pick = draw(PICK)
        offset = draw(st.sampled_from([*OFFSETS, -1]))
        whence = draw(st.sampled_from([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END]))
        opened = self.opened(pick)
        self.sides.both(f"lseek {opened.path!r} {offset} {whence}", lambda side: os.lseek(opened.fds[side], offset, whence))

    def seek_content(self, draw: Draw) -> None:
        """Where holes are may differ; what lies beyond the end may not."""
        pick = draw(PICK)
        offset = draw(st.sampled_from([*OFFSETS, 1 << 33]))
        whence = draw(st.sampled_from([os.SEEK_DATA, os.SEEK_HOLE]))
        opened = self.opened(pick)
        if offset >= os.fstat(opened.fds[JUDGE]).st_size:
            self.sides.both(f"seek {opened.path!r} {offset}", lambda side: os.lseek(opened.fds[side], offset, whence))

    def fsync(self, draw: Draw) -> None:
        pick = draw(PICK)
        data_only = draw(st.booleans())
        opened = self.opened(pick)
        self.sides.both(f"fsync {opened.path!r}", lambda side: (os.fdatasync if data_only else os.fsync)(opened.fds[side]))
        self.sides.compare_handle(opened)

    def copy_range(self, draw: Draw) -> None:
        one = draw(PICK)
        other = draw(PICK)
        size = draw(st.sampled_from(SIZES))
        start = draw(st.sampled_from(OFFSETS))
        to = draw(st.sampled_from(OFFSETS))
        source, target = self.opened(one), self.opened(other)
        if (source.flags | target.flags) & os.O_DIRECT:
            return

        def call(side: int) -> int:
            done = 0
            while done < size:
                got = os.copy_file_range(source.fds[side], target.fds[side], size - done, start + done, to + done)
                done += got
                if not got:
                    break
            return done

        self.sides.both(f"copy_file_range {source.path!r} {target.path!r} {size} {start} {to}", call)

    # --- mappings

    def map(self, draw: Draw) -> None:
        pick = draw(PICK)
        writable = draw(st.booleans())
        opened = self.opened(pick)
        if opened.flags & os.O_ACCMODE == os.O_RDWR or (not writable and opened.flags & os.O_ACCMODE == os.O_RDONLY):
            self.sides.map(opened, writable)

    def unmap(self, draw: Draw) -> None:
        pick = draw(PICK)
        self.sides.unmap(self.mapped(pick))

    def mapped(self, pick: int) -> Mapped:
        return self.sides.mappings[pick % len(self.sides.mappings)]

    def write_mapped(self, draw: Draw) -> None:
        pick = draw(PICK)
        offset = draw(st.sampled_from(OFFSETS))
        size = draw(st.sampled_from(SIZES))
        seed = draw(st.integers(0, 2))
        sync = draw(st.booleans())
        mapped = self.mapped(pick)
        size = min(size, mapped.end() - offset)
        if not mapped.writable or size <= 0:
            return
        self.sides.hazy.add(mapped.ino)
        for area in mapped.maps:
            area.write(offset, content(size, seed))
            if sync:
                area.sync()

    def read_mapped(self, draw: Draw) -> None:
        pick = draw(PICK)
        offset = draw(st.sampled_from(OFFSETS))
        size = draw(st.sampled_from([*SIZES, BIG]))
        mapped = self.mapped(pick)
        end = min(offset + size, mapped.end())
        self.sides.both("read_mapped", lambda side: Bytes(mapped.maps[side].read(offset, max(offset, end))))

    # --- what a store does behind the operations

    def compare(self, draw: Draw) -> None:
        self.sides.compare_all(contents=False)

    def contents(self, draw: Draw) -> None:
        self.sides.compare_all(contents=True)

    def seal(self, draw: Draw) -> None:
        self.plant.seal(self.sides.at(MOUNT, self.file(draw(PICK))))

    def settle(self, draw: Draw) -> None:
        self.plant.settle()
        self.sides.compare_all(contents=False)

    def flush(self, draw: Draw) -> None:
        self.plant.flush()
        self.sides.compare_all(contents=False)

    def evict(self, draw: Draw) -> None:
        self.plant.evict()
        self.sides.compare_all(contents=False)

    def restart(self, draw: Draw) -> None:
        """Unmount and mount again, seldom: it costs two seconds."""
        cold = draw(st.booleans())
        self.sides.close_all()
        self.plant.restart(cold)
        self.sides.compare_all(contents=True)

    @precondition(lambda self: self.plant.has_keeper())
    @rule(dice=st.integers(0, 49))
    def kill_worker(self, dice: int) -> None:
        """SIGKILL, with everything open; where a keeper brings the worker back."""
        if dice:
            return
        self.count("kill_worker")
        self.plant.kill_worker()
        self.sides.compare_all(contents=False)
