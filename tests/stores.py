"""Stores without a mount, as several layers' tests use them: opened with their tasks running, closed, damaged."""

import os
import shutil
import stat
import subprocess
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import trio

from cascadefs.metadata.namespace import ROOT
from cascadefs.store import Store
from cascadefs.tiers import owner


@asynccontextmanager
async def opened(settings, watcher=None):
    """An open store with its tasks running; afterwards closed as a killed process leaves it: nothing is flushed."""
    store = Store(settings, watcher=watcher)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.run)
            yield store
            nursery.cancel_scope.cancel()
    finally:
        store.close()


@contextmanager
def written(store, name, data, folder=ROOT):
    """A new file that is still open for writing: its inode's number."""
    inode = store.namespace.make(folder, name.encode(), stat.S_IFREG | 0o600, 0, 0, home=1)
    handle = store.files.create_content(inode)
    fd = os.open(store.files.staged_path(store.namespace.get(inode.ino)), os.O_WRONLY)
    os.write(fd, data)
    try:
        yield inode.ino
    finally:
        os.close(fd)
        store.files.release(handle)


def pause(store):
    """As after a while in which nothing was opened, closed or written: what is closed is due to be sealed."""
    store.files.last_use, store.files._memory_used = 0.0, 1 << 60


def memory_of(settings):
    return [folder for folder in settings.shm_dir.glob("cascadefs-*") if folder.is_dir()]


def wipe_memory(settings):
    for folder in memory_of(settings):
        for part in folder.iterdir():
            shutil.rmtree(part)


def move_in(store, shm_dir):
    """A store and its memory tier that were copied together belong together, as if they had been moved."""
    here, memory = os.stat(store), owner.read_memory(store)
    folder = shm_dir / Path(memory.folder).name
    known = owner.read_owner(folder)
    owner.write_memory(store, replace(memory, folder=str(folder), device=here.st_dev, inode=here.st_ino))
    owner.write_owner(folder, replace(known, device=here.st_dev, inode=here.st_ino))


def unmount_memory(settings):
    for folder in memory_of(settings):
        if os.path.ismount(folder):
            subprocess.run(["umount", "-l", folder], check=True)


def flip(path, bit):
    """Flip one bit of a file, counted from its start."""
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))
