"""A workload on a real store, told to the shim step by step: `python -m tests.faults.recorder BASE SEED STEPS MUTANT`.

A second run on the same BASE goes on where the first was killed.

Owns: the choice of operations and the marks {"begin": ...} and {"done": ...} around each. Runs under recording. Blocks and
extents are small, so that every transition of the store happens within a few hundred calls: several blocks a file, sealed and
deleted extents, punched records, checkpoints, restarts, files that are staged in parking.
MUTANTS are wrong orders of writing; the replay must catch each of them.
"""

import ctypes
import json
import os
import random
import sys
from collections.abc import Awaitable
from pathlib import Path
from unittest import mock

import trio

from cascadefs.config import Settings
from cascadefs.media import file_io, reserve
from cascadefs.metadata import sqlite
from cascadefs.metadata.namespace import ROOT
from cascadefs.metadata.sqlite import Database
from cascadefs.placement import decisions
from cascadefs.store import Store
from cascadefs.tiers import patch_log
from cascadefs.types import Home
from cascadefs.writeback import fsync, patches
from cascadefs.writeback.mover import Mover
from tests.stores import pause

KIB = 1024
BLOCK_BYTES, EXTENT_BYTES, BATCH_BYTES = 8 * KIB, 96 * KIB, 48 * KIB
SIZES = (0, 1, 700, 4 * KIB, 8 * KIB, 9000, 20 * KIB)
NAMES = [f"f{i}" for i in range(9)]
CHECKPOINT_EVERY = 50  # pages of WAL, instead of 32000: several checkpoints in one recording

_library = ctypes.CDLL(None)


def settings(base: Path) -> Settings:
    """Of the recording and of every replay."""
    reserve.RESERVE_BYTES, decisions.STRAIGHT_BYTES = 64 * KIB, 16 * KIB
    fsync.SYNCS = 1
    patches.FROM_BYTES, patches.LOG_BYTES, patch_log.ROOM_BYTES = 4 * KIB, 32 * KIB, 16 * KIB
    return Settings(
        store=base / "disk" / "store",
        shm_dir=base / "shm",
        shm_size=64 * KIB * KIB,
        seal_delay=0.0,
        extent_size=EXTENT_BYTES,
        batch_size=BATCH_BYTES,
    )


class Recorder:
    """One recording. Every operation is awaited to its end before the next one begins."""

    def __init__(self, base: Path, seed: int) -> None:
        self.base, self.random = base, random.Random(seed)
        self._files = base / "files.json"
        known = json.loads(self._files.read_text()) if self._files.exists() else {}
        self.files = {name: bytes.fromhex(data) for name, data in known.items()}
        self.contents: list[bytes] = []
        self.store = self.opened()

    def opened(self) -> Store:
        store = Store(settings(self.base))
        sqlite.WAL_FRAMES = CHECKPOINT_EVERY
        return store

    def mark(self, **what: object) -> None:
        _library.faults_mark(json.dumps(what).encode())

    async def step(self) -> None:
        names = list(self.files)
        kinds = ["put"] * 5 + ["rounds"] * 2 + ["park"]
        of_files = ["append"] * 2 + ["edit"] * 2 + ["cut"] + ["unlink"] * 2 + ["rename"] * 2 + ["link"] + ["fsync"] * 3
        kinds += of_files * bool(names)
        kinds += ["flush"] + ["restart"] * (self.random.random() < 0.3)
        kind = self.random.choice(kinds)
        await getattr(self, kind)(self.random.choice(names) if names else "")
        self.store.database.tend()

    async def told(self, op: str, work: Awaitable[None], **what: object) -> None:
        """`work` between its marks."""
        self.mark(begin=op, **what)
        await work
        self.mark(done=op, **what)

    def fresh(self) -> bytes:
        """A content; one in four was seen before, so that contents are shared."""
        if self.contents and self.random.random() < 0.25:
            return self.random.choice(self.contents[-6:])
        self.contents.append(self.random.randbytes(self.random.choice(SIZES)))
        return self.contents[-1]

    async def put(self, _: str) -> None:
        name = self.random.choice(NAMES)
        data = self.fresh()
        for other in self.same(name):
            self.files[other] = data
        self.files[name] = data
        await self.told("write", self.store.put(name, data), name=name, data=data.hex())

    async def park(self, _: str) -> None:
        """As put(), while memory is full: the staged file is on disk."""
        with mock.patch.object(self.store.residency, "home_for_new", lambda: Home.COLD):
            await self.put(_)

    async def append(self, name: str) -> None:
        more = self.random.randbytes(self.random.choice((1, 500, 9000, BATCH_BYTES)))
        await self.change(name, len(self.files[name]), more)

    async def edit(self, name: str) -> None:
        """A file of more than a block that is synced as it is open, again and again."""
        await self.change(name, len(self.files[name]), self.random.randbytes(9000), edits=5)

    async def cut(self, name: str) -> None:
        size = self.random.randint(0, len(self.files[name]))
        data = self.files[name][:size]
        for other in self.same(name):
            self.files[other] = data
        truncated = self.store.files.truncate(self.store.find(name).ino, size)
        await self.told("write", truncated, name=name, data=data.hex())

    def same(self, name: str) -> list[str]:
        """The names of a file."""
        inos = {other: self.store.find(other).ino for other in self.files}
        return [other for other in self.files if name in inos and inos[other] == inos[name]]

    async def change(self, name: str, offset: int, more: bytes, edits: int = 0) -> None:
        data = self.files[name][:offset] + more
        for other in self.same(name):
            self.files[other] = data
        self.mark(begin="write", name=name, data=data.hex())
        ino = self.store.find(name).ino
        handle = await self.store.files.open(ino, writable=True)
        try:
            fd = os.open(self.store.files.staged_path(self.store.namespace.get(ino)), os.O_WRONLY)
            os.pwrite(fd, more, offset)
            os.close(fd)
            if edits or self.random.random() < 0.3:
                self.mark(done="write", name=name, data=data.hex())
                await self.told("fsync", self.store.mover.fsync(ino), name=name)
                for _ in range(edits):
                    data = await self.edited(name, ino)
        finally:
            self.store.files.release(handle)
        self.mark(done="write", name=name, data=data.hex())

    async def edited(self, name: str, ino: int) -> bytes:
        """Three bytes of an open file change, and are synced: little is to be written. What it holds now."""
        data = self.files[name]
        at, more = self.random.randrange(len(data)), self.random.randbytes(3)
        data = data[:at] + more + data[at + 3 :]
        for other in self.same(name):
            self.files[other] = data
        self.mark(begin="write", name=name, data=data.hex())
        fd = os.open(self.store.files.staged_path(self.store.namespace.get(ino)), os.O_WRONLY)
        os.pwrite(fd, more, at)
        os.close(fd)
        self.mark(done="write", name=name, data=data.hex())
        await self.told("fsync", self.store.mover.fsync(ino), name=name)
        return data

    async def unlink(self, name: str) -> None:
        del self.files[name]
        self.mark(begin="unlink", name=name)
        self.store.files.forget_if_gone(self.store.namespace.unlink(ROOT, name.encode()).ino)
        self.mark(done="unlink", name=name)
        if self.random.random() < 0.5:
            await self.rounds("")  # what died is punched before the next fsync

    async def rename(self, name: str) -> None:
        target = self.random.choice(NAMES)
        if target in self.same(name):
            return
        self.files[target] = self.files.pop(name)
        self.mark(begin="rename", name=name, target=target)
        _, gone = self.store.namespace.rename(ROOT, name.encode(), ROOT, target.encode(), 0)
        if gone is not None:
            self.store.files.forget_if_gone(gone.ino)
        self.mark(done="rename", name=name, target=target)

    async def link(self, name: str) -> None:
        target = self.random.choice(NAMES)
        if target in self.files:
            return
        self.files[target] = self.files[name]
        self.mark(begin="link", name=name, target=target)
        self.store.namespace.link(self.store.find(name).ino, ROOT, target.encode())
        self.mark(done="link", name=name, target=target)

    async def fsync(self, name: str) -> None:
        await self.told("fsync", self.store.mover.fsync(self.store.find(name).ino), name=name)

    async def flush(self, _: str) -> None:
        await self.told("flush", self.store.flush())

    async def rounds(self, _: str) -> None:
        """What the background does by itself."""
        pause(self.store)
        await self.store.mover.seal_round()
        await self.store.mover.flush_batch(())

    async def restart(self, _: str) -> None:
        """The process ends well and comes back; memory stays."""
        self.store.close()
        self.store = self.opened()
        await self.told_again()

    async def told_again(self) -> None:
        """As the background soon does after a process that had not told the extents everything."""
        if self.store.mover.journal.incomplete:
            await self.store.mover.tell()

    async def run(self, steps: int) -> None:
        await self.told_again()
        for _ in range(steps):
            await self.step()
        self._files.write_text(json.dumps({name: data.hex() for name, data in self.files.items()}))
        os._exit(0)  # as kill -9 would: the next part of the recording begins with a recovery


# --- wrong orders


def unsynced_data() -> None:
    """The index is committed and synced, the records that it points to are not."""
    file_io.sync_data = lambda fd: None


def unsynced_index() -> None:
    """fsync answers before the WAL is on the medium."""
    Database.sync = lambda self: None  # type: ignore[method-assign]


def early_punch() -> None:
    """Records are punched before the commit that forgot them is durable."""

    async def give_back(self: Mover) -> None:
        dead, self.files.dead = self.files.dead, []
        self.cold.punch(dead)

    Mover._give_back = give_back  # type: ignore[method-assign]


def unsynced_names() -> None:
    """New extents and the files of the index get no folder sync."""
    file_io.sync_folder = lambda folder: None


def early_sums() -> None:
    """The checksums of the index are on the medium before the transactions that they are of."""
    checkpoint, sync = Database.checkpoint, Database.sync

    def without_sync(self: Database) -> None:
        with mock.patch.object(Database, "sync", lambda self: None):
            checkpoint(self)
        sync(self)

    Database.checkpoint = without_sync  # type: ignore[method-assign]


MUTANTS = {m.__name__: m for m in (unsynced_data, unsynced_index, early_punch, unsynced_names, early_sums)}


def main() -> None:
    """See the first lines."""
    base, seed, steps, mutant = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    sqlite.BLOCK_BYTES = BLOCK_BYTES
    if mutant != "none":
        MUTANTS[mutant]()

    async def work() -> None:
        recorder = Recorder(base, seed)
        await recorder.run(steps)

    trio.run(work)


if __name__ == "__main__":
    main()
