"""Extended attributes of the user namespace: set, get, list, remove, limits, and what they belong to.

Only names under user.test are looked at: a file system may show attributes of its own beside them.
"""

import ctypes
import errno
import os
from pathlib import Path

from .support import KIB, case, checked, libc, opened, refused, rest


def listed(target: Path | int) -> set[str]:
    return {name for name in os.listxattr(target) if name.startswith("user.test")}


@case
def set_get_list_remove(path: Path) -> None:
    file = path / "file"
    file.touch()
    os.setxattr(file, "user.test.one", b"1")
    os.setxattr(file, "user.test.two", bytes(range(256)))
    assert listed(file) == {"user.test.one", "user.test.two"}
    assert os.getxattr(file, "user.test.two") == bytes(range(256))
    os.setxattr(file, "user.test.one", b"replaced by something longer")
    assert os.getxattr(file, "user.test.one") == b"replaced by something longer"
    os.removexattr(file, "user.test.one")
    assert listed(file) == {"user.test.two"}


@case
def missing_attribute_is_enodata(path: Path) -> None:
    (path / "file").touch()
    refused(errno.ENODATA, os.getxattr, path / "file", "user.test")
    refused(errno.ENODATA, os.removexattr, path / "file", "user.test")


@case
def create_and_replace_flags(path: Path) -> None:
    file = path / "file"
    file.touch()
    refused(errno.ENODATA, os.setxattr, file, "user.test", b"x", os.XATTR_REPLACE)
    os.setxattr(file, "user.test", b"first", os.XATTR_CREATE)
    refused(errno.EEXIST, os.setxattr, file, "user.test", b"x", os.XATTR_CREATE)
    assert os.getxattr(file, "user.test") == b"first"
    os.setxattr(file, "user.test", b"second", os.XATTR_REPLACE)
    assert os.getxattr(file, "user.test") == b"second"


@case
def empty_value_is_a_value(path: Path) -> None:
    (path / "file").touch()
    os.setxattr(path / "file", "user.test", b"")
    assert os.getxattr(path / "file", "user.test") == b""
    assert listed(path / "file") == {"user.test"}


@case
def value_of_64_kib(path: Path) -> None:
    file = path / "file"
    file.touch()
    value = bytes(index % 251 for index in range(64 * KIB))
    os.setxattr(file, "user.test", value)
    assert os.getxattr(file, "user.test") == value
    refused(errno.E2BIG, os.setxattr, file, "user.test", value + b"x")
    assert len(os.getxattr(file, "user.test")) == 64 * KIB


@case
def small_buffer_is_erange(path: Path) -> None:
    (path / "file").touch()
    os.setxattr(path / "file", "user.test", b"v" * 100)
    buffer = ctypes.create_string_buffer(200)
    where = os.fsencode(path / "file")

    def get(size: int) -> int:
        return checked(libc.getxattr(where, b"user.test", buffer, ctypes.c_size_t(size)))

    def names(size: int) -> int:
        return checked(libc.listxattr(where, buffer, ctypes.c_size_t(size)))

    assert get(0) == 100
    assert get(100) == 100
    assert buffer.raw[:101] == b"v" * 100 + b"\0"
    refused(errno.ERANGE, get, 99)
    assert names(0) >= len(b"user.test\0")
    refused(errno.ERANGE, names, 3)


@case
def names_up_to_255_bytes(path: Path) -> None:
    file = path / "file"
    file.touch()
    longest = "user.test." + "n" * 245
    os.setxattr(file, longest, b"long")
    assert os.getxattr(file, longest) == b"long"
    refused(errno.ERANGE, os.setxattr, file, longest + "n", b"x")
    assert listed(file) == {longest}


@case
def fifty_attributes(path: Path) -> None:
    file = path / "file"
    file.touch()
    expected = {f"user.test.{index:02d}": b"%d" % index for index in range(50)}
    for name, value in expected.items():
        os.setxattr(file, name, value)
    assert {name: os.getxattr(file, name) for name in listed(file)} == expected


@case
def folders_have_attributes(path: Path) -> None:
    folder = path / "folder"
    folder.mkdir()
    os.setxattr(folder, "user.test", b"folder")
    (folder / "child").touch()
    assert os.getxattr(folder, "user.test") == b"folder"
    assert listed(folder / "child") == set()
    os.rename(folder, path / "moved")
    assert os.getxattr(path / "moved", "user.test") == b"folder"


@case
def attributes_follow_the_inode(path: Path) -> None:
    file = path / "file"
    file.write_bytes(b"before")
    os.setxattr(file, "user.test", b"kept")
    os.link(file, path / "hard")
    file.write_bytes(b"after")
    os.rename(file, path / "moved")
    rest(path / "moved")
    assert os.getxattr(path / "moved", "user.test") == b"kept"
    os.setxattr(path / "hard", "user.test", b"changed")
    assert os.getxattr(path / "moved", "user.test") == b"changed"


@case
def equal_files_have_their_own_attributes(path: Path) -> None:
    for name in ("one", "two"):
        (path / name).write_bytes(b"equal bytes" * 1000)
        rest(path / name)
    os.setxattr(path / "one", "user.test", b"1")
    assert listed(path / "two") == set()
    os.setxattr(path / "two", "user.test", b"2")
    assert os.getxattr(path / "one", "user.test") == b"1"


@case
def new_file_under_an_old_name_has_none(path: Path) -> None:
    (path / "file").touch()
    os.setxattr(path / "file", "user.test", b"old")
    (path / "file").unlink()
    (path / "file").touch()
    assert listed(path / "file") == set()


@case
def descriptors_of_unlinked_files(path: Path) -> None:
    (path / "file").touch()
    with opened(path / "file") as fd:
        os.setxattr(fd, "user.test", b"by descriptor")
        (path / "file").unlink()
        assert os.getxattr(fd, "user.test") == b"by descriptor"
        os.removexattr(fd, "user.test")
        assert listed(fd) == set()


@case
def symlinks_cannot_have_user_attributes(path: Path) -> None:
    (path / "file").touch()
    os.symlink("file", path / "link")
    refused(errno.EPERM, os.setxattr, path / "link", "user.test", b"x", follow_symlinks=False)
    os.setxattr(path / "link", "user.test", b"on the target")
    assert os.getxattr(path / "file", "user.test") == b"on the target"


@case
def unknown_namespace_is_unsupported(path: Path) -> None:
    (path / "file").touch()
    refused(errno.EOPNOTSUPP, os.setxattr, path / "file", "nonsense.test", b"x")
    refused(errno.EOPNOTSUPP, os.setxattr, path / "file", "noprefix", b"x")
    refused(errno.EOPNOTSUPP, os.getxattr, path / "file", "nonsense.test")
