"""A process dies at each step of giving files to inodes; the next one finds for each open file the one that the kernel has.

The first process hands its parent, who stands for the kernel, each file that it has opened, and dies before its n-th change of
a name. What is open goes on in the second process: readers see the writers of their own file, and of no other.
"""

import itertools
import os
import socket
from dataclasses import replace

import trio
from stores import unmount_memory

from cascadefs.config import MIB
from cascadefs.media import file_io
from cascadefs.store import Store

OLD = b"old!" * 5000
DEAD = 77
CHANGES = ("link", "rename", "remove", "copy_file")


def die_at(number):
    """Before the number-th change of a name, or making of a copy."""
    left = itertools.count(1)

    def dying(function):
        def call(*words):
            if next(left) == number:
                os._exit(DEAD)
            return function(*words)

        return call

    for name in CHANGES:
        setattr(file_io, name, dying(getattr(file_io, name)))


async def first_life(settings, kernel, number):
    """Equal files are opened, written to, sealed while open."""

    async def open_file(name, writable=False):
        handle = await store.files.open(store.find(name).ino, writable)
        fd = os.open(f"/proc/self/fd/{handle.source.fd}", os.O_RDWR)
        socket.send_fds(kernel, [f"{name} {handle.ino} {writable:d}".encode()], [fd])
        os.close(fd)
        return handle

    async def write(name):
        handle = await open_file(name, True)
        with open(f"/proc/self/fd/{handle.source.fd}", "r+b") as file:
            file.write(name.encode())

    store = Store(settings)
    for name in "abc":
        await store.put(name, OLD)
        await store.info(store.find(name).ino)
    await store.put("d", OLD)
    die_at(number)
    await open_file("a")
    await open_file("b")
    await write("a")
    await open_file("d")
    await store.info(store.find("d").ino)
    await write("b")
    await open_file("c")
    await write("d")


def live_and_die(settings, number):
    """What the kernel has open afterwards: [(name, inode, writable, descriptor)]; whether it died."""
    kernel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        try:
            trio.run(first_life, settings, theirs, number)
        finally:
            os._exit(0)
    theirs.close()
    opened = []
    while True:
        text, fds, _, _ = socket.recv_fds(kernel, 100, 1)
        if not text:
            break
        name, ino, writable = text.decode().split()
        opened.append((name, int(ino), writable == "1", *fds))
    kernel.close()
    return opened, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == DEAD


async def second_life(settings, opened):
    store = Store(settings, keep_orphans=True)
    try:
        for _, ino, writable, fd in opened:
            handle = store.files.inherit(ino, writable, direct=False)
            assert os.path.samestat(os.fstat(handle.source.fd), os.fstat(fd))
        for name in "abcd":
            assert await store.get(name) in (OLD, name.encode() + OLD[1:])
            handle = await store.files.open(store.find(name).ino, True)
            fd = os.open(f"/proc/self/fd/{handle.source.fd}", os.O_WRONLY)
            os.pwrite(fd, name.upper().encode() * 3, 0)
            os.close(fd)
        for name in "abcd":
            assert await store.get(name) == name.upper().encode() * 3 + OLD[3:]
        for name, _, _, fd in opened:
            assert os.pread(fd, 1 << 20, 0) == name.upper().encode() * 3 + OLD[3:]
    finally:
        store.close()


def test_every_file_is_found_again_wherever_the_first_process_died(settings, tmp_path):
    for number in itertools.count(1):
        (tmp_path / f"shm{number}").mkdir()
        here = replace(settings, store=tmp_path / f"store{number}", shm_dir=tmp_path / f"shm{number}", shm_size=16 * MIB)
        opened, died = live_and_die(here, number)
        try:
            trio.run(second_life, here, opened)
        finally:
            for *_, fd in opened:
                os.close(fd)
            unmount_memory(here)
        if not died:
            break
    assert number > 10 and len(opened) == 7
