"""What the kernel says is mounted where, and which mount the user means by what was typed.

Owns: the reading of mountinfo (proc_pid_mountinfo(5)). Knows no daemon. Invariants: (1) Lines are bytes: a foreign mount may
have any bytes but zero in its path. (2) resolve() looks at no mountpoint: a daemon that hangs or has died holds up nobody.
"""

import errno
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cascadefs.errors import UserError

FILESYSTEM = "fuse.cascadefs"
LINKS_MAX = 40  # MAXSYMLINKS of the kernel
_ESCAPE = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mounted:
    """One line. `device`: major:minor of the superblock, which its bind mounts share; `root`: what of it is shown here."""

    number: int
    parent: int
    device: str
    root: str
    path: Path
    kind: str
    source: str

    @property
    def is_ours(self) -> bool:
        """Whether a cascadefs is behind it."""
        return self.kind == FILESYSTEM


def unescape(word: bytes) -> str:
    r"""The kernel writes space, tab, newline, backslash and # as \ooo. Bytes that are no UTF-8: as os.fsdecode() has them."""
    return os.fsdecode(_ESCAPE.sub(lambda found: bytes([int(found[1], 8) & 0xFF]), word))


def parse(text: bytes) -> list[Mounted]:
    """All lines that are whole. Only b"\\n" ends one and only b" " ends a word: everything else may stand in a path."""
    found = []
    for line in text.split(b"\n"):
        before, separator, after = line.partition(b" - ")
        words, behind = before.split(b" "), after.split(b" ")
        if separator and len(words) >= 6 and len(behind) >= 2:
            root, path, kind, source = (unescape(word) for word in (words[3], words[4], behind[0], behind[1]))
            found.append(Mounted(int(words[0]), int(words[1]), os.fsdecode(words[2]), root, Path(path), kind, source))
    return found


def read(pid: int | str = "self") -> list[Mounted]:
    """What is mounted in the namespace of a process. Asks no daemon."""
    return parse(Path(f"/proc/{pid}/mountinfo").read_bytes())


def topmost(path: Path, mounted: Iterable[Mounted]) -> Mounted | None:
    """What is seen at `path`, when several lie on each other there."""
    here = [m for m in mounted if m.path == path]
    covered = {m.parent for m in here}
    return next((m for m in reversed(here) if m.number not in covered), None)


def ours() -> list[Mounted]:
    """Each cascadefs that can be seen here, once for each path."""
    mounted = read()
    return [m for m in mounted if m.is_ours and topmost(m.path, mounted) == m]


def resolve(typed: Path) -> Path:
    """The absolute path that is meant: links, `.`, `..` and doubled slashes followed as the kernel does, but a mountpoint is
    taken as a folder without looking at it. What is missing is taken as it stands. UserError: a loop of links."""
    points = {m.path for m in read()}
    parts, found, links = _parts(os.path.join(_working_folder(typed), typed)), Path("/"), 0
    while parts:
        part = parts.pop()
        candidate = found.parent if part == ".." else found / part
        if part == ".." or candidate in points or (target := _link(candidate)) is None:
            found = candidate
            continue
        links += 1
        if links > LINKS_MAX:
            raise UserError(f"{typed}: {os.strerror(errno.ELOOP)}; give the path without links")
        found = Path("/") if target.startswith("/") else found
        parts += _parts(target)
    return found


def _working_folder(typed: Path) -> str:
    if typed.is_absolute():
        return "/"
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise UserError(f"the working folder is gone, so {typed} means nothing; give an absolute path") from None


def _parts(path: str) -> list[str]:
    """The first one last."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _link(path: Path) -> str | None:
    """Where a symbolic link leads; None: it is none, or cannot be looked at."""
    try:
        return os.readlink(path) if stat.S_ISLNK(os.lstat(path).st_mode) else None
    except OSError:
        return None
