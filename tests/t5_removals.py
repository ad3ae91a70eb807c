"""UNLINK answered by the transport: what it takes, what it records, what it leaves to Python, and what a crash makes of it."""

import os
import select
import struct
import time

import pytest
from t5_creates import ATTRIBUTES, FOLDER, GETATTR, RESENT, Maker

from cascadefs.formats import name_ring
from cascadefs.formats.name_ring import Created, NameRing, Removed
from cascadefs.store import Store

LOOKUP, UNLINK, ENOENT = 1, 10, -2
FILE = 70


class Remover(Maker):
    """A transport that may remove names."""

    def __init__(self, folder):
        super().__init__(folder)
        self.transport.allow_removals(True)

    def unlink(self, name, unique=8, folder=FOLDER):
        self.kernel.send(struct.pack("<IIQQIIIHH", 41 + len(name), UNLINK, unique, folder, 0, 0, 0, 0, 0) + name + b"\0")

    def ask_attributes(self, ino):
        self.kernel.send(struct.pack("<IIQQIIIHH", 56, GETATTR, 9, ino, 0, 0, 0, 0, 0) + bytes(16))


@pytest.fixture
def remover(tmp_path):
    found = Remover(tmp_path)
    found.transport.add_name(FOLDER, b"known")
    yield found
    found.close()


def test_a_removal_is_answered_and_recorded(remover):
    before = time.time_ns()
    remover.unlink(b"known", unique=12)
    assert remover.answered() == (0, 12, b"")
    (found,) = remover.pending()
    assert (found.request, found.number, found.folder, found.name) == (12, 0, FOLDER, b"known")
    assert before <= found.time_ns <= time.time_ns()
    remover.ask(LOOKUP, b"known\0")  # the name is gone at once
    assert remover.answered()[0] == ENOENT
    remover.ask(GETATTR, bytes(16))  # and its folder has changed
    folder = ATTRIBUTES.unpack_from(remover.answered()[2], 16)
    assert folder[4] * 10**9 + folder[7] == found.time_ns


def test_a_name_is_removed_and_made_again_in_that_order(remover):
    remover.offer(FILE)
    remover.unlink(b"known")
    remover.answered()
    remover.create(b"known")
    remover.answered()
    remover.unlink(b"known")
    remover.answered()
    assert [type(one) for one in remover.pending()] == [Removed, Created, Removed]
    assert [one.at for one in remover.pending()] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "options"),
    [(b".cascade", {}), (b"unknown", {}), (b"known", {"unique": RESENT | 8}), (b"known", {"folder": 5})],
    ids=["python's", "unknown", "sent again", "folder not known"],
)
def test_what_is_not_plain_is_for_python(remover, name, options):
    remover.transport.add_name(5, b"known")
    remover.unlink(name, **options)
    assert remover.forwarded()[0] == UNLINK
    assert not remover.pending()


def test_nothing_is_removed_while_the_index_would_not_take_it(remover):
    remover.transport.allow_removals(False)
    remover.unlink(b"known")
    assert remover.forwarded()[0] == UNLINK and not remover.pending()
    remover.ask(LOOKUP, b"known\0")
    assert remover.forwarded()[0] == LOOKUP


def test_a_full_ring_takes_nothing_until_it_is_settled(remover):
    for i in range(name_ring.RECORDS):
        remover.transport.add_name(FOLDER, b"n%d" % i)
        remover.unlink(b"n%d" % i)
        remover.answered()
    remover.unlink(b"known")
    assert remover.forwarded()[0] == UNLINK
    remover.ring.settle(remover.ring.put)
    remover.unlink(b"known")
    assert remover.answered()[0] == 0


def known_file(remover, ino):
    file = ATTRIBUTES.pack(ino, 0, 0, 1, 1, 1, 0, 0, 0, 0o100644, 1, 0, 0, 0, 4096, 0)
    remover.transport.set_attributes(ino, struct.pack("<QII", 3600, 0, 0) + file)


def is_known(remover, ino):
    """Whether its attributes are told without Python."""
    remover.ask_attributes(ino)
    ready = select.select([remover.kernel, remover.fuse], [], [], 5)[0]
    if remover.fuse in ready:
        assert remover.forwarded()[0] == GETATTR
        return False
    assert remover.answered()[0] == 0
    return True


@pytest.mark.parametrize("made_here", [False, True])
def test_a_removal_of_a_name_whose_file_is_known_concerns_that_only(remover, made_here):
    name = b"made" if made_here else b"known"
    if made_here:
        remover.offer(FILE)
        remover.create(name)
        remover.answered()
    else:
        known_file(remover, FILE)
        remover.transport.tell_name(FOLDER, name, FILE)
    known_file(remover, FILE + 1)
    assert is_known(remover, FILE)
    remover.unlink(name)
    remover.answered()
    assert is_known(remover, FILE + 1) and not is_known(remover, FILE)
    for ino in (FILE, FILE + 1):
        known_file(remover, ino)  # who says that may not have heard of the removal
        assert is_known(remover, ino) == (ino != FILE)
    remover.ring.settle(remover.ring.put)
    known_file(remover, FILE)
    assert is_known(remover, FILE)


def test_a_name_that_shares_its_hash_or_is_another_ones_now_is_not_known(remover):
    known_file(remover, FILE)
    remover.transport.add_name(FOLDER, b"known")  # a second of that hash
    remover.transport.tell_name(FOLDER, b"known", FILE + 1)
    remover.unlink(b"known")
    remover.answered()
    assert not is_known(remover, FILE)
    remover.ring.settle(remover.ring.put)
    remover.transport.tell_name(FOLDER, b"known", FILE + 1)
    remover.transport.add_name(FOLDER, b"known")  # renamed over: told again when it is known whose it is
    remover.transport.remove_name(FOLDER, b"known")
    remover.unlink(b"known")
    remover.answered()
    assert not is_known(remover, FILE)


def test_what_is_known_of_files_waits_until_removals_are_entered(remover):
    file = ATTRIBUTES.pack(FILE, 0, 0, 1, 1, 1, 0, 0, 0, 0o100644, 1, 0, 0, 0, 4096, 0)
    remover.transport.set_attributes(FILE, struct.pack("<QII", 3600, 0, 0) + file)
    remover.ask_attributes(FILE)
    assert remover.answered()[0] == 0
    remover.unlink(b"known")
    remover.answered()
    remover.ask_attributes(FILE)  # it may be the one that lost its name
    assert remover.forwarded()[0] == GETATTR
    remover.ring.settle(remover.ring.put)
    remover.ask_attributes(FILE)
    assert remover.answered()[0] == 0


# --- after a crash


async def crash_after(settings, act):
    """A store with the files a and b, whose process died when `act(remover)` had been answered and nothing of it entered."""
    store = Store(settings)
    for name in ("a", "b"):
        await store.put(name, b"old " + name.encode())
    ino, remover = store.namespace.reserve_ino(), Remover(store.residency.memory.folder)
    try:
        for name in (b"a", b"b"):
            remover.transport.add_name(FOLDER, name)
        remover.offer(ino)
        act(remover)
        (store.residency.memory.folder / "staged" / str(ino)).write_bytes(b"new")
    finally:
        remover.close()
        store.close()
    return store.residency.memory.folder.joinpath(*name_ring.PLACE)


def replace_a(remover):
    remover.unlink(b"a")
    remover.answered()
    remover.create(b"a")
    remover.answered()


async def names_and_a(settings):
    store = Store(settings)
    try:
        names = sorted(name for _, name, _ in store.namespace.listing(FOLDER, 0))
        return names, await store.get("a") if b"a" in names else None
    finally:
        store.close()


async def test_removals_that_the_index_never_heard_of_are_done_after_a_crash(settings):
    await crash_after(settings, lambda remover: (remover.unlink(b"a"), remover.answered()))
    assert await names_and_a(settings) == ([b"b"], None)


async def test_a_name_made_again_is_the_new_file_after_a_crash(settings):
    await crash_after(settings, replace_a)
    assert await names_and_a(settings) == ([b"a", b"b"], b"new")


async def test_a_removal_that_was_entered_does_not_take_the_name_made_after_it(settings):
    """The crash came between the commit and the ring's hearing of it: the records come once more."""
    ring = await crash_after(settings, replace_a)
    unsettled = ring.read_bytes()
    store = Store(settings)
    numbered = bytes(store.ring.memory)
    store.close()
    begun = name_ring._HEAD.size
    ring.write_bytes(unsettled[:begun] + numbered[begun:])
    assert NameRing(ring.parent.parent).pending(2)[0].number
    assert await names_and_a(settings) == ([b"a", b"b"], b"new")


async def test_a_removal_that_had_begun_and_was_not_committed_is_done(settings):
    ring = await crash_after(settings, replace_a)
    opened = NameRing(ring.parent.parent)
    opened.begin(opened.pending(2), [time.time_ns(), time.time_ns()])
    assert await names_and_a(settings) == ([b"a", b"b"], b"new")


async def test_a_removal_in_a_folder_that_is_gone_is_told_and_hurts_nobody(settings, caplog):
    def act(remover):
        remover.transport.add_name(FOLDER, b"never")
        remover.unlink(b"never")
        remover.answered()

    await crash_after(settings, act)
    assert (await names_and_a(settings))[0] == [b"a", b"b"]
    assert "cannot be entered" in caplog.text


def test_records_that_make_no_sense_are_left_out(remover, caplog):
    remover.unlink(b"known")
    remover.answered()
    at = name_ring._HEAD.size + name_ring._RECORD.size - 256 - 24  # its kind
    remover.ring.memory[at : at + 4] = struct.pack("<I", 99)
    assert remover.pending() == [] and "makes no sense" in caplog.text
    assert os.fsencode(str(remover.ring.put)) == b"1"
