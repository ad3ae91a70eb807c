"""rename and renameat2: what is replaced, what is refused, and that open descriptors follow the inode."""

import errno
import os
from pathlib import Path

from .support import (
    MIB,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    case,
    opened,
    pattern,
    refused,
    renameat2,
    rest,
    same,
    settle,
)


@case
def file_gets_a_new_name(path: Path) -> None:
    (path / "old").write_bytes(pattern(100_000))
    os.rename(path / "old", path / "new")
    assert os.listdir(path) == ["new"]
    refused(errno.ENOENT, os.stat, path / "old")
    same((path / "new").read_bytes(), pattern(100_000))


@case
def existing_file_is_replaced(path: Path) -> None:
    (path / "tmp").write_bytes(b"new")
    (path / "file").write_bytes(b"old")
    inode = (path / "tmp").stat().st_ino
    os.rename(path / "tmp", path / "file")
    assert os.listdir(path) == ["file"]
    assert (path / "file").read_bytes() == b"new"
    assert (path / "file").stat().st_ino == inode


@case
def replaced_file_lives_on_in_its_descriptor(path: Path) -> None:
    (path / "tmp").write_bytes(b"new")
    (path / "file").write_bytes(pattern(5 * MIB))
    rest(path / "file")
    with opened(path / "file", os.O_RDONLY) as old:
        os.rename(path / "tmp", path / "file")
        settle()
        assert os.fstat(old).st_nlink == 0
        same(os.pread(old, 6 * MIB, 0), pattern(5 * MIB))
        assert (path / "file").read_bytes() == b"new"


@case
def replaced_file_can_still_be_written(path: Path) -> None:
    (path / "tmp").write_bytes(b"new")
    with opened(path / "file", os.O_CREAT | os.O_RDWR) as old:
        os.write(old, b"old")
        os.rename(path / "tmp", path / "file")
        os.write(old, b" and on")
        assert os.pread(old, 100, 0) == b"old and on"
    assert (path / "file").read_bytes() == b"new"


@case
def source_still_open_for_writing(path: Path) -> None:
    (path / "sub").mkdir()
    (path / "sub" / "final").write_bytes(b"old")
    with opened(path / "tmp", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"before ")
        os.rename(path / "tmp", path / "sub" / "final")
        assert (path / "sub" / "final").read_bytes() == b"before "
        os.write(fd, b"after")
        assert os.fstat(fd).st_nlink == 1
        assert (path / "sub" / "final").stat().st_size == 12
    assert (path / "sub" / "final").read_bytes() == b"before after"


@case
def across_folders_and_back(path: Path) -> None:
    (path / "a").mkdir()
    (path / "b").mkdir()
    (path / "a" / "file").write_bytes(b"travels")
    for source, target in (("a", "b"), ("b", "a"), ("a", "b")):
        os.rename(path / source / "file", path / target / "file")
        assert os.listdir(path / source) == []
        assert (path / target / "file").read_bytes() == b"travels"


@case
def temporary_then_rename_a_hundred_times(path: Path) -> None:
    for index in range(100):
        (path / f"tmp{index % 3}").write_bytes(b"version %d" % index)
        os.rename(path / f"tmp{index % 3}", path / "file")
        assert (path / "file").read_bytes() == b"version %d" % index
    assert os.listdir(path) == ["file"]


@case
def folder_moves_with_its_tree(path: Path) -> None:
    (path / "a" / "tree" / "deep").mkdir(parents=True)
    (path / "a" / "tree" / "deep" / "file").write_bytes(b"leaf")
    (path / "b").mkdir()
    with opened(path / "a" / "tree" / "deep" / "file", os.O_RDWR) as fd:
        os.rename(path / "a" / "tree", path / "b" / "moved")
        os.pwrite(fd, b"LEAF", 0)
    assert (path / "b" / "moved" / "deep" / "file").read_bytes() == b"LEAF"
    assert ((path / "a").stat().st_nlink, (path / "b").stat().st_nlink) == (2, 3)
    assert os.stat(f"{path}/b/moved/..").st_ino == (path / "b").stat().st_ino
    refused(errno.ENOENT, os.stat, path / "a" / "tree" / "deep")


@case
def folder_over_an_empty_folder(path: Path) -> None:
    (path / "source").mkdir()
    (path / "source" / "file").write_bytes(b"x")
    (path / "target").mkdir()
    os.rename(path / "source", path / "target")
    assert os.listdir(path) == ["target"]
    assert os.listdir(path / "target") == ["file"]
    assert path.stat().st_nlink == 3


@case
def folder_over_a_full_folder(path: Path) -> None:
    (path / "source").mkdir()
    (path / "target").mkdir()
    (path / "target" / "file").touch()
    refused({errno.ENOTEMPTY, errno.EEXIST}, os.rename, path / "source", path / "target")
    assert os.listdir(path / "target") == ["file"]


@case
def kinds_do_not_replace_each_other(path: Path) -> None:
    (path / "file").write_bytes(b"x")
    (path / "folder").mkdir()
    refused(errno.EISDIR, os.rename, path / "file", path / "folder")
    refused(errno.ENOTDIR, os.rename, path / "folder", path / "file")
    assert sorted(os.listdir(path)) == ["file", "folder"]


@case
def folder_into_itself(path: Path) -> None:
    (path / "a" / "b").mkdir(parents=True)
    refused(errno.EINVAL, os.rename, path / "a", path / "a" / "c")
    refused(errno.EINVAL, os.rename, path / "a", path / "a" / "b" / "c")
    refused({errno.ENOTEMPTY, errno.EEXIST}, os.rename, path / "a" / "b", path / "a")
    assert os.listdir(path / "a") == ["b"]


@case
def name_onto_itself(path: Path) -> None:
    (path / "file").write_bytes(b"x")
    (path / "folder").mkdir()
    os.rename(path / "file", path / "file")
    os.rename(path / "folder", path / "folder")
    assert (path / "file").read_bytes() == b"x"
    assert (path / "file").stat().st_nlink == 1


@case
def dot_is_busy(path: Path) -> None:
    (path / "sub").mkdir()
    refused({errno.EBUSY, errno.EINVAL}, os.rename, f"{path}/sub/.", path / "other")
    refused({errno.EBUSY, errno.EINVAL, errno.ENOTEMPTY}, os.rename, path / "sub", f"{path}/sub/..")


@case
def noreplace_keeps_what_is_there(path: Path) -> None:
    (path / "one").write_bytes(b"1")
    (path / "two").write_bytes(b"2")
    refused(errno.EEXIST, renameat2, path / "one", path / "two", RENAME_NOREPLACE)
    assert (path / "two").read_bytes() == b"2"
    renameat2(path / "one", path / "three", RENAME_NOREPLACE)
    assert sorted(os.listdir(path)) == ["three", "two"]
    assert (path / "three").read_bytes() == b"1"


@case
def exchange_swaps_two_files(path: Path) -> None:
    (path / "sub").mkdir()
    (path / "one").write_bytes(b"1")
    (path / "sub" / "two").write_bytes(b"2")
    with opened(path / "one") as fd:
        renameat2(path / "one", path / "sub" / "two", RENAME_EXCHANGE)
        assert os.read(fd, 10) == b"1"
        assert os.fstat(fd).st_ino == (path / "sub" / "two").stat().st_ino
    assert ((path / "one").read_bytes(), (path / "sub" / "two").read_bytes()) == (b"2", b"1")
    assert (path / "one").stat().st_nlink == 1


@case
def exchange_swaps_a_file_and_a_folder(path: Path) -> None:
    (path / "a" / "folder").mkdir(parents=True)
    (path / "a" / "folder" / "leaf").touch()
    (path / "b").mkdir()
    (path / "b" / "file").write_bytes(b"x")
    renameat2(path / "a" / "folder", path / "b" / "file", RENAME_EXCHANGE)
    assert (path / "a" / "folder").read_bytes() == b"x"
    assert os.listdir(path / "b" / "file") == ["leaf"]
    assert ((path / "a").stat().st_nlink, (path / "b").stat().st_nlink) == (2, 3)


@case
def flags_that_make_no_sense(path: Path) -> None:
    (path / "file").write_bytes(b"x")
    refused(errno.ENOENT, renameat2, path / "file", path / "missing", RENAME_EXCHANGE)
    refused(errno.EINVAL, renameat2, path / "file", path / "other", RENAME_EXCHANGE | RENAME_NOREPLACE)
    refused(errno.EINVAL, renameat2, path / "file", path / "other", 1 << 20)
    assert os.listdir(path) == ["file"]


@case
def handles_stay_valid_through_many_names(path: Path) -> None:
    with opened(path / "name0", os.O_CREAT | os.O_RDWR) as fd:
        for index in range(20):
            os.write(fd, b"%02d" % index)
            os.rename(path / f"name{index}", path / f"name{index + 1}")
        os.unlink(path / "name20")
        assert os.pread(fd, 100, 0) == b"".join(b"%02d" % index for index in range(20))
