"""places.py: a mount never lies over or in what it is made of."""

from pathlib import Path

import pytest

from cascadefs.errors import UserError
from cascadefs.mount.places import check_apart

SHM = "/dev/shm"


@pytest.mark.parametrize(
    ("mountpoint", "store", "shm_dir", "word"),
    [
        ("/a/m", "/a/m", SHM, "is the store"),
        ("/a/m", "/a/m/s", SHM, "would hide"),
        ("/a", "/a/b/c/s", SHM, "would hide"),
        ("/a/s/m", "/a/s", SHM, "lies in the store"),
        ("/a/m", "/a/s", "/a/m", "is the memory tier"),
        ("/a/m", "/a/s", "/a/m/shm", "would hide"),
        ("/dev/shm", "/a/s", SHM, "is the memory tier"),
        ("/dev/shm/cascadefs-0123456789abcdef", "/a/s", SHM, "lies in a memory tier"),
        ("/dev/shm/cascadefs-0123456789abcdef/objects", "/a/s", SHM, "lies in a memory tier"),
    ],
)
def test_a_mount_over_itself_is_refused_in_one_line(mountpoint, store, shm_dir, word):
    with pytest.raises(UserError, match=word) as refused:
        check_apart(Path(mountpoint), Path(store), Path(shm_dir))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("mountpoint", "store"),
    [("/a/m", "/a/s"), ("/a/s2", "/a/s"), ("/a/s", "/a/s2"), ("/a/m", "/a/m2/s"), ("/dev/shm/m", "/dev/shm/s")],
)
def test_neighbours_are_apart(mountpoint, store):
    check_apart(Path(mountpoint), Path(store), Path(SHM))
