"""Names: lengths, odd bytes, the errno of a wrong path, and special nodes (fifo, device, socket)."""

import errno
import os
import socket
import stat
from pathlib import Path

from .support import case, elsewhere, in_child, opened, refused

ODD_NAMES = (
    b"@ %",
    b"model@7b%2Fshard 01@0@a1b2c3.pt",
    b"line\nbreak",
    b"tab\tand\x01control\x7f",
    b"\xff\xfe not utf-8 \x80",
    "Grüße-\u6f22\u5b57-\U0001f4be".encode(),
    b"-rf",
    b" leading and trailing ",
    b"...",
    b"back\\slash*?[a]$HOME;'\"",
    b".hidden",
)


@case
def name_of_255_bytes(path: Path) -> None:
    name = path / ("n" * 251 + "@ %!")
    name.write_bytes(b"long")
    assert os.listdir(path) == [name.name]
    assert name.read_bytes() == b"long"
    name.unlink()
    assert os.listdir(path) == []


@case
def name_of_256_bytes_is_too_long(path: Path) -> None:
    long = path / ("n" * 256)
    (path / "file").touch()
    refused(errno.ENAMETOOLONG, os.open, long, os.O_CREAT | os.O_WRONLY)
    refused(errno.ENAMETOOLONG, os.stat, long)
    refused(errno.ENAMETOOLONG, os.mkdir, long)
    refused(errno.ENAMETOOLONG, os.mknod, long)
    refused(errno.ENAMETOOLONG, os.symlink, "target", long)
    refused(errno.ENAMETOOLONG, os.link, path / "file", long)
    refused(errno.ENAMETOOLONG, os.rename, path / "file", long)
    refused(errno.ENAMETOOLONG, os.unlink, long)
    refused(errno.ENAMETOOLONG, os.rmdir, long)
    assert os.listdir(path) == ["file"]


@case
def name_length_counts_bytes_not_characters(path: Path) -> None:
    (path / ("ü" * 127)).touch()
    refused(errno.ENAMETOOLONG, os.open, path / ("ü" * 128), os.O_CREAT | os.O_WRONLY)
    assert os.listdir(path) == ["ü" * 127]


@case
def path_of_4096_bytes_is_too_long(path: Path) -> None:
    refused(errno.ENAMETOOLONG, os.stat, str(path) + "/." * 2048)


@case
def odd_bytes_in_file_names(path: Path) -> None:
    folder = os.fsencode(path)
    for name in ODD_NAMES:
        with opened(folder + b"/" + name, os.O_CREAT | os.O_EXCL | os.O_WRONLY) as fd:
            os.write(fd, name)
    assert sorted(os.listdir(folder)) == sorted(ODD_NAMES)
    for name in ODD_NAMES:
        with opened(folder + b"/" + name) as fd:
            assert os.read(fd, 300) == name
        os.rename(folder + b"/" + name, folder + b"/+" + name)
    assert sorted(os.listdir(folder)) == sorted(b"+" + name for name in ODD_NAMES)


@case
def odd_bytes_in_folder_names_and_targets(path: Path) -> None:
    folder = os.fsencode(path)
    for name in ODD_NAMES:
        os.mkdir(folder + b"/" + name)
        os.symlink(name, folder + b"/l" + name)
        assert os.readlink(folder + b"/l" + name) == name
        assert os.path.samefile(folder + b"/l" + name, folder + b"/" + name)


@case
def names_are_bytes_without_folding(path: Path) -> None:
    names = {"Name", "name", "NAME", "caf\u00e9", "cafe\u0301"}
    for name in names:
        (path / name).write_text(name)
    assert set(os.listdir(path)) == names
    assert all((path / name).read_text() == name for name in names)


@case
def missing_name_is_enoent(path: Path) -> None:
    missing = path / "missing"
    for call in (os.open, os.truncate, os.chmod):
        refused(errno.ENOENT, call, missing, 0)
    for call in (os.stat, os.lstat, os.unlink, os.rmdir, os.readlink, os.listdir, os.getxattr):
        refused(errno.ENOENT, call, missing, *(["user.x"] if call is os.getxattr else []))
    refused(errno.ENOENT, os.chown, missing, 0, 0)
    refused(errno.ENOENT, os.utime, missing)
    refused(errno.ENOENT, os.rename, missing, path / "other")
    refused(errno.ENOENT, os.link, missing, path / "other")
    refused(errno.ENOENT, os.mkdir, missing / "child")
    refused(errno.ENOENT, os.open, missing / "child", os.O_CREAT | os.O_WRONLY)
    refused(errno.ENOENT, os.stat, "")


@case
def missing_name_appears_once_another_process_makes_it(path: Path) -> None:
    late = path / "late"
    for _ in range(3):
        refused(errno.ENOENT, os.stat, late)
    in_child(lambda: late.write_bytes(b"here") and None)
    assert late.read_bytes() == b"here"
    in_child(late.unlink)
    refused(errno.ENOENT, os.stat, late)


@case
def file_used_as_folder_is_enotdir(path: Path) -> None:
    file = path / "file"
    file.touch()
    refused(errno.ENOTDIR, os.stat, file / "child")
    refused(errno.ENOTDIR, os.open, file / "child", os.O_CREAT | os.O_WRONLY)
    refused(errno.ENOTDIR, os.mkdir, file / "child")
    refused(errno.ENOTDIR, os.unlink, file / "child")
    refused(errno.ENOTDIR, os.rename, file / "child", path / "other")
    refused(errno.ENOTDIR, os.listdir, file)
    refused(errno.ENOTDIR, os.rmdir, file)
    refused(errno.ENOTDIR, os.stat, f"{file}/")


@case
def folder_used_as_file_is_eisdir(path: Path) -> None:
    folder = path / "folder"
    folder.mkdir()
    refused(errno.EISDIR, os.open, folder, os.O_WRONLY)
    refused(errno.EISDIR, os.open, folder, os.O_RDWR)
    refused(errno.EISDIR, os.open, folder, os.O_CREAT | os.O_WRONLY)
    refused(errno.EISDIR, os.truncate, folder, 0)
    refused(errno.EISDIR, os.unlink, folder)
    with opened(folder) as fd:
        refused(errno.EISDIR, os.read, fd, 1)


@case
def taken_name_is_eexist(path: Path) -> None:
    (path / "file").write_bytes(b"kept")
    (path / "folder").mkdir()
    os.symlink("nowhere", path / "dangling")
    for taken in (path / "file", path / "folder", path / "dangling"):
        refused(errno.EEXIST, os.mkdir, taken)
        refused(errno.EEXIST, os.mknod, taken)
        refused(errno.EEXIST, os.symlink, "target", taken)
        refused(errno.EEXIST, os.link, path / "file", taken)
        refused(errno.EEXIST, os.open, taken, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    assert (path / "file").read_bytes() == b"kept"


@case
def symlink_circle_is_eloop(path: Path) -> None:
    os.symlink("b", path / "a")
    os.symlink("a", path / "b")
    refused(errno.ELOOP, os.stat, path / "a")
    refused(errno.ELOOP, os.open, path / "a", os.O_CREAT | os.O_WRONLY)
    refused(errno.ELOOP, os.stat, path / "a" / "child")
    assert stat.S_ISLNK(os.lstat(path / "a").st_mode)


@case
def wrong_kind_is_einval(path: Path) -> None:
    (path / "file").write_bytes(b"x")
    refused(errno.EINVAL, os.readlink, path / "file")
    refused(errno.EINVAL, os.readlink, path)
    refused(errno.EINVAL, os.truncate, path / "file", -1)
    with opened(path / "file", os.O_RDWR) as fd:
        refused(errno.EINVAL, os.ftruncate, fd, -1)
        refused(errno.EINVAL, os.lseek, fd, -1, os.SEEK_SET)
        refused(errno.EINVAL, os.pread, fd, 1, -1)
        refused(errno.EINVAL, os.pwrite, fd, b"x", -1)
    assert (path / "file").read_bytes() == b"x"


@case
def other_file_system_is_exdev(path: Path) -> None:
    (path / "file").write_bytes(b"stays")
    with elsewhere(path) as other:
        refused(errno.EXDEV, os.rename, path / "file", other / "file")
        refused(errno.EXDEV, os.link, path / "file", other / "file")
        (other / "back").touch()
        refused(errno.EXDEV, os.rename, other / "back", path / "back")
    assert os.listdir(path) == ["file"]


@case
def dot_and_dotdot_in_paths(path: Path) -> None:
    (path / "a" / "b").mkdir(parents=True)
    assert os.stat(f"{path}/a/./b/../b/.").st_ino == os.stat(path / "a" / "b").st_ino
    assert os.stat(f"{path}/a/b/..").st_ino == os.stat(path / "a").st_ino
    assert os.stat(f"{path}/a/b/../..").st_ino == os.stat(path).st_ino


@case
def fifo_carries_bytes(path: Path) -> None:
    os.mkfifo(path / "fifo", 0o640)
    about = os.lstat(path / "fifo")
    assert stat.S_ISFIFO(about.st_mode)
    assert stat.S_IMODE(about.st_mode) == 0o640
    with opened(path / "fifo", os.O_RDWR | os.O_NONBLOCK) as fd:
        os.write(fd, b"through")
        assert os.read(fd, 100) == b"through"
    assert os.lstat(path / "fifo").st_size == 0


@case
def device_nodes_keep_their_numbers(path: Path) -> None:
    for kind, device in ((stat.S_IFCHR, os.makedev(1, 3)), (stat.S_IFBLK, os.makedev(259, 70000))):
        node = path / f"node{kind}"
        os.mknod(node, kind | 0o600, device)
        about = os.lstat(node)
        assert stat.S_IFMT(about.st_mode) == kind
        assert stat.S_IMODE(about.st_mode) == 0o600
        assert about.st_rdev == device


@case
def mknod_makes_an_empty_regular_file(path: Path) -> None:
    os.mknod(path / "file", stat.S_IFREG | 0o604)
    assert stat.S_IMODE(os.lstat(path / "file").st_mode) == 0o604
    (path / "file").write_bytes(b"usable")
    assert (path / "file").read_bytes() == b"usable"


@case
def unix_socket_binds_and_answers(path: Path) -> None:
    with opened(path, os.O_RDONLY | os.O_DIRECTORY) as folder:
        # sun_path holds 108 bytes: the way through the descriptor is short wherever the folder lies.
        address = f"/proc/self/fd/{folder}/socket"
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            server.bind(address)
            server.listen(1)
            assert stat.S_ISSOCK(os.lstat(path / "socket").st_mode)
            client.settimeout(5)
            client.connect(address)
            with socket.socket(socket.AF_UNIX) as second:
                refused(errno.EADDRINUSE, second.bind, address)
        with socket.socket(socket.AF_UNIX) as late:
            refused(errno.ECONNREFUSED, late.connect, address)
