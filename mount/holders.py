"""Who keeps a mount from ending: processes that use it here, and other mount namespaces that show it.

Owns: the look through /proc. Asks no daemon: readlink(2) there needs none. What a process of another user's does is seen by
root only. Invariant: a process that ends meanwhile is left out, never an error.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cascadefs.mount import mountinfo

NAMED_AT_MOST = 4


@dataclass(frozen=True, slots=True)
class Holder:
    """A process and the path by which it holds the mount, as it sees it."""

    pid: int
    name: str
    path: Path

    def __str__(self) -> str:
        return f"process {self.pid} ({self.name}) at {self.path}"


def named(found: list[Holder]) -> str:
    """For one line."""
    more = f" and {len(found) - NAMED_AT_MOST} more" if len(found) > NAMED_AT_MOST else ""
    return ", ".join(map(str, found[:NAMED_AT_MOST])) + more


def elsewhere(device: str) -> list[Holder]:
    """One process of each other mount namespace in which the superblock `device` is mounted."""
    found, seen = [], {_namespace("self")}
    for pid in _processes():
        namespace = _namespace(str(pid))
        if namespace is None or namespace in seen:
            continue
        seen.add(namespace)
        path = next((m.path for m in _mounted(pid) if m.is_ours and m.device == device), None)
        if path is not None:
            found.append(Holder(pid, _name(pid), path))
    return found


def everywhere() -> Iterator[tuple[Holder, str]]:
    """Each cascadefs of other namespaces: by whom it can be reached, and its device."""
    seen = {_namespace("self")}
    for pid in _processes():
        namespace = _namespace(str(pid))
        if namespace is not None and namespace not in seen:
            seen.add(namespace)
            yield from ((Holder(pid, _name(pid), m.path), m.device) for m in _mounted(pid) if m.is_ours and m.root == "/")


def users(mountpoint: Path) -> list[Holder]:
    """Processes with an open file, a working folder or a program below `mountpoint`, as this namespace sees it."""
    here, found = _namespace("self"), []
    for pid in _processes():
        if _namespace(str(pid)) == here:
            path = next((p for p in _paths(pid) if p == mountpoint or mountpoint in p.parents), None)
            if path is not None:
                found.append(Holder(pid, _name(pid), path))
    return found


def daemons(device: str) -> list[int]:
    """Processes that hold the connection of the superblock `device`, where the kernel tells it of a descriptor (Linux 6.18)."""
    wanted = f"fuse_connection:\t{device.partition(':')[2]}\n"
    found = []
    for pid in _processes():
        fds = [fd.name for fd in _entries(Path(f"/proc/{pid}/fd")) if _link(fd) == "/dev/fuse"]
        if any(wanted in _text(Path(f"/proc/{pid}/fdinfo/{fd}")) for fd in fds):
            found.append(pid)
    return found


def _processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid())


def _mounted(pid: int) -> list[mountinfo.Mounted]:
    try:
        return mountinfo.read(pid)
    except OSError:
        return []


def _paths(pid: int) -> Iterator[Path]:
    base = Path(f"/proc/{pid}")
    for link in (base / "cwd", base / "root", base / "exe", *_entries(base / "fd"), *_entries(base / "map_files")):
        if (target := _link(link)) is not None and target.startswith("/"):
            yield Path(target)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _link(path: Path) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _namespace(pid: str) -> str | None:
    return _link(Path(f"/proc/{pid}/ns/mnt"))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _name(pid: int) -> str:
    return _text(Path(f"/proc/{pid}/comm")).strip() or "?"
