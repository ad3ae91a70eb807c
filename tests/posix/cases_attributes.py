"""Attributes: mode, owner, link count, inode number, block size, umask, setgid folders, statfs."""

import errno
import os
import stat
from pathlib import Path

from .support import MIB, OTHER, case, in_child, opened, pattern, refused, rest


def mode_of(path: Path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


@case
def fresh_file(path: Path) -> None:
    with opened(path / "file", os.O_CREAT | os.O_WRONLY, 0o666):
        about = os.stat(path / "file")
    assert stat.S_ISREG(about.st_mode)
    assert stat.S_IMODE(about.st_mode) == 0o644
    assert (about.st_size, about.st_nlink, about.st_blocks) == (0, 1, 0)
    assert (about.st_uid, about.st_gid) == (os.geteuid(), os.getegid())
    assert about.st_dev == path.stat().st_dev


@case
def stat_and_fstat_agree(path: Path) -> None:
    (path / "file").write_bytes(pattern(12_345))
    with opened(path / "file") as fd:
        assert os.fstat(fd) == os.stat(path / "file") == os.lstat(path / "file")


@case
def block_size_is_a_power_of_two(path: Path) -> None:
    (path / "file").write_bytes(b"x")
    for entry in (path, path / "file"):
        size = entry.stat().st_blksize
        assert size >= 512
        assert size & (size - 1) == 0


@case
def blocks_count_the_bytes(path: Path) -> None:
    file = path / "file"
    file.write_bytes(pattern(3 * MIB))
    with opened(file) as fd:
        os.fsync(fd)
    blocks = file.stat().st_blocks
    assert 3 * MIB // 512 <= blocks <= 8 * MIB // 512
    os.truncate(file, 0)
    assert file.stat().st_blocks == 0


@case
def inode_numbers_are_distinct_and_stay(path: Path) -> None:
    files = [path / f"{index}" for index in range(50)]
    for file in files:
        file.write_bytes(b"equal")
    numbers = [file.stat().st_ino for file in files]
    assert len(set(numbers)) == 50
    rest(files[0])
    files[0].write_bytes(b"changed")
    os.rename(files[1], path / "moved")
    assert (path / "moved").stat().st_ino == numbers[1]
    assert [file.stat().st_ino for file in [files[0], *files[2:]]] == [numbers[0], *numbers[2:]]


@case
def chmod_by_path_and_descriptor(path: Path) -> None:
    (path / "file").write_bytes(b"x")
    for mode in (0, 0o777, 0o4755, 0o2711, 0o1644, 0o7777, 0o640):
        os.chmod(path / "file", mode)
        assert os.stat(path / "file").st_mode == stat.S_IFREG | mode
    with opened(path / "file") as fd:
        os.fchmod(fd, 0o604)
    assert mode_of(path / "file") == 0o604
    os.chmod(path, 0o1733)
    assert os.stat(path).st_mode == stat.S_IFDIR | 0o1733
    assert (path / "file").read_bytes() == b"x"


@case
def chmod_while_open_for_writing(path: Path) -> None:
    with opened(path / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"before ")
        os.chmod(path / "file", 0o400)
        os.write(fd, b"after")
        assert os.fstat(fd).st_size == 12
    assert mode_of(path / "file") == 0o400
    assert (path / "file").read_bytes() == b"before after"


@case
def chown_sets_one_or_both(path: Path) -> None:
    file = path / "file"
    file.touch()
    os.chown(file, 1234, 5678)
    assert (file.stat().st_uid, file.stat().st_gid) == (1234, 5678)
    os.chown(file, -1, 99)
    assert (file.stat().st_uid, file.stat().st_gid) == (1234, 99)
    os.chown(file, 77, -1)
    assert (file.stat().st_uid, file.stat().st_gid) == (77, 99)
    os.chown(file, 4_000_000_000, 4_000_000_001)
    assert (file.stat().st_uid, file.stat().st_gid) == (4_000_000_000, 4_000_000_001)
    with opened(file) as fd:
        os.fchown(fd, 1, 2)
    assert (file.stat().st_uid, file.stat().st_gid) == (1, 2)


@case
def chown_takes_set_id_of_all_but_folders(path: Path) -> None:
    os.mkfifo(path / "pipe")
    os.mknod(path / "socket", stat.S_IFSOCK | 0o600)
    (path / "file").touch()
    (path / "folder").mkdir()
    for name in ("pipe", "socket", "file", "folder"):
        os.chmod(path / name, 0o6755)
        os.chown(path / name, 1, -1)
        assert mode_of(path / name) == (0o6755 if name == "folder" else 0o755), name


@case
def lchown_changes_the_link_alone(path: Path) -> None:
    (path / "file").touch()
    os.symlink("file", path / "link")
    os.lchown(path / "link", 11, 12)
    assert (os.lstat(path / "link").st_uid, os.lstat(path / "link").st_gid) == (11, 12)
    assert (path / "file").stat().st_uid == os.geteuid()
    os.chown(path / "link", 13, 14)
    assert (path / "file").stat().st_uid == 13
    assert os.lstat(path / "link").st_uid == 11


@case
def chown_clears_suid_and_sgid(path: Path) -> None:
    file = path / "file"
    file.touch()
    os.chmod(file, 0o6755)
    os.chown(file, OTHER, OTHER)
    assert mode_of(file) == 0o755


@case
def attributes_survive_a_rest(path: Path) -> None:
    file = path / "file"
    file.write_bytes(pattern(100_000))
    os.chmod(file, 0o4751)
    os.chown(file, -1, OTHER)
    os.chmod(file, 0o4751)
    os.utime(file, ns=(1_000_000_001, 2_000_000_002))
    rest(file)
    about = file.stat()
    assert (mode_of(file), about.st_gid, about.st_size) == (0o4751, OTHER, 100_000)
    assert (about.st_atime_ns, about.st_mtime_ns) == (1_000_000_001, 2_000_000_002)


@case
def umask_applies_to_every_creation(path: Path) -> None:
    for umask in (0o000, 0o027, 0o777):
        os.umask(umask)
        os.close(os.open(path / f"file{umask}", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(path / f"folder{umask}", 0o777)
        os.mknod(path / f"node{umask}", stat.S_IFREG | 0o666)
        os.mkfifo(path / f"fifo{umask}", 0o666)
        assert mode_of(path / f"folder{umask}") == 0o777 & ~umask
        for kind in ("file", "node", "fifo"):
            assert mode_of(path / f"{kind}{umask}") == 0o666 & ~umask


@case
def umask_is_that_of_the_caller(path: Path) -> None:
    def create() -> None:
        os.umask(0o077)
        (path / "mine").touch(0o666)

    in_child(create)
    (path / "ours").touch(0o666)
    assert (mode_of(path / "mine"), mode_of(path / "ours")) == (0o600, 0o644)


@case
def special_bits_at_creation(path: Path) -> None:
    os.umask(0)
    os.close(os.open(path / "file", os.O_CREAT | os.O_WRONLY, 0o4755))
    os.mkdir(path / "sticky", 0o1777)
    assert mode_of(path / "file") == 0o4755
    assert mode_of(path / "sticky") == 0o1777


@case
def setgid_folder_hands_its_group_on(path: Path) -> None:
    folder = path / "folder"
    folder.mkdir()
    os.chown(folder, -1, OTHER)
    os.chmod(folder, 0o2775)
    (folder / "file").touch()
    (folder / "sub").mkdir()
    os.mkfifo(folder / "fifo")
    os.symlink("x", folder / "link")
    for name in ("file", "sub", "fifo", "link"):
        assert os.lstat(folder / name).st_gid == OTHER, name
    assert mode_of(folder / "sub") == 0o2755
    assert mode_of(folder / "file") == 0o644


@case
def statfs_is_honest(path: Path) -> None:
    about = os.statvfs(path)
    assert about.f_bsize == 4096
    assert about.f_frsize == 4096
    assert about.f_namemax == 255
    assert about.f_blocks > 0
    assert 0 < about.f_bavail <= about.f_bfree <= about.f_blocks
    assert about.f_files >= about.f_ffree
    (path / "file").touch()
    with opened(path / "file") as fd:
        assert os.fstatvfs(fd).f_blocks == about.f_blocks


@case
def descriptor_of_a_closed_file_is_ebadf(path: Path) -> None:
    with opened(path / "file", os.O_CREAT | os.O_RDWR) as fd:
        pass
    for call in (os.fstat, os.fsync, os.close):
        refused(errno.EBADF, call, fd)
