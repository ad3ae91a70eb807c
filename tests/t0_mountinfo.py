"""mountinfo.py: any bytes in a path; what was typed means what the kernel means by it."""

import os
from pathlib import Path

import pytest

from cascadefs.errors import UserError
from cascadefs.mount import mountinfo
from cascadefs.mount.mountinfo import Mounted, parse, resolve, topmost

ROOT = b"22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw\n"


def line(path, kind=b"fuse.cascadefs", root=b"/", source=b"/s", number=40, parent=22):
    return b"%d %d 0:51 %s %s rw,relatime shared:7 master:2 - %s %s rw,user_id=0\n" % (number, parent, root, path, kind, source)


@pytest.mark.parametrize(
    ("written", "path"),
    [
        (rb"/a\040b", "/a b"),
        (rb"/a\011b\012c\134d\043", "/a\tb\nc\\d#"),
        ("/größe/キャッシュ".encode(), "/größe/キャッシュ"),
        (b"/\xff\xfe", os.fsdecode(b"/\xff\xfe")),
        (b"/a\x85b\x0bc\x0c\x1c\rd", os.fsdecode(b"/a\x85b\x0bc\x0c\x1c\rd")),  # str.splitlines() would end a line here
        ("/a\u2028b\xa0c".encode(), "/a\u2028b\xa0c"),
        (rb"/a\040-\040b", "/a - b"),
        (rb"/\134040", "/\\040"),
    ],
)
def test_any_bytes_may_stand_in_a_path(written, path):
    for kind in (b"fuse.cascadefs", b"tmpfs"):
        _, found = parse(ROOT + line(written, kind))
        assert found == Mounted(40, 22, "0:51", "/", Path(path), os.fsdecode(kind), "/s")
    (_, found), = [parse(ROOT + line(b"/m", root=written, source=written))]
    assert (found.root, found.source) == (path, path)


def test_a_line_cut_at_any_length_is_left_out_or_whole():
    text = line(rb"/a\040b")
    for length in range(len(text)):
        for found in parse(ROOT + text[:length])[1:]:
            assert found.path == Path("/a b") and found.device == "0:51"


def test_the_topmost_of_several_is_seen():
    below, above = line(b"/m", number=40), line(b"/m", b"tmpfs", number=41, parent=40)
    for text in (below + above, above + below):
        found = topmost(Path("/m"), parse(ROOT + text))
        assert found is not None and found.kind == "tmpfs"
    assert topmost(Path("/n"), parse(ROOT)) is None


@pytest.fixture
def tree(tmp_path, monkeypatch):
    base = Path(os.path.realpath(tmp_path))
    (base / "real/m").mkdir(parents=True)
    (base / "link").symlink_to("real")
    (base / "far").symlink_to(base / "link/m/")
    (base / "up").symlink_to("real/m/../..")
    (base / "loop").symlink_to("loop")
    monkeypatch.chdir(base)
    return base


@pytest.mark.parametrize(
    "typed",
    ["real/m", "real/m/", "./real//m/.", "link/m", "far", "far/", "up/far", "real/m/../m", "link/../real/m", "far/../m"],
)
def test_each_way_to_write_a_path_means_one(tree, typed):
    for path in (Path(typed), tree / typed, Path(f"{tree}//{typed}")):
        assert resolve(path) == tree / "real/m"


def test_what_is_missing_is_taken_as_it_stands_and_a_loop_is_said(tree):
    assert resolve(Path("link/new/deep")) == tree / "real/new/deep"
    assert resolve(Path("/")) == Path("/") == resolve(Path("/../.."))
    with pytest.raises(UserError, match="symbolic links"):
        resolve(Path("loop/x"))


def test_a_mountpoint_is_not_looked_at(tree, monkeypatch):
    (tree / "real/m").rmdir()
    (tree / "real/m").symlink_to("elsewhere")  # so that looking would show
    monkeypatch.setattr(mountinfo, "read", lambda: parse(line(os.fsencode(tree / "real/m"))))
    assert resolve(Path("link/m/file")) == tree / "real/m/file"


def test_a_working_folder_that_is_gone(tree, monkeypatch):
    (tree / "gone").mkdir()
    monkeypatch.chdir(tree / "gone")
    (tree / "gone").rmdir()
    assert resolve(tree / "far") == tree / "real/m"
    with pytest.raises(UserError, match="absolute"):
        resolve(Path("m"))
