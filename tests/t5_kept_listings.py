"""Listings that the kernel keeps: when it is let do so, and that nobody sees anything else than without."""

import os
import struct
import threading

import pytest
from t5_listing import OPENDIR, READDIRPLUS, ROOT, ask, drop_caches, io_body, requests, until
from t5_transport import OPEN, Wire

from cascadefs.mount.fuse.listings import BOUNDS_MAX, Part, Wholes

CACHE, KEEP = 8, 2  # FOPEN_CACHE_DIR, FOPEN_KEEP_CACHE
FOLDER, NAMES = 9, 2000


@pytest.fixture
def wire():
    found = Wire()
    found.transport.take_listings()
    yield found
    found.close()


def flags(wire, folder=FOLDER):
    ask(wire, OPENDIR, bytes(8), folder=folder)
    return struct.unpack_from("<QI", wire.answered()[2])[1]


def test_the_kernel_keeps_what_python_says_until_it_is_no_longer_so(wire):
    assert flags(wire) == CACHE
    wire.transport.keep_listing(FOLDER)
    assert flags(wire) == flags(wire) == CACHE | KEEP and flags(wire, FOLDER + 1) == CACHE
    ask(wire, READDIRPLUS, io_body(5, 100, 4096), folder=FOLDER)
    assert flags(wire) == CACHE | KEEP
    ask(wire, READDIRPLUS, io_body(5, 0, 4096), folder=FOLDER)  # something has changed: it begins anew
    assert flags(wire) == CACHE
    wire.transport.keep_listing(FOLDER)
    wire.transport.keep_listing()
    assert flags(wire) == CACHE


def test_it_asks_again_when_many_files_were_opened(wire):
    wire.transport.grant(ROOT, -1, 77, 0)
    wire.transport.number_grants(500)
    wire.transport.keep_listing(FOLDER)
    for opens in range(4096):
        assert opens % 512 or flags(wire) == CACHE | KEEP
        wire.ask(OPEN, struct.pack("<II", os.O_RDONLY, 0))
        wire.answered()
    assert flags(wire) == CACHE
    wire.transport.keep_listing(FOLDER)
    assert flags(wire) == CACHE | KEEP


def test_so_many_folders_are_known_and_not_more(wire):
    for folder in range(2, 5000):
        wire.transport.keep_listing(folder)
    assert flags(wire, 2) == CACHE and flags(wire, 4999) == CACHE | KEEP


def part(end, staged=False):
    return Part(b"x" if end else b"", [5] if end else [], staged, end, 0)


def test_a_whole_listing_is_one_without_gaps_and_without_staged_files():
    wholes = Wholes()
    assert not wholes.told(1, 0, part(7), False) and not wholes.told(2, 0, part(7), False)
    assert not wholes.told(1, 7, part(9), False) and not wholes.told(2, 8, part(9), False)
    assert wholes.told(1, 9, part(0), True) and not wholes.told(2, 9, part(0), True)
    assert not wholes.told(1, 9, part(0), True)  # once is enough
    assert not wholes.told(3, 0, part(7, staged=True), False) and not wholes.told(3, 7, part(0), True)
    assert not wholes.told(4, 0, part(0), False) and wholes.told(4, 2, part(0), True)  # an empty folder: dots
    assert not wholes.told(5, 0, part(7), False) and not wholes.told(5, 0, part(8), False)  # rewinddir
    assert wholes.told(5, 8, part(0), True)
    for handle in range(10, 11 + BOUNDS_MAX):
        wholes.told(handle, 0, part(7), False)
    assert not wholes.told(10, 7, part(0), True) and wholes.told(11, 7, part(0), True)


# --- on a mount


@pytest.fixture
def folder(mount):
    """Of settled files, listed and kept."""
    mount.start()
    found = mount.path / "d"
    found.mkdir()
    for i in range(NAMES):
        (found / f"{i:05d}").touch()
    mount.flush()
    until(lambda: kept(mount, found))
    return found


def kept(mount, folder):
    """Whether a listing does not ask; the first ones do."""
    before = requests(mount).get("readdirplus", 0)
    os.listdir(folder)
    return requests(mount).get("readdirplus", 0) == before


def test_the_second_listing_asks_nobody_and_so_do_stats_after_it(mount, folder):
    before = requests(mount)
    with os.scandir(folder) as entries:
        found = {entry.name: (entry.inode(), entry.stat(follow_symlinks=False).st_ino) for entry in entries}
    assert sorted(found) == [f"{i:05d}" for i in range(NAMES)] and all(a == b for a, b in found.values())
    after, looking = requests(mount), 50
    for kind in ("readdirplus", "lookup", "getattr", "forwarded"):
        assert after.get(kind, 0) - before.get(kind, 0) < looking


def test_each_change_is_seen_at_once(mount, folder):
    names = set(os.listdir(folder))
    away = mount.path / "away"
    away.mkdir()
    for i in range(10):
        (folder / f"new{i}").touch()
        (folder / f"{i:05d}").unlink()
        (folder / f"{i + 10:05d}").rename(folder / f"moved{i}")
        (folder / f"{i + 20:05d}").rename(away / f"{i}")
        (mount.path / "tmp").touch()
        os.replace(mount.path / "tmp", folder / f"{i + 30:05d}")
        (folder / f"sub{i}").mkdir()
        os.link(folder / "00100", folder / f"link{i}")
        names |= {f"new{i}", f"moved{i}", f"sub{i}", f"link{i}"}
        names -= {f"{i:05d}", f"{i + 10:05d}", f"{i + 20:05d}"}
        assert set(os.listdir(folder)) == names
        assert len(os.listdir(folder)) == len(names)


def test_a_listing_under_way_keeps_its_names_while_others_change_them(mount, folder):
    names = set(os.listdir(folder))
    with os.scandir(folder) as entries:
        told = [next(entries).name for _ in range(50)]
        for i in range(NAMES // 2, NAMES):
            (folder / f"{i:05d}").rename(folder / f"{i:05d}.bak")
        assert len(os.listdir(folder)) == NAMES  # the kernel begins what it keeps anew
        told += [entry.name.removesuffix(".bak") for entry in entries]
    assert len(told) == len(names) and set(told) == names


def test_what_the_kernel_has_forgotten_is_told_again_with_attributes(mount, folder):
    fd = os.open(folder, os.O_RDONLY)  # it keeps the listing with the folder
    try:
        drop_caches()
        until(lambda: not kept(mount, folder))
        before = requests(mount)
        for name in os.listdir(folder):
            os.stat(folder / name)
        after, looking = requests(mount), 50
        assert after["lookup"] - before["lookup"] < looking and after["getattr"] - before["getattr"] < looking
        assert kept(mount, folder)
    finally:
        os.close(fd)


def test_fresh_files_are_listed_anew_until_they_are_settled(mount, folder):
    with open(folder / "open", "wb", buffering=0) as writer:
        for size in (10, 20):
            writer.write(bytes(10))
            assert not kept(mount, folder)
            assert (folder / "open").stat().st_size == size
    mount.flush()
    until(lambda: kept(mount, folder))
    assert (folder / "open").stat().st_size == 20


def test_names_stay_complete_while_some_come_and_go_and_the_worker_dies(mount, folder):
    stay, done, found = set(os.listdir(folder)), threading.Event(), list[list[str]]()

    def change():
        while not done.is_set():
            (folder / "comes").touch()
            (folder / "comes").rename(folder / "goes")
            (folder / "goes").unlink()
            done.wait(0.01)

    def list_all():
        while not done.is_set():
            found.append(os.listdir(folder))

    threads = [threading.Thread(target=one) for one in (change, list_all, list_all)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            old, seen = mount.kill_worker(), len(found)
            until(lambda old=old, seen=seen: mount.status()["worker_pid"] != old and len(found) > seen + 20)
    finally:
        done.set()
        for thread in threads:
            thread.join(30)
    assert all(stay <= set(listed) <= stay | {"comes", "goes"} and len(listed) == len(set(listed)) for listed in found)
    assert set(os.listdir(folder)) == stay
