"""Permissions: what an ordinary user may and may not do; the suite itself runs as root.

Each child works in the folder of the case by relative names: the way to it may be closed to its user.
"""

import errno
import os
import stat
from pathlib import Path

from .support import NOBODY, OTHER, Child, as_user, case, gates, in_child, opened, refused, user_work

STAFF = 5000


def file_of(path: Path, mode: int, uid: int = 0, gid: int = 0, name: str = "file") -> Path:
    file = path / name
    file.write_bytes(b"content")
    os.chown(file, uid, gid)
    os.chmod(file, mode)
    return file


def open_to_all(path: Path, mode: int = 0o777) -> None:
    os.chmod(path, mode)


@case
def private_file_is_closed_to_others(path: Path) -> None:
    file_of(path, 0o600)

    def intrude() -> None:
        refused(errno.EACCES, os.open, "file", os.O_RDONLY)
        refused(errno.EACCES, os.open, "file", os.O_WRONLY)
        refused(errno.EACCES, os.truncate, "file", 0)
        assert os.stat("file").st_size == 7

    as_user(path, intrude)
    assert (path / "file").read_bytes() == b"content"


@case
def readable_file_is_not_writable(path: Path) -> None:
    file_of(path, 0o644)

    def read_only() -> None:
        with opened("file") as fd:
            assert os.read(fd, 100) == b"content"
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
            refused(errno.EACCES, os.open, "file", flags)

    as_user(path, read_only)
    assert (path / "file").read_bytes() == b"content"


@case
def owner_bits_count_for_the_owner_alone(path: Path) -> None:
    file_of(path, 0o077, uid=NOBODY)
    as_user(path, lambda: refused(errno.EACCES, os.open, "file", os.O_RDONLY))
    as_user(path, lambda: os.close(os.open("file", os.O_RDWR)), uid=OTHER)


@case
def group_bits_count_for_members(path: Path) -> None:
    file_of(path, 0o640, gid=STAFF)
    as_user(path, lambda: os.close(os.open("file", os.O_RDONLY)), groups=(STAFF,))
    as_user(path, lambda: refused(errno.EACCES, os.open, "file", os.O_WRONLY), groups=(STAFF,))
    as_user(path, lambda: refused(errno.EACCES, os.open, "file", os.O_RDONLY))
    os.chmod(path / "file", 0o604)
    as_user(path, lambda: refused(errno.EACCES, os.open, "file", os.O_RDONLY), groups=(STAFF,))


@case
def folder_of_another_is_not_changed(path: Path) -> None:
    file_of(path, 0o666)
    (path / "sub").mkdir()

    def intrude() -> None:
        refused(errno.EACCES, os.open, "new", os.O_CREAT | os.O_WRONLY)
        refused(errno.EACCES, os.mkdir, "new")
        refused(errno.EACCES, os.mkfifo, "new")
        refused(errno.EACCES, os.symlink, "x", "new")
        refused(errno.EACCES, os.link, "file", "new")
        refused(errno.EACCES, os.unlink, "file")
        refused(errno.EACCES, os.rmdir, "sub")
        refused(errno.EACCES, os.rename, "file", "new")

    as_user(path, intrude)
    assert sorted(os.listdir(path)) == ["file", "sub"]


@case
def creation_belongs_to_the_caller(path: Path) -> None:
    open_to_all(path)

    def create() -> None:
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir("folder")
        os.symlink("x", "link")
        os.mkfifo("fifo")

    as_user(path, create, uid=OTHER)
    for name in ("file", "folder", "link", "fifo"):
        about = os.lstat(path / name)
        assert (about.st_uid, about.st_gid) == (OTHER, OTHER), name
    assert stat.S_IMODE(os.stat(path / "file").st_mode) == 0o644


@case
def read_only_creation_can_be_filled(path: Path) -> None:
    open_to_all(path)

    def create() -> None:
        with opened("file", os.O_CREAT | os.O_WRONLY, 0o400) as fd:
            os.write(fd, b"filled")
        refused(errno.EACCES, os.open, "file", os.O_WRONLY)
        with opened("file") as fd:
            assert os.read(fd, 100) == b"filled"

    as_user(path, create)


@case
def folder_without_search_hides_its_entries(path: Path) -> None:
    (path / "locked").mkdir()
    file_of(path / "locked", 0o666)
    os.chmod(path / "locked", 0o744)

    def look() -> None:
        assert os.listdir("locked") == ["file"]
        refused(errno.EACCES, os.stat, "locked/file")
        refused(errno.EACCES, os.open, "locked/file", os.O_RDONLY)
        refused(errno.EACCES, os.chdir, "locked")

    as_user(path, look)


@case
def folder_without_read_opens_known_names(path: Path) -> None:
    (path / "blind").mkdir()
    file_of(path / "blind", 0o644)
    os.chmod(path / "blind", 0o711)

    def look() -> None:
        refused(errno.EACCES, os.listdir, "blind")
        with opened("blind/file") as fd:
            assert os.read(fd, 100) == b"content"

    as_user(path, look)


@case
def entry_cached_by_root_is_checked_for_others(path: Path) -> None:
    (path / "locked").mkdir(0o700)
    file = file_of(path / "locked", 0o666)
    assert file.read_bytes() == b"content"
    as_user(path, lambda: refused(errno.EACCES, os.stat, "locked/file"))
    os.chmod(path / "locked", 0o755)
    as_user(path, lambda: os.close(os.open("locked/file", os.O_RDWR)))


@case
def open_descriptor_outlives_the_permission(path: Path) -> None:
    file = file_of(path, 0o666)

    with gates(2) as (has_opened, closed):

        def keep_using() -> None:
            with opened("file", os.O_RDWR) as fd:
                has_opened.open()
                closed.wait()
                os.pwrite(fd, b"CON", 0)
                assert os.pread(fd, 100, 0) == b"CONtent"
            refused(errno.EACCES, os.open, "file", os.O_RDONLY)

        child = Child(user_work(path, keep_using))
        has_opened.wait()
        os.chmod(file, 0)
        closed.open()
        child.finish()
    assert file.read_bytes() == b"CONtent"


@case
def only_the_owner_changes_attributes(path: Path) -> None:
    file_of(path, 0o666)

    def intrude() -> None:
        refused(errno.EPERM, os.chmod, "file", 0o777)
        refused(errno.EPERM, os.chown, "file", NOBODY, -1)
        refused(errno.EPERM, os.chown, "file", -1, NOBODY)
        refused(errno.EPERM, os.utime, "file", (1, 1))
        # Setting both times to now needs no more than permission to write.
        os.utime("file")

    as_user(path, intrude)
    os.chmod(path / "file", 0o644)
    as_user(path, lambda: refused(errno.EACCES, os.utime, "file"))


@case
def owner_cannot_give_away(path: Path) -> None:
    file_of(path, 0o644, uid=NOBODY, gid=NOBODY)

    def give() -> None:
        refused(errno.EPERM, os.chown, "file", OTHER, -1)
        refused(errno.EPERM, os.chown, "file", -1, OTHER)
        os.chown("file", -1, STAFF)
        os.chmod("file", 0o600)

    as_user(path, give, groups=(STAFF,))
    about = (path / "file").stat()
    assert (about.st_uid, about.st_gid, stat.S_IMODE(about.st_mode)) == (NOBODY, STAFF, 0o600)


@case
def chmod_outside_the_group_loses_setgid(path: Path) -> None:
    file_of(path, 0o755, uid=NOBODY, gid=STAFF)
    as_user(path, lambda: os.chmod("file", 0o2755))
    assert stat.S_IMODE((path / "file").stat().st_mode) == 0o755
    as_user(path, lambda: os.chmod("file", 0o2755), groups=(STAFF,))
    assert stat.S_IMODE((path / "file").stat().st_mode) == 0o2755


@case
def write_by_another_clears_suid(path: Path) -> None:
    file = file_of(path, 0o6777)

    def write() -> None:
        with opened("file", os.O_WRONLY) as fd:
            os.write(fd, b"x")

    as_user(path, write)
    assert stat.S_IMODE(file.stat().st_mode) == 0o777
    assert file.read_bytes() == b"xontent"


@case
def truncate_by_another_clears_suid(path: Path) -> None:
    file = file_of(path, 0o6777)
    as_user(path, lambda: os.truncate("file", 3))
    assert stat.S_IMODE(file.stat().st_mode) == 0o777
    assert file.read_bytes() == b"con"


@case
def chown_by_the_owner_clears_suid(path: Path) -> None:
    file = file_of(path, 0o6755, uid=NOBODY, gid=NOBODY)
    as_user(path, lambda: os.chown("file", -1, STAFF), groups=(STAFF,))
    assert stat.S_IMODE(file.stat().st_mode) == 0o755


@case
def sticky_folder_protects_the_files_of_others(path: Path) -> None:
    open_to_all(path, 0o1777)
    file_of(path, 0o666, uid=OTHER, name="theirs")
    file_of(path, 0o666, uid=NOBODY, name="mine")
    (path / "folder").mkdir()

    def try_all() -> None:
        refused(errno.EPERM, os.unlink, "theirs")
        refused(errno.EPERM, os.rename, "theirs", "new")
        refused(errno.EPERM, os.rename, "mine", "theirs")
        refused(errno.EPERM, os.rmdir, "folder")
        os.rename("mine", "still mine")
        os.unlink("still mine")

    as_user(path, try_all)
    assert sorted(os.listdir(path)) == ["folder", "theirs"]


@case
def access_asks_for_the_caller(path: Path) -> None:
    file_of(path, 0o640)
    file_of(path, 0o601, name="run")

    def ask() -> None:
        assert os.access("file", os.F_OK)
        assert not os.access("file", os.R_OK)
        assert not os.access("file", os.W_OK)
        assert not os.access("missing", os.F_OK)
        assert not os.access(".", os.W_OK)
        assert os.access(".", os.R_OK | os.X_OK)

    as_user(path, ask)
    assert os.access(path / "file", os.R_OK | os.W_OK)
    # Root may read and write all, but runs only what somebody may run.
    assert not os.access(path / "file", os.X_OK)


@case
def device_nodes_need_privilege(path: Path) -> None:
    open_to_all(path)
    as_user(path, lambda: refused(errno.EPERM, os.mknod, "null", stat.S_IFCHR | 0o666, os.makedev(1, 3)))
    assert os.listdir(path) == []


@case
def attribute_of_an_unreadable_file_is_closed(path: Path) -> None:
    os.setxattr(file_of(path, 0o600), "user.test", b"secret")
    file_of(path, 0o644, name="readable")

    def ask() -> None:
        refused(errno.EACCES, os.getxattr, "file", "user.test")
        refused(errno.EACCES, os.setxattr, "file", "user.test", b"x")
        refused(errno.EACCES, os.setxattr, "readable", "user.test", b"x")
        refused(errno.EACCES, os.removexattr, "readable", "user.test")

    as_user(path, ask)
    assert os.getxattr(path / "file", "user.test") == b"secret"


@case
def root_passes_every_check(path: Path) -> None:
    file = file_of(path, 0, uid=NOBODY)
    os.chmod(path, 0)

    def use() -> None:
        with opened(file, os.O_RDWR) as fd:
            os.pwrite(fd, b"ROOT", 0)
        file.rename(path / "moved")

    in_child(use)
    os.chmod(path, 0o755)
    assert (path / "moved").read_bytes() == b"ROOTent"
