"""namespace.py: names, links and errnos, and all of it back after a restart."""

import errno
import stat

import pytest

from cascadefs.errors import StoreError
from cascadefs.metadata.namespace import RENAME_EXCHANGE, RENAME_NOREPLACE, ROOT, Namespace
from cascadefs.metadata.sqlite import Database

FILE, FOLDER = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755


def fails(code, call, *arguments):
    with pytest.raises(OSError) as e:
        call(*arguments)
    assert e.value.errno == code


def test_make_look_up_list_and_count(namespace):
    made = [namespace.make(ROOT, b"f%d" % n, FILE, 5, 6) for n in range(600)]
    assert [name for _, name, _ in namespace.listing(ROOT, 0)] == [b"f%d" % n for n in range(600)]
    cookie = next(c for c, name, _ in namespace.listing(ROOT, 0) if name == b"f300")
    assert next(namespace.listing(ROOT, cookie))[1] == b"f301"
    assert namespace.lookup(ROOT, b"f7") == made[7]
    assert namespace.lookup(ROOT, b"none") is None
    assert namespace.count_files() == (600, 0)


def test_errnos(namespace):
    folder, file = namespace.make(ROOT, b"d", FOLDER, 0, 0), namespace.make(ROOT, b"f", FILE, 0, 0)
    namespace.make(folder.ino, b"inner", FOLDER, 0, 0)
    fails(errno.EEXIST, namespace.make, ROOT, b"f", FILE, 0, 0)
    fails(errno.ENAMETOOLONG, namespace.make, ROOT, b"x" * 256, FILE, 0, 0)
    fails(errno.ENOTDIR, namespace.make, file.ino, b"x", FILE, 0, 0)
    fails(errno.ENOTEMPTY, namespace.rmdir, ROOT, b"d")
    fails(errno.EISDIR, namespace.unlink, ROOT, b"d")
    fails(errno.ENOTDIR, namespace.rmdir, ROOT, b"f")
    fails(errno.ENOENT, namespace.unlink, ROOT, b"none")
    fails(errno.EPERM, namespace.link, folder.ino, ROOT, b"l")
    fails(errno.ESTALE, namespace.get, 999)
    assert namespace.get(ROOT).nlink == 3 and namespace.get(folder.ino).nlink == 3


def test_links_and_orphans(namespace):
    file = namespace.make(ROOT, b"f", FILE, 0, 0)
    assert namespace.link(file.ino, ROOT, b"g").nlink == 2
    assert namespace.unlink(ROOT, b"f").nlink == 1
    assert namespace.unlink(ROOT, b"g").nlink == 0
    assert namespace.orphans() == [file.ino]
    namespace.delete_inode(file.ino)
    assert namespace.orphans() == [] and namespace.find(file.ino) is None


def test_rename(namespace):
    a, b = namespace.make(ROOT, b"a", FILE, 0, 0), namespace.make(ROOT, b"b", FILE, 0, 0)
    d = namespace.make(ROOT, b"d", FOLDER, 0, 0)
    e = namespace.make(d.ino, b"e", FOLDER, 0, 0)
    fails(errno.EEXIST, namespace.rename, ROOT, b"a", ROOT, b"b", RENAME_NOREPLACE)
    fails(errno.EINVAL, namespace.rename, ROOT, b"d", e.ino, b"x", 0)
    fails(errno.EISDIR, namespace.rename, ROOT, b"a", ROOT, b"d", 0)
    fails(errno.ENOTDIR, namespace.rename, ROOT, b"d", ROOT, b"a", 0)
    namespace.rename(ROOT, b"a", ROOT, b"b", RENAME_EXCHANGE)
    assert namespace.lookup(ROOT, b"a").ino == b.ino
    moved, lost = namespace.rename(ROOT, b"a", ROOT, b"b", 0)
    assert moved
    assert lost.ino == a.ino and lost.nlink == 0 and namespace.lookup(ROOT, b"a") is None
    namespace.rename(d.ino, b"e", ROOT, b"e", 0)
    assert namespace.get(ROOT).nlink == 4 and namespace.get(d.ino).nlink == 2 and namespace.parent_of(e.ino) == ROOT


def test_setgid_folders_hand_on_their_group(namespace):
    folder = namespace.make(ROOT, b"d", FOLDER | stat.S_ISGID, 1, 77)
    assert namespace.make(folder.ino, b"f", FILE, 1, 2).gid == 77
    assert namespace.make(folder.ino, b"s", FOLDER, 1, 2).mode & stat.S_ISGID


def test_xattrs(namespace):
    namespace.xattrs.put(ROOT, b"user.a", b"1")
    fails(errno.EEXIST, namespace.xattrs.put, ROOT, b"user.a", b"2", 1)
    fails(errno.ENODATA, namespace.xattrs.put, ROOT, b"user.b", b"2", 2)
    assert namespace.xattrs.get(ROOT, b"user.a") == b"1" and namespace.xattrs.names(ROOT) == [b"user.a"]
    namespace.xattrs.remove(ROOT, b"user.a")
    fails(errno.ENODATA, namespace.xattrs.get, ROOT, b"user.a")


def test_a_second_opener_is_refused_and_names_survive(tmp_path):
    first = Database(tmp_path / "store")
    Namespace(first).make(ROOT, b"kept", FILE, 0, 0)
    with pytest.raises(StoreError, match="in use"):
        Database(tmp_path / "store")
    first.close()
    again = Database(tmp_path / "store")
    assert Namespace(again).lookup(ROOT, b"kept") is not None
    again.close()


def test_folders_that_are_no_store_are_refused_untouched(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(StoreError, match="not empty"):
        Database(tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    with pytest.raises(StoreError, match="missing"):
        Database(tmp_path / "no" / "where")
    Database(tmp_path / "s").close()
    text = (tmp_path / "s" / "store.json").read_text()
    (tmp_path / "s" / "store.json").write_text(text.replace('"format": 1', '"format": 99'))
    with pytest.raises(StoreError, match="99"):
        Database(tmp_path / "s")


def test_a_file_without_a_name_gets_its_first_one(namespace):
    made = namespace.make_nameless(ROOT, stat.S_IFREG | 0o600, 3, 4, 0)
    assert made == namespace.get(made.ino) and made.nlink == 0 and namespace.orphans() == [made.ino]
    fails(errno.ENOENT, namespace.link, made.ino, ROOT, b"f")
    assert namespace.link(made.ino, ROOT, b"f", may_be_first=True).nlink == 1
    assert namespace.lookup(ROOT, b"f").ino == made.ino and namespace.orphans() == []


def test_birth_is_when_the_inode_was_made(namespace):
    made = namespace.make(ROOT, b"f", stat.S_IFREG | 0o600, 0, 0)
    namespace.update(made.ino, ctime_ns=1)
    assert namespace.born_ns(made.ino) == made.ctime_ns and namespace.born_ns(99) is None


def test_a_store_of_before_gets_the_later_columns(tmp_path):
    before = Database(tmp_path / "store")
    ino = Namespace(before).make(ROOT, b"f", FILE, 0, 0).ino
    for column in ("last_op", "born_ns"):
        before.connection.executescript(f"ALTER TABLE inodes DROP COLUMN {column}")
    before.close()
    now = Database(tmp_path / "store")
    names = Namespace(now)
    assert names.born_ns(ino) is None and names.is_done(ino, 0)
    assert names.born_ns(names.make(ROOT, b"g", FILE, 0, 0).ino) is not None
    now.close()

def test_a_name_keeps_its_place_until_it_is_removed(namespace):
    made = {name: namespace.make(ROOT, name, FILE, 0, 0).ino for name in (b"a", b"b", b"c")}
    places = {name: cookie for cookie, name, _ in namespace.listing(ROOT, 0)}
    other = namespace.make(ROOT, b"d", FOLDER, 0, 0).ino
    for folder in (ROOT, other):
        new = namespace.make(folder, b"tmp", FILE, 0, 0).ino
        namespace.rename(folder, b"tmp", ROOT, b"b", 0)  # replaced from near and far
        assert namespace.lookup(ROOT, b"b").ino == new
    assert namespace.find(made[b"b"]).nlink == 0 and namespace.get(new).nlink == 1
    namespace.rename(ROOT, b"c", ROOT, b"c.bak", 0)
    namespace.rename(ROOT, b"a", ROOT, b"b", RENAME_EXCHANGE)
    now = {name: cookie for cookie, name, _ in namespace.listing(ROOT, 0, max(places.values()))}
    assert now == {b"a": places[b"a"], b"b": places[b"b"], b"c.bak": places[b"c"]}
    assert namespace.lookup(ROOT, b"c") is None and namespace.lookup(ROOT, b"c.bak").ino == made[b"c"]


def test_a_listing_ends_at_what_was_there(namespace):
    """As a listing in pages does: whatever is done with what was told, it is told once, and the end is reached."""
    names = {b"%04d" % n for n in range(700)}
    for name in names:
        namespace.make(ROOT, name, FILE, 0, 0)
    last, told = namespace.last_entry(), list[bytes]()
    for at, (_, name, _) in enumerate(namespace.listing(ROOT, 0, last)):
        told.append(name)
        if at % 3 == 0:
            namespace.make(ROOT, b"tmp", FILE, 0, 0)
            namespace.rename(ROOT, b"tmp", ROOT, name, 0)
        elif at % 3 == 1:
            namespace.rename(ROOT, name, ROOT, name + b".bak", 0)
        else:
            namespace.unlink(ROOT, name)
            namespace.make(ROOT, name, FILE, 0, 0)
    assert len(told) == len(names) and set(told) == names
