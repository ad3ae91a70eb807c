"""Folders: making and removing, link counts, listings that stay true while the folder changes, removed open folders."""

import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .support import Child, case, gates, libc, opened, refused

MANY = 3000


class Dirent(ctypes.Structure):
    _fields_ = [
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    ]


libc.opendir.restype = ctypes.c_void_p
libc.readdir.restype = ctypes.POINTER(Dirent)
libc.telldir.restype = ctypes.c_long


class Stream:
    """DIR* with what os.scandir lacks: positions, rewinding, dot and dotdot."""

    def __init__(self, path: Path) -> None:
        opened_at = libc.opendir(os.fsencode(path))
        assert opened_at, f"opendir failed: {os.strerror(ctypes.get_errno())}"
        self._dir = ctypes.c_void_p(opened_at)

    def read(self, count: int = 1 << 30) -> list[tuple[bytes, int]]:
        entries: list[tuple[bytes, int]] = []
        while len(entries) < count and (entry := libc.readdir(self._dir)):
            entries.append((entry.contents.d_name, entry.contents.d_ino))
        return entries

    def tell(self) -> int:
        return int(libc.telldir(self._dir))

    def seek(self, position: int) -> None:
        libc.seekdir(self._dir, ctypes.c_long(position))

    def rewind(self) -> None:
        libc.rewinddir(self._dir)

    def close(self) -> None:
        libc.closedir(self._dir)


@contextmanager
def stream(path: Path) -> Iterator[Stream]:
    made = Stream(path)
    try:
        yield made
    finally:
        made.close()


def fill(path: Path, count: int) -> set[str]:
    names = {f"name-{index:05d}" for index in range(count)}
    for name in names:
        os.mknod(path / name)
    return names


@case
def mkdir_and_rmdir_count_in_the_parent(path: Path) -> None:
    assert path.stat().st_nlink == 2
    (path / "one").mkdir()
    (path / "two").mkdir()
    (path / "file").touch()
    assert path.stat().st_nlink == 4
    assert (path / "one").stat().st_nlink == 2
    (path / "one").rmdir()
    assert path.stat().st_nlink == 3
    refused(errno.ENOENT, os.stat, path / "one")


@case
def mkdir_sets_the_mode(path: Path) -> None:
    os.mkdir(path / "folder", 0o750)
    assert os.stat(path / "folder").st_mode == stat.S_IFDIR | 0o750
    refused(errno.EEXIST, os.mkdir, path / "folder")
    os.mkdir(f"{path}/slash/")
    assert (path / "slash").is_dir()


@case
def full_folder_is_not_removed(path: Path) -> None:
    (path / "full" / "sub").mkdir(parents=True)
    refused(errno.ENOTEMPTY, os.rmdir, path / "full")
    refused(errno.ENOTEMPTY, os.rmdir, f"{path}/full/sub/..")
    refused(errno.EINVAL, os.rmdir, f"{path}/full/sub/.")
    (path / "full" / "sub").rmdir()
    (path / "full" / ".hidden").touch()
    refused(errno.ENOTEMPTY, os.rmdir, path / "full")
    (path / "full" / ".hidden").unlink()
    (path / "full").rmdir()
    assert os.listdir(path) == []


@case
def folder_made_again_is_empty(path: Path) -> None:
    folder = path / "folder"
    for _ in range(5):
        folder.mkdir()
        (folder / "file").write_bytes(b"x")
        (folder / "file").unlink()
        folder.rmdir()
    folder.mkdir()
    assert os.listdir(folder) == []


@case
def deep_folders(path: Path) -> None:
    deep = path
    for level in range(100):
        deep = deep / f"level-{level:02d}"
        deep.mkdir()
    (deep / "bottom").write_bytes(b"deep")
    assert (deep / "bottom").read_bytes() == b"deep"
    assert sum(len(files) for _, _, files in os.walk(path)) == 1


@case
def listing_of_many_names_is_complete(path: Path) -> None:
    names = fill(path, MANY)
    listing = os.listdir(path)
    assert len(listing) == MANY
    assert set(listing) == names
    for name in names:
        os.unlink(path / name)
    assert os.listdir(path) == []


@case
def listing_while_deleting_what_is_seen(path: Path) -> None:
    names = fill(path, MANY)
    seen: list[str] = []
    with os.scandir(path) as entries:
        for entry in entries:
            seen.append(entry.name)
            os.unlink(entry.path)
    assert sorted(seen) == sorted(names)
    assert os.listdir(path) == []


@case
def listing_while_deleting_what_is_ahead(path: Path) -> None:
    # Of each pair one name goes when its partner is seen; partners stay exactly once, whatever the order.
    names = fill(path, 1000)
    seen: list[str] = []
    removed: set[str] = set()
    with os.scandir(path) as entries:
        for entry in entries:
            seen.append(entry.name)
            partner = f"name-{int(entry.name[5:]) ^ 1:05d}"
            if entry.name not in removed and partner not in removed:
                os.unlink(path / partner)
                removed.add(partner)
    assert len(seen) == len(set(seen))
    assert names - removed <= set(seen)
    assert set(os.listdir(path)) == names - removed


@case
def listing_while_creating_repeats_nothing(path: Path) -> None:
    names = fill(path, 500)
    seen: list[str] = []
    with os.scandir(path) as entries:
        for count, entry in enumerate(entries):
            seen.append(entry.name)
            if count < 500:
                os.mknod(path / f"late-{count:05d}")
    assert len(seen) == len(set(seen))
    assert names <= set(seen)


@case
def positions_lead_back(path: Path) -> None:
    fill(path, 1000)
    with stream(path) as folder:
        folder.read(100)
        position = folder.tell()
        after = folder.read()
        assert len(after) == 902
        folder.seek(position)
        assert folder.read() == after
        folder.seek(position)
        assert folder.read(7) == after[:7]


@case
def listing_keeps_its_order(path: Path) -> None:
    fill(path, 300)
    assert os.listdir(path) == os.listdir(path)


@case
def dot_and_dotdot_are_listed_once(path: Path) -> None:
    (path / "sub").mkdir()
    with stream(path / "sub") as folder:
        listing = folder.read()
    assert sorted(name for name, _ in listing) == [b".", b".."]
    assert dict(listing)[b"."] == (path / "sub").stat().st_ino
    assert dict(listing)[b".."] == path.stat().st_ino


@case
def rewinding_sees_new_entries(path: Path) -> None:
    fill(path, 10)
    with stream(path) as folder:
        assert len(folder.read()) == 12
        (path / "new").touch()
        os.unlink(path / "name-00003")
        folder.rewind()
        names = {name for name, _ in folder.read()}
    assert b"new" in names
    assert b"name-00003" not in names
    assert len(names) == 12


@case
def listing_tells_kind_and_inode(path: Path) -> None:
    (path / "file").touch()
    (path / "folder").mkdir()
    os.symlink("file", path / "link")
    os.mkfifo(path / "fifo")
    with os.scandir(path) as entries:
        found = {entry.name: entry for entry in entries}
    assert found["file"].is_file(follow_symlinks=False)
    assert found["folder"].is_dir(follow_symlinks=False)
    assert found["link"].is_symlink()
    assert not found["fifo"].is_file(follow_symlinks=False)
    for name, entry in found.items():
        assert entry.inode() == os.lstat(path / name).st_ino


def remaining(folder: int | str) -> list[str]:
    """The ENOENT of getdents is an end to the C library; a file system may say ENOENT already when it is opened."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


@case
def removed_open_folder_is_dead(path: Path) -> None:
    (path / "gone").mkdir()
    with opened(path / "gone", os.O_RDONLY | os.O_DIRECTORY) as fd:
        (path / "gone").rmdir()
        assert os.fstat(fd).st_nlink == 0
        refused(errno.ENOENT, os.open, "new", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
        refused(errno.ENOENT, os.mkdir, "new", dir_fd=fd)
        assert remaining(fd) == []
    assert os.listdir(path) == []


@case
def removed_working_folder_is_dead(path: Path) -> None:
    (path / "gone").mkdir()
    with gates(2) as (inside, removed):

        def stand_in_it() -> None:
            os.chdir(path / "gone")
            inside.open()
            removed.wait()
            refused(errno.ENOENT, os.getcwd)
            assert remaining(".") == []
            refused(errno.ENOENT, os.mkdir, "new")

        child = Child(stand_in_it)
        inside.wait()
        (path / "gone").rmdir()
        removed.open()
        child.finish()


@case
def fsync_on_folders(path: Path) -> None:
    with opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        (path / "file").write_bytes(b"x")
        os.fsync(fd)
        os.rename(path / "file", path / "moved")
        os.fdatasync(fd)
    assert (path / "moved").read_bytes() == b"x"


@case
def open_folder_follows_its_rename(path: Path) -> None:
    (path / "folder").mkdir()
    (path / "folder" / "file").touch()
    with opened(path / "folder", os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.rename(path / "folder", path / "moved")
        assert os.listdir(fd) == ["file"]
        assert os.fstat(fd).st_ino == (path / "moved").stat().st_ino
