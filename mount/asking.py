"""Questions to a mount whose daemon may have died, or may hang.

Owns: the time that an answer may take, and what the user is told when there is none. Invariants: (1) A mount is asked by a
child: who waits for a daemon that hangs cannot be killed, and a thread of ours would then hold us up at exit. (2) What tells
life from death is never cached by the kernel: the attributes of a root are, those of a name that nobody has used are not.
"""

import contextlib
import errno
import json
import os
import select
import signal
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from cascadefs.errors import UserError
from cascadefs.mount import mountinfo
from cascadefs.mount.mountinfo import Mounted

ANSWER_S = 20  # a worker that died is replaced in less than a second, in a few on a machine that is very busy
DEAD = (errno.ENOTCONN, errno.ECONNABORTED)


class DeadMount(UserError):
    """Nobody serves it any more, and nobody will."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"the mount at {path} is dead: its daemon has ended; clear it (cascadefs umount {path}) or mount it")


class FailingMount(UserError):
    """A mount whose daemon lives and cannot read its own store."""


class SilentMount(UserError):
    """Its daemon lives and does not answer."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"the mount at {path} does not answer within {ANSWER_S} s; see cascadefs.log in its store")


def ask(path: Path, question: Callable[[], bytes]) -> bytes:
    """What `question` returns, in a child. OSError as it raises; DeadMount, SilentMount."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _answer(question, writer)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb", 0) as pipe:
            said = _read(pipe.fileno(), path)
        os.waitpid(child, 0)
    except SilentMount:
        os.kill(child, signal.SIGKILL)  # it ends when the daemon does; whoever is our parent collects it then
        raise
    if not said:
        raise UserError(f"the mount at {path} could not be asked")
    code = int.from_bytes(said[:4], "little")
    if code in DEAD:
        raise DeadMount(path)
    if code:
        raise OSError(code, os.strerror(code), str(path))
    return said[4:]


def _answer(question: Callable[[], bytes], writer: int) -> NoReturn:
    """In the child: an errno, then the answer."""
    with contextlib.suppress(BaseException):
        try:
            code, told = 0, question()
        except OSError as e:
            code, told = e.errno or errno.EIO, b""
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(code.to_bytes(4, "little") + told)
    os._exit(0)


def _read(fd: int, path: Path) -> bytes:
    """All of it. Each piece may take ANSWER_S: the pieces of an answer come at once."""
    said = b""
    while select.select([fd], [], [], ANSWER_S)[0]:
        if not (piece := os.read(fd, 1 << 16)):
            return said
        said += piece
    raise SilentMount(path)


def check_alive(path: Path) -> None:
    """DeadMount, SilentMount; nothing when it answers, if only by refusing us."""

    def look() -> bytes:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.lstat(path / f".cascadefs-{uuid.uuid4().hex}")
        return b""

    ask(path, look)


def stats(path: Path) -> dict[str, Any]:
    """The document that `cascadefs status --json` shows. UserError."""
    try:
        found: dict[str, Any] = json.loads(ask(path, lambda: (path / ".cascade/stats").read_bytes()))
    except PermissionError:
        who = "root and whoever" if os.geteuid() else "whoever"  # the kernel keeps root, too, from a user's mount
        raise UserError(f"the mount at {path} is another user's: only {who} mounted it may ask it") from None
    except OSError as e:
        raise FailingMount(f"the mount at {path} does not answer ({e.strerror}); see its log cascadefs.log") from e
    return found


def mountpoint(typed: Path | None) -> Path:
    """Of the mount that was named, or of the only one; it may be dead. UserError."""
    found = mount_of(typed)
    whole = whole_of(found)
    if whole is None:
        raise UserError(f"only the folder {found.root} of a cascadefs is mounted at {found.path}; name its whole mount")
    return whole.path


def whole_of(found: Mounted) -> Mounted | None:
    """Where the same mount can be seen with .cascade/: a bind mount may show a folder of it."""
    return next((m for m in (found, *mountinfo.ours()) if m.device == found.device and m.root == "/"), None)


def mount_of(typed: Path | None) -> Mounted:
    """The same, with what the kernel says of it."""
    known = mountinfo.ours()
    have = ", ".join(str(m.path) for m in known) or "none"
    if typed is None:
        if len({m.device for m in known}) != 1:
            raise UserError(f"say which mount is meant; mounted: {have}")
        return known[0]
    path = mountinfo.resolve(typed)
    found = next((m for m in known if m.path == path), None)
    if found is None:
        raise UserError(f"no cascadefs is mounted at {path}; mounted: {have}")
    return found


def mount_around(typed: Path) -> Path | None:
    """The mountpoint of the cascadefs that a file lies on."""
    path, known = mountinfo.resolve(typed), {m.path for m in mountinfo.ours()}
    return next((folder for folder in (path, *path.parents) if folder in known), None)
