"""A listing ends, and tells once what stayed, whatever happens to its names meanwhile: as tmpfs and ext4 do."""

import ctypes
import itertools
import os
import threading
import time

import pytest

LIMIT = 3  # times as many names as there were: then it would not have ended
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.opendir.restype = LIBC.readdir64.restype = ctypes.c_void_p
for call in ("readdir64", "telldir", "rewinddir", "closedir"):
    getattr(LIBC, call).argtypes = (ctypes.c_void_p,)
LIBC.telldir.restype, LIBC.seekdir.argtypes = ctypes.c_long, (ctypes.c_void_p, ctypes.c_long)


def replace(folder, name):
    (folder.parent / "tmp").write_bytes(b"new")
    os.replace(folder.parent / "tmp", folder / name)


def replace_from_within(folder, name):
    (folder / ".tmp").write_bytes(b"new")
    os.replace(folder / ".tmp", folder / name)


def rename(folder, name):
    os.rename(folder / name, folder / f"{name}.bak")


def recreate(folder, name):
    os.unlink(folder / name)
    (folder / name).touch()


def rename_there_and_back(folder, name):
    os.rename(folder / name, folder.parent / "away")
    os.rename(folder.parent / "away", folder / name)


CHANGES = (replace, replace_from_within, rename, recreate, rename_there_and_back)


def filled(folder, count):
    folder.mkdir()
    names = {f"{i:05d}" for i in range(count)}
    for name in names:
        (folder / name).touch()
    return names


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_listing_ends_while_its_names_are_changed(mount, change):
    mount.start()
    names, told = filled(mount.path / "d", 900), list[str]()
    with os.scandir(mount.path / "d") as entries:
        for entry in itertools.islice(entries, LIMIT * len(names)):
            told.append(entry.name)
            change(mount.path / "d", entry.name)
    assert len(told) == len(names) and set(told) == names
    left = set(os.listdir(mount.path / "d"))
    assert left == ({f"{name}.bak" for name in names} if change is rename else names)


def test_what_stayed_is_told_once_while_others_write_and_the_worker_dies(mount):
    mount.start()
    folder = mount.path / "d"
    names, done = filled(folder, 900), threading.Event()

    def write():
        for name, fresh in zip(itertools.cycle(sorted(names)), itertools.count()):
            replace_from_within(folder, name)
            (folder / f"fresh-{fresh:08d}").touch()  # more and more: a listing without an end would run after them
            time.sleep(0.002)
            if done.is_set():
                return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for kill in (False, True):
            told = list[str]()
            with os.scandir(folder) as entries:
                for entry in itertools.islice(entries, 1_000_000):
                    if kill and len(told) == 500:
                        mount.kill_worker()
                    told.append(entry.name)
                    time.sleep(0.0001 if len(told) % 16 == 0 else 0)
            stayed = [name for name in told if name in names]
            assert len(stayed) == len(names) and set(stayed) == names and len(told) < 900_000
    finally:
        done.set()
        writer.join(60)
    assert not writer.is_alive()


class Dirent(ctypes.Structure):
    _fields_ = [("ino", ctypes.c_uint64), ("off", ctypes.c_int64), ("size", ctypes.c_uint16), ("kind", ctypes.c_uint8)]


def next_name(stream):
    entry = LIBC.readdir64(stream)
    return os.fsdecode(ctypes.string_at(entry + Dirent.kind.offset + 1)) if entry else None


def names_left(stream):
    return [name for name in iter(lambda: next_name(stream), None) if name not in (".", "..")]


def test_positions_hold_and_rewinding_begins_anew(mount):
    mount.start()
    folder = mount.path / "d"
    names = filled(folder, 1000)
    stream = LIBC.opendir(os.fsencode(folder))
    try:
        told = [name for name in (next_name(stream) for _ in range(900)) if name not in (".", "..")]
        place = LIBC.telldir(stream)
        for name in sorted(names):
            replace(folder, name)
        (folder / "later").touch()
        rest = names_left(stream)
        assert set(rest) | set(told) == names and len(rest) + len(told) == len(names)
        mount.kill_worker()
        LIBC.seekdir(stream, place)
        assert [name for name in names_left(stream) if name != "later"] == rest  # a new worker may tell what has come
        LIBC.rewinddir(stream)
        again = names_left(stream)
        assert set(again) == names | {"later"} and len(again) == len(names) + 1
    finally:
        LIBC.closedir(stream)
