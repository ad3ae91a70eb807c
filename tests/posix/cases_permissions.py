"""Permissions: what an ordinary user may and may not do; the suite itself runs as root.

Each child works in the folder of the case by relative names: the way to it may be closed to its user.
"""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from .support import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    NOBODY,
    OTHER,
    Child,
    as_user,
    case,
    fallocate,
    gates,
    in_child,
    opened,
    refused,
    user_work,
)

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


def mode_of(file: Path | str) -> int:
    return stat.S_IMODE(os.stat(file).st_mode)


CHANGES: tuple[Callable[[int], object], ...] = (
    lambda fd: os.write(fd, b"x"),
    lambda fd: os.pwritev(fd, [b"a", b"b"], 3),
    lambda fd: os.ftruncate(fd, 5),
    lambda fd: fallocate(fd, 0, 0, 100),
    lambda fd: fallocate(fd, FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE, 0, 4096),
)
WAYS = (os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_SYNC, os.O_WRONLY | os.O_DSYNC, os.O_WRONLY | os.O_APPEND)


@case
def set_id_goes_at_the_change_not_at_the_open(path: Path) -> None:
    file = file_of(path, 0o666)
    for flags in WAYS:
        for change in CHANGES:
            os.chmod(file, 0o6777)

            def work(flags: int = flags, change: Callable[[int], object] = change) -> None:
                with opened("file", flags) as fd:
                    assert mode_of("file") == 0o6777
                    change(fd)
                    assert stat.S_IMODE(os.fstat(fd).st_mode) == mode_of("file") == 0o777

            as_user(path, work)
            assert mode_of(file) == 0o777


@case
def set_gid_without_execution_goes_outside_the_group(path: Path) -> None:
    file = file_of(path, 0o666, gid=STAFF)

    def work() -> None:
        with opened("file", os.O_WRONLY) as fd:
            os.write(fd, b"x")

    for groups, left in (((), 0o767), ((STAFF,), 0o2767)):
        os.chmod(file, 0o2767)
        as_user(path, work, groups=groups)
        assert mode_of(file) == left
        os.chmod(file, 0o2767)
        as_user(path, lambda: os.truncate("file", 3), groups=groups)
        assert mode_of(file) == left


@case
def root_keeps_set_id_and_truncation_at_open_takes_it(path: Path) -> None:
    file = file_of(path, 0o6777)
    with opened(file, os.O_WRONLY) as fd:
        os.write(fd, b"root")
    assert mode_of(file) == 0o6777
    for flags in (os.O_RDONLY, os.O_WRONLY):
        os.chmod(file, 0o6777)
        assert mode_of(file) == 0o6777  # what is known here must not be believed afterwards
        as_user(path, lambda flags=flags: os.close(os.open("file", flags | os.O_TRUNC)))  # type: ignore[misc]
        assert mode_of(file) == 0o777


@case
def a_new_set_id_file_loses_it_at_its_first_write(path: Path) -> None:
    open_to_all(path)

    def work() -> None:
        os.umask(0)
        with opened("new", os.O_CREAT | os.O_WRONLY, 0o4755) as fd:
            assert mode_of("new") == 0o4755
            os.write(fd, b"x")
            assert mode_of("new") == 0o755

    as_user(path, work)


@case
def capabilities_go_at_each_change(path: Path) -> None:
    file = file_of(path, 0o777)
    capability = bytes.fromhex("0100000204000000000000000000000000000000")
    for flags in WAYS:
        with opened(file, flags) as fd:  # one descriptor: also when they come while it is open
            for change in CHANGES:
                os.setxattr(file, "security.capability", capability)
                change(fd)
                assert os.listxattr(file) == []
    by_name: tuple[Callable[[], object], ...] = (
        lambda: os.truncate(file, 2),
        lambda: os.chown(file, 1, 1),
        lambda: os.close(os.open(file, os.O_WRONLY | os.O_TRUNC)),
    )
    for act in by_name:
        os.setxattr(file, "security.capability", capability)
        act()
        assert os.listxattr(file) == []
    os.setxattr(file, "security.capability", capability)
    as_user(path, lambda: Path("file").write_bytes(b"elf"))
    refused(errno.ENODATA, os.getxattr, file, "security.capability")


@case
def trusted_names_are_for_the_administrator(path: Path) -> None:
    file = file_of(path, 0o666)
    os.setxattr(file, "trusted.test", b"1")
    os.setxattr(file, "user.test", b"1")
    assert set(os.listxattr(file)) == {"trusted.test", "user.test"}

    def look() -> None:
        assert os.listxattr("file") == ["user.test"]
        refused(errno.ENODATA, os.getxattr, "file", "trusted.test")
        refused(errno.EPERM, os.setxattr, "file", "trusted.test", b"2")
        refused(errno.EPERM, os.removexattr, "file", "trusted.test")

    as_user(path, look)
    assert os.getxattr(file, "trusted.test") == b"1"
