"""Hard links share one inode; symbolic links are names of names."""

import errno
import os
import stat
from pathlib import Path

from .support import Child, case, gates, opened, pattern, refused, rest, same, settle


@case
def hard_link_is_the_same_inode(path: Path) -> None:
    (path / "one").write_bytes(pattern(50_000))
    os.link(path / "one", path / "two")
    assert os.stat(path / "one") == os.stat(path / "two")
    assert os.stat(path / "one").st_nlink == 2
    same((path / "two").read_bytes(), pattern(50_000))


@case
def link_count_follows_every_name(path: Path) -> None:
    (path / "0").write_bytes(b"x")
    for count in range(1, 10):
        os.link(path / "0", path / f"{count}")
        assert (path / f"{count}").stat().st_nlink == count + 1
    for count in range(9, 0, -1):
        (path / f"{count - 1}").unlink()
        assert (path / "9").stat().st_nlink == count
    assert (path / "9").read_bytes() == b"x"


@case
def write_through_one_name_is_read_through_the_other(path: Path) -> None:
    (path / "one").write_bytes(pattern(50_000))
    os.link(path / "one", path / "two")
    rest(path / "one")
    with opened(path / "one", os.O_RDWR) as writer, opened(path / "two") as reader:
        os.pwrite(writer, b"shared", 100)
        assert os.pread(reader, 6, 100) == b"shared"
        os.truncate(path / "two", 1000)
        assert os.fstat(writer).st_size == 1000
    assert (path / "two").read_bytes()[100:106] == b"shared"


@case
def link_of_a_file_open_for_writing(path: Path) -> None:
    with opened(path / "tmp", os.O_CREAT | os.O_WRONLY) as fd:
        os.write(fd, b"before ")
        os.link(path / "tmp", path / "final")
        (path / "tmp").unlink()
        os.write(fd, b"after")
        assert os.fstat(fd).st_nlink == 1
    assert (path / "final").read_bytes() == b"before after"
    assert os.listdir(path) == ["final"]


@case
def link_across_folders_and_unlink(path: Path) -> None:
    (path / "a").mkdir()
    (path / "b").mkdir()
    (path / "a" / "file").write_bytes(b"both")
    os.link(path / "a" / "file", path / "b" / "file")
    (path / "a" / "file").unlink()
    (path / "a").rmdir()
    assert (path / "b" / "file").read_bytes() == b"both"
    assert (path / "b" / "file").stat().st_nlink == 1


@case
def link_to_a_folder_is_refused(path: Path) -> None:
    (path / "folder").mkdir()
    refused(errno.EPERM, os.link, path / "folder", path / "second")
    assert os.listdir(path) == ["folder"]


@case
def link_to_a_symlink_links_the_symlink(path: Path) -> None:
    os.symlink("target", path / "link")
    os.link(path / "link", path / "second", follow_symlinks=False)
    assert os.readlink(path / "second") == "target"
    assert os.lstat(path / "link").st_nlink == 2


@case
def rename_between_two_links_does_nothing(path: Path) -> None:
    (path / "one").write_bytes(b"x")
    os.link(path / "one", path / "two")
    os.rename(path / "one", path / "two")
    assert sorted(os.listdir(path)) == ["one", "two"]
    assert (path / "one").stat().st_nlink == 2


@case
def rename_over_a_link_lowers_its_count(path: Path) -> None:
    (path / "one").write_bytes(b"old")
    os.link(path / "one", path / "two")
    (path / "new").write_bytes(b"new")
    os.rename(path / "new", path / "two")
    assert (path / "one").stat().st_nlink == 1
    assert ((path / "one").read_bytes(), (path / "two").read_bytes()) == (b"old", b"new")


@case
def link_counts_are_seen_by_descriptors(path: Path) -> None:
    (path / "file").write_bytes(b"x")
    with gates(1) as (linked,), opened(path / "file") as fd:

        def look() -> None:
            linked.wait()
            assert os.fstat(fd).st_nlink == 2

        child = Child(look)
        os.link(path / "file", path / "second")
        linked.open()
        child.finish()


@case
def symlink_round_trip(path: Path) -> None:
    os.symlink("../some/where", path / "link")
    about = os.lstat(path / "link")
    assert os.readlink(path / "link") == "../some/where"
    assert stat.S_ISLNK(about.st_mode)
    assert about.st_size == len("../some/where")
    assert stat.S_IMODE(about.st_mode) == 0o777
    refused(errno.ENOENT, os.stat, path / "link")


@case
def symlink_target_of_4095_bytes(path: Path) -> None:
    target = "t/" * 2047 + "x"
    os.symlink(target, path / "link")
    assert os.readlink(path / "link") == target
    refused(errno.ENAMETOOLONG, os.symlink, target + "x", path / "longer")
    refused(errno.ENOENT, os.symlink, "", path / "empty")
    assert os.listdir(path) == ["link"]


@case
def symlink_leads_to_files_and_folders(path: Path) -> None:
    (path / "folder").mkdir()
    (path / "folder" / "file").write_bytes(b"reached")
    os.symlink("folder", path / "relative")
    os.symlink(path / "folder", path / "absolute")
    os.symlink("../relative/file", path / "folder" / "chain")
    assert (path / "relative" / "file").read_bytes() == b"reached"
    assert (path / "absolute" / "file").read_bytes() == b"reached"
    assert (path / "folder" / "chain").read_bytes() == b"reached"


@case
def unlink_and_rename_act_on_the_symlink(path: Path) -> None:
    (path / "file").write_bytes(b"kept")
    os.symlink("file", path / "link")
    os.rename(path / "link", path / "moved")
    assert os.readlink(path / "moved") == "file"
    (path / "other").write_bytes(b"other")
    os.rename(path / "other", path / "moved")
    assert not (path / "moved").is_symlink()
    assert (path / "file").read_bytes() == b"kept"
    os.symlink("file", path / "again")
    os.unlink(path / "again")
    assert (path / "file").read_bytes() == b"kept"


@case
def equal_files_are_not_links(path: Path) -> None:
    for name in ("one", "two"):
        (path / name).write_bytes(b"equal" * 10_000)
        rest(path / name)
    settle()
    assert (path / "one").stat().st_ino != (path / "two").stat().st_ino
    assert (path / "one").stat().st_nlink == (path / "two").stat().st_nlink == 1
