"""Ordinary programs on the folder: cp, tar, mv, du, dd, find, a compiler's habits, an SQL database."""

import hashlib
import os
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

from .support import KIB, MIB, case, elsewhere, pattern, run, same

FILES = {"small": 10, "page": 4096, "odd": 70_001, "sub/large": 5 * MIB + 3, "sub/deeper/empty": 0}


def tree(root: Path) -> None:
    (root / "sub" / "deeper").mkdir(parents=True)
    for name, size in FILES.items():
        (root / name).write_bytes(pattern(size, seed=size))
        os.utime(root / name, ns=(1_500_000_000_000_000_001, 1_400_000_000_123_456_789))
    os.chmod(root / "small", 0o4711)
    os.chown(root / "odd", 1000, 1001)
    os.symlink("sub/large", root / "link")
    os.link(root / "page", root / "second")
    os.mkfifo(root / "fifo")


def described(root: Path) -> dict[str, tuple[object, ...]]:
    """What a faithful copy must keep of every entry: kind and mode, owner, links, time, bytes."""
    about: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            entry = Path(folder, name)
            info = os.lstat(entry)
            content = os.readlink(entry) if entry.is_symlink() else ""
            if stat.S_ISREG(info.st_mode):
                content = hashlib.sha256(entry.read_bytes()).hexdigest()
            about[str(entry.relative_to(root))] = (info.st_mode, info.st_uid, info.st_gid, info.st_nlink, content)
            if not entry.is_dir() and not entry.is_symlink():
                about[str(entry.relative_to(root))] += (info.st_mtime_ns,)
    return about


@case
def cp_keeps_everything(path: Path) -> None:
    tree(path / "tree")
    run("cp", "-a", "tree", "copy", cwd=path)
    assert described(path / "copy") == described(path / "tree")


@case
def tar_round_trip(path: Path) -> None:
    tree(path / "tree")
    # Only the posix format keeps nanoseconds.
    run("tar", "--format=posix", "-cf", "tree.tar", "tree", cwd=path)
    (path / "out").mkdir()
    run("tar", "-xpf", "tree.tar", "-C", "out", cwd=path)
    assert described(path / "out" / "tree") == described(path / "tree")


@case
def mv_to_another_file_system_and_back(path: Path) -> None:
    tree(path / "tree")
    before = described(path / "tree")
    with elsewhere(path) as other:
        run("mv", str(path / "tree"), str(other / "tree"))
        assert os.listdir(path) == []
        run("mv", str(other / "tree"), str(path / "back"))
    assert described(path / "back") == before


@case
def mv_within(path: Path) -> None:
    tree(path / "tree")
    before = described(path / "tree")
    (path / "into").mkdir()
    run("mv", "tree", "into", cwd=path)
    assert described(path / "into" / "tree") == before


@case
def du_and_find_see_the_tree(path: Path) -> None:
    tree(path / "tree")
    regular = int(run("du", "--bytes", "--summarize", "tree/sub/large", cwd=path).split()[0])
    assert regular == FILES["sub/large"]
    blocks = int(run("du", "--block-size=1", "--summarize", "tree", cwd=path).split()[0])
    assert blocks >= FILES["sub/large"]
    found = run("find", "tree", "-type", "f", cwd=path).splitlines()
    assert sorted(found) == sorted([f"tree/{name}" for name in FILES] + ["tree/second"])
    assert len(run("find", "tree", "-links", "2", "-type", "f", cwd=path).splitlines()) == 2


@case
def dd_with_direct_io(path: Path) -> None:
    data = pattern(2 * MIB)
    (path / "source").write_bytes(data)
    run("dd", "if=source", "of=target", "bs=64k", "iflag=direct", "oflag=direct", "conv=fsync", cwd=path)
    same((path / "target").read_bytes(), data)
    run("dd", "if=source", "of=target", "bs=4k", "seek=1", "count=1", "conv=notrunc", cwd=path)
    same((path / "target").read_bytes(), data[: 4 * KIB] + data[: 4 * KIB] + data[8 * KIB :])


@case
def rm_removes_a_tree(path: Path) -> None:
    tree(path / "tree")
    run("rm", "-r", "tree", cwd=path)
    assert os.listdir(path) == []


@case
def shell_redirection_and_append(path: Path) -> None:
    run("sh", "-c", "echo one > log; echo two >> log; sort -r -o log log; sed -i s/one/1/ log", cwd=path)
    assert (path / "log").read_text() == "two\n1\n"
    assert os.listdir(path) == ["log"]


@case
def sqlite_database(path: Path) -> None:
    for journal in ("DELETE", "WAL"):
        with closing(sqlite3.connect(path / f"{journal}.db", timeout=10)) as base:
            assert base.execute(f"PRAGMA journal_mode = {journal}").fetchone() == (journal.lower(),)
            base.execute("CREATE TABLE block (id INTEGER PRIMARY KEY, bytes BLOB)")
            for start in range(0, 300, 100):
                rows = [(index, pattern(1000, seed=index)) for index in range(start, start + 100)]
                with base:
                    base.executemany("INSERT INTO block VALUES (?, ?)", rows)
        with closing(sqlite3.connect(path / f"{journal}.db", timeout=10)) as base:
            assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            same(base.execute("SELECT bytes FROM block WHERE id = 250").fetchone()[0], pattern(1000, seed=250))
