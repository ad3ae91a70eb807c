"""Makes the small store whose archives lie here, with the release's own code, as root:
`python tests/data/make_store.py OUT.tar.xz`.

It is mounted, used, and killed with its whole tree, so that it has all that a release may leave behind: sealed and open
extents, dead records, objects and staged files in memory, a log of patches, links, attributes. The archive holds store/,
memory/ (the tier) and expected.json: what each name was, when all was durable and in the end.
"""

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

KIB, MIB = 1 << 10, 1 << 20
CASCADEFS = [sys.executable, "-m", "cascadefs.mount.cli"]


def content(name: str, size: int) -> bytes:
    """No two blocks of 4 KiB are equal, and xz finds most of it again."""
    page = hashlib.shake_256(os.fsencode(name)).digest(KIB) * 4
    return b"".join(number.to_bytes(8, "little") + page[8:] for number in range(-(-size // len(page))))[:size]


def cascadefs(*words: object) -> str:
    environ = os.environ | {"CASCADEFS_EXTENT_SIZE": "8MiB"}
    return subprocess.run([*CASCADEFS, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True, env=environ).stdout


def write(path: Path, size: int, mtime_s: int = 1_700_000_000) -> None:
    path.write_bytes(content(path.name, size))
    os.utime(path, (mtime_s, mtime_s))


def durable_part(top: Path) -> None:
    (top / "folder" / "deeper").mkdir(parents=True, mode=0o750)
    write(top / "folder" / "small", 5000)
    write(top / "folder" / "deeper" / "long", 9 * MIB)
    write(top / "folder" / "deeper" / "gone", 2 * MIB)
    (top / "folder" / "empty").touch()
    (top / "folder" / "equal").write_bytes(content("small", 5000))
    os.link(top / "folder" / "small", top / "another name")
    os.symlink("folder/small", top / "link")
    os.mkfifo(top / "pipe", 0o640)
    with open(top / "sparse", "wb") as file:
        file.truncate(32 * MIB)
        os.pwrite(file.fileno(), content("sparse", 4096), 20 * MIB)
    write(top / "gr\u00fc\u00df \u2603", 100)
    write(Path(os.fsdecode(os.fsencode(top) + b"/odd \xff\xfe\n name")), 10)
    os.setxattr(top / "folder" / "small", "user.note", b"kept")
    os.setxattr(top / "folder", "user.large", bytes(range(256)) * 64)
    os.chmod(top / "folder" / "small", 0o4711)
    os.chown(top / "folder" / "equal", 12345, 54321)


def synced_part(top: Path) -> int:
    """A file that is synced again and again: its last versions are patches. It stays open."""
    fd = os.open(top / "synced", os.O_RDWR | os.O_CREAT, 0o600)
    os.pwrite(fd, content("synced", 512 * KIB), 0)
    for turn in range(6):
        os.pwrite(fd, f"turn {turn}".encode(), 100_000 * turn)
        os.fsync(fd)
    os.utime(fd, (1_700_000_000, 1_700_000_000))  # an archive keeps no nanoseconds
    os.fsync(fd)
    return fd


def later_part(top: Path) -> int:
    """What only memory has when the tree is killed. The last one is open."""
    (top / "folder" / "deeper" / "gone").unlink()
    for number in range(5):
        write(top / f"object {number}", 100_000 + number)
    time.sleep(2)  # they are sealed
    write(top / "staged", 70_000)
    os.rename(top / "staged", top / "moved")
    fd = os.open(top / "open", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(fd, content("open", 30_000))
    os.utime(fd, (1_700_000_000, 1_700_000_000))
    return fd


def described(top: Path) -> dict[str, dict[str, object]]:
    """What each name below a folder is."""
    found = dict[str, dict[str, object]]()
    for folder, folders, names in os.walk(os.fsencode(top)):
        for path in (os.path.join(folder, name) for name in folders + names):
            found[os.fsdecode(os.path.relpath(path, os.fsencode(top)))] = description(path)
    return found


def description(path: bytes) -> dict[str, object]:
    state = os.lstat(path)
    return {
        "mode": state.st_mode,
        "owner": [state.st_uid, state.st_gid],
        "links": state.st_nlink,
        "size": state.st_size,
        "mtime_ns": state.st_mtime_ns,
        "digest": digest(path, state.st_mode),
        "target": target(path, state.st_mode),
        "xattrs": {key: os.getxattr(path, key, follow_symlinks=False).hex() for key in listed(path)},
    }


def listed(path: bytes) -> list[str]:
    return sorted(key for key in os.listxattr(path, follow_symlinks=False) if key.startswith("user."))


def digest(path: bytes, mode: int) -> str | None:
    if not stat.S_ISREG(mode):
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def target(path: bytes, mode: int) -> str | None:
    return os.fsdecode(os.readlink(path)) if stat.S_ISLNK(mode) else None


def main(out: Path) -> None:
    base = Path(tempfile.mkdtemp(prefix="cascadefs-make-store-"))
    store, top = base / "store", base / "mnt"
    cascadefs("mount", top, "--store", store, "--shm-size", "64MiB")
    durable_part(top)
    cascadefs("flush", top)
    left_open = [synced_part(top)]
    expected = {"durable": described(top)}
    left_open.append(later_part(top))
    expected["with memory"] = described(top)
    (base / "expected.json").write_text(json.dumps(expected, indent=1))
    status = json.loads(cascadefs("status", top, "--json"))
    for pid in (status["keeper_pid"], status["worker_pid"]):
        os.kill(pid, signal.SIGKILL)
    memory = Path(json.loads((store / "memory.json").read_text())["folder"])
    with tarfile.open(out, "w:xz") as archive:
        for path, name in ((store, "store"), (memory, "memory"), (base / "expected.json", "expected.json")):
            archive.add(path, name)
    for mounted in (top, memory):
        subprocess.run(["umount", "-l", mounted], check=False)
    shutil.rmtree(memory)
    shutil.rmtree(base)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
