"""Moves of the random walk that take a name. Each draws its arguments, does one thing to both sides and compares."""

import contextlib
import os
import shutil
import stat

from hypothesis import strategies as st

from . import calls
from .choosing import BIG, CONTENT, MODES, PICK, SIZES, TIMES, XATTRS, Choosing, Draw, content
from .sides import Bytes


class ByName(Choosing):
    """Names, attributes, contents by name."""

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

        def call(side: int) -> None:
            fd = os.open(self.sides.at(side, path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o644)
            try:
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    os.write(fd, content(*what))
            finally:
                os.close(fd)

        self.sides.both(f"write_file {path!r}", call)
        self.sides.compare_name(path)

    def read_file(self, draw: Draw) -> None:
        pick = draw(PICK)
        path = self.file(pick)
        self.sides.both(f"read_file {path!r}", lambda side: Bytes(calls.read_all(self.sides.at(side, path))))

    def truncate(self, draw: Draw) -> None:
        pick = draw(PICK)
        size = draw(st.sampled_from([*SIZES, BIG, -1, 1 << 40]))
        path = self.file(pick) if pick % 4 else self.name(pick)
        self.sides.expect_same_size(path, size)
        self.did("truncate", path, lambda side: os.truncate(self.sides.at(side, path), size))
        if size == 1 << 40:
            self.sides.both("truncate", lambda side: os.truncate(self.sides.at(side, path), 5))

    def copy(self, draw: Draw) -> None:
        old = draw(PICK)
        new = draw(PICK)
        source, target = self.file(old), self.name(new)

        def call(side: int) -> None:
            one, other = self.sides.at(side, source), self.sides.at(side, target)
            if not os.path.exists(other) or stat.S_ISREG(os.stat(other).st_mode):
                shutil.copyfile(one, other)

        with contextlib.suppress(shutil.SameFileError):
            self.sides.both(f"copy {source!r} {target!r}", call)
        self.sides.compare_name(target)
