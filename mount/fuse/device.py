"""Getting and losing a FUSE device: mount(2) as root, fusermount3 otherwise; what is mounted where.

Owns: the mount options. Knows no messages and no store. Invariant: a function that raises has left nothing mounted.
"""

import array
import contextlib
import ctypes
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cascadefs.errors import UserError
from cascadefs.ext.fuse_transport import LARGEST_SPLICED_READ
from cascadefs.mount import asking, mountinfo
from cascadefs.mount.mountinfo import FILESYSTEM
from cascadefs.mount.options import FLAGS, Options, parse

# Of an ordinary user's flags those that fusermount3 of all versions takes; reading moves no atime here anyway.
USERS_FLAGS = {"ro", "nosuid", "nodev", "noexec", "sync", "dirsync", "noatime"}
OURS = {"default_permissions", "allow_other"}  # always set where they can be
MNT_DETACH = 2
FIRST_USER_NAMESPACE = 0xEFFFFFFD  # PROC_USER_INIT_INO of include/uapi/linux/nsfs.h, linux/proc_ns.h before
UNPRIVILEGED_READ = 131072  # an unprivileged socket buffer holds 208 KiB: larger answers of pyfuse3 would not fit
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Device:
    """An open FUSE connection. `privileged`: mounted by root of the machine, so passthrough may be possible. `number`: the
    superblock, by which the mount is found also when its path has changed."""

    fd: int
    privileged: bool
    number: str


def kernel_release() -> tuple[int, ...]:
    """Such as (6, 9)."""
    return tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])


def may_mount() -> bool:
    """Whether this process has CAP_SYS_ADMIN."""
    status = Path("/proc/self/status").read_text()
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> 21 & 1)


def in_first_namespace() -> bool:
    """Whether root here is root of the machine. In a user namespace (rootless containers, `unshare -Ur`) root may mount, but
    the kernel refuses to register backing files."""
    return os.stat("/proc/self/ns/user").st_ino == FIRST_USER_NAMESPACE


def mounts() -> Iterator[Path]:
    """Mountpoints of cascadefs that can be seen here. Asks no daemon."""
    return iter([m.path for m in mountinfo.ours()])


def check_mountpoint(path: Path) -> None:
    """Raise UserError when nothing can be mounted there; clear a dead mount of ours. Makes nothing; `path` is resolved."""
    try:
        clear_dead(path)
        if not path.exists():
            return
        if not path.is_dir():
            raise UserError(f"the mountpoint {path} is not a folder; give a folder or a path that does not exist")
        if os.path.ismount(path):
            raise UserError(f"something is already mounted at {path}; unmount it or give another mountpoint")
        if any(path.iterdir()):
            raise UserError(f"the mountpoint {path} is not empty: its files would be hidden; give an empty folder")
    except OSError as e:
        raise UserError(f"the mountpoint {path} cannot be used: {e.strerror}; give another one") from e


def clear_dead(path: Path) -> bool:
    """Take away the dead mounts of ours at `path`, one may lie on the other; whether there were any. UserError: one lives."""
    cleared = 0
    while (top := mountinfo.topmost(path, mountinfo.read())) is not None and top.is_ours:
        try:
            asking.check_alive(path)
        except asking.DeadMount:
            unmount(path, lazy=True)
            cleared += 1
        else:
            raise UserError(f"cascadefs is already mounted at {path}; unmount it with: cascadefs umount {path}")
    return cleared > 0


def mount(path: Path, source: str, options: Sequence[str], portable: bool) -> Device:
    """Mount a new FUSE connection at `path`, shown as from `source`. `portable`: it is certain that the kernel will not serve
    reads by itself."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        if Path("/dev/fuse").exists():
            raise UserError("/dev/fuse is closed to you; mount as root, or let root open it: chmod 666 /dev/fuse")
        raise UserError("/dev/fuse is missing; load the kernel module: modprobe fuse (in a container: --device /dev/fuse)")
    given = parse(options)
    return _mount_directly(path, source, given, portable) if may_mount() else _mount_by_helper(path, source, given)


def remount(path: Path, options: Options) -> None:
    """Change the flags of the live mount at `path`. UserError."""
    if not may_mount():
        raise UserError(f"only root can remount {path}; unmount it and mount it with other options")
    if _libc.mount(None, os.fsencode(path), None, options.mask, None):
        raise UserError(f"cannot remount {path}: {os.strerror(ctypes.get_errno())}; unmount it and mount it again")


def _mount_directly(path: Path, source: str, options: Options, portable: bool) -> Device:
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    flags = options.mask | (FLAGS["nosuid"] | FLAGS["nodev"] if os.geteuid() else 0)
    data = [f"fd={fd}", "rootmode=40000", f"user_id={os.geteuid()}", f"group_id={os.getegid()}", *sorted(OURS)]
    if portable:
        data.append(f"max_read={LARGEST_SPLICED_READ}")
    data += [word for word in options.data if word not in OURS]
    kind = FILESYSTEM.encode()
    if _libc.mount(os.fsencode(source), os.fsencode(path), kind, flags, ",".join(data).encode()) == 0:
        return Device(fd, in_first_namespace(), number_at(path))
    code = ctypes.get_errno()
    os.close(fd)
    raise UserError(f"cannot mount at {path}: {os.strerror(code)}; check the options {','.join(options.words) or '(none)'}")


def _mount_by_helper(path: Path, source: str, options: Options) -> Device:
    """fusermount3 hands the descriptor over a socket (its documented _FUSE_COMMFD protocol)."""
    helper = shutil.which("fusermount3")
    if helper is None:
        raise UserError("not root and fusermount3 is missing; run: sudo apt-get install -y fuse3")
    given = [flag for flag in options.flags if flag in USERS_FLAGS]
    given += [word for word in options.data if word != "default_permissions"]
    name = re.sub(r"([\\,])", r"\\\1", source)
    words = ["default_permissions", f"max_read={UNPRIVILEGED_READ}", f"fsname={name}", "subtype=cascadefs", *given]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        done = subprocess.run(
            [helper, "-o", ",".join(words), "--", str(path)],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        if done.returncode:
            raise UserError(f"cannot mount at {path}: {done.stderr.strip() or 'fusermount3 failed'}")
        fds = array.array("i")
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_LEN(fds.itemsize))
        fds.frombytes(ancillary[0][2][: fds.itemsize])
    os.set_inheritable(fds[0], False)
    return Device(fds[0], False, number_at(path))


def number_at(path: Path) -> str:
    """major:minor of what is mounted at `path`; empty: nothing is."""
    found = mountinfo.topmost(path, mountinfo.read())
    return found.device if found is not None else ""


def detach_all(number: str) -> None:
    """Take a mount of ours away wherever this namespace shows it, as far as we may; what is in use lives on without a path."""
    for found in reversed(mountinfo.read()):
        if found.is_ours and found.device == number:
            with contextlib.suppress(UserError):
                unmount(found.path, lazy=True)


def unmount(path: Path, lazy: bool = False) -> None:
    """Take the mount away. UserError when it is in use."""
    if may_mount():
        if _libc.umount2(os.fsencode(path), MNT_DETACH if lazy else 0):
            code = ctypes.get_errno()
            raise UserError(f"cannot unmount {path}: {os.strerror(code)}; close what uses it (try: fuser -vm {path})")
        return
    command = ["fusermount3", "-uz" if lazy else "-u", "--", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise UserError(f"cannot unmount {path}: {done.stderr.strip()}; close what uses it")


def raise_read_ahead(path: Path, kib: int) -> None:
    """The kernel's default of 128 KiB would make the portable path read in small pieces. Without privilege it stays."""
    found = mountinfo.topmost(path, mountinfo.read())  # no stat(2): the caller serves this very mount
    if found is not None:
        with contextlib.suppress(OSError):
            Path(f"/sys/class/bdi/{found.device}/read_ahead_kb").write_text(str(kib))
