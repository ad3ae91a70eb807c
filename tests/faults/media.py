"""Failing media: one workload, run again and again with a fault at the n-th call. Runs under the shim:

`python -m tests.faults.media BASE CONTROL FAULT PART PARTS EVERY` visits every EVERY-th site of its share and prints a Result.

Owns: the workload, the faults, and what must hold: an operation succeeds or raises the errno of the medium; what was
acknowledged is there; once the medium works again a flush succeeds at the first try, nothing has leaked and no trouble is
reported.
"""

import errno
import json
import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import trio

from cascadefs.errors import StoreError
from cascadefs.metadata import sqlite
from cascadefs.metadata.namespace import ROOT
from cascadefs.store import Store
from cascadefs.types import Home
from tests.faults.control import DELAY, DISK, FAIL, KINDS, SHORT, TIERS, Control, Fault
from tests.faults.power import miscounted
from tests.faults.recorder import BLOCK_BYTES, settings
from tests.stores import pause

TAKES_SPACE = ("CREATE", "WRITE", "SYNC", "RENAME", "LINK", "MKDIR", "PUNCH", "SEND")
BYTES = ("READ", "WRITE", "SEND")
FAULTS = {
    fault.name: fault
    for fault in (
        Fault("full", FAIL, errno.ENOSPC, TAKES_SPACE, DISK),
        Fault("full-for-long", FAIL, errno.ENOSPC, TAKES_SPACE, DISK, lasts=True),
        Fault("memory-full", FAIL, errno.ENOSPC, TAKES_SPACE, ("MEMORY",)),
        Fault("memory-full-for-long", FAIL, errno.ENOSPC, TAKES_SPACE, ("MEMORY",), lasts=True),
        Fault("broken", FAIL, errno.EIO, KINDS, TIERS),
        Fault("writes-fail-for-long", FAIL, errno.EIO, TAKES_SPACE, DISK, lasts=True),
        Fault("short", SHORT, 0, BYTES, TIERS),
        Fault("slow", DELAY, 0, KINDS, TIERS),
    )
}
DATA = random.Random(7).randbytes(64 << 10)
COMPLAINTS = 5


@dataclass
class Result:
    """Calls that the fault can meet, and their kinds; visits and how many met it; what was wrong."""

    sites: int = 0
    visited: int = 0
    met: int = 0
    meets: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


class Wrong(Exception):
    """Something that must hold does not."""


class Visit:
    """One run of the workload with one fault armed (or none)."""

    def __init__(self, base: Path, fault: Fault) -> None:
        self.settings, self.fault = settings(base), fault
        self.allowed: dict[str, list[bytes | None]] = {}  # what each name may hold now; None: nothing
        self.store: Store

    def open(self) -> None:
        """A store that cannot be opened says so in one line, and can be opened when the medium works again."""
        try:
            self.store = Store(self.settings)
        except StoreError as e:
            if not isinstance(e.__cause__, (OSError, sqlite3.DatabaseError)):
                raise
            self.control.off()
            self.store = Store(self.settings)
        sqlite.WAL_FRAMES = 60

    async def tried(self, work: Callable[[], Awaitable[object]]) -> bool:
        """Whether an operation succeeded; if not, it failed with the errno of the medium. SQLite keeps none of a sync."""
        try:
            await work()
        except OSError as e:
            sync_in_sqlite = e.errno == errno.EIO and "SYNC" in self.fault.kinds and str(e).endswith("disk I/O error")
            if self.fault.mode == FAIL and (e.errno == self.fault.error or sync_in_sqlite):
                return False
            said = errno.errorcode[self.fault.error] if self.fault.mode == FAIL else "nothing"
            raise Wrong(f"{e!r} from an operation, but the medium said {said}") from e
        return True

    def there(self, name: str) -> list[bytes]:
        """What an existing file may hold; nothing when it is not sure that it exists."""
        allowed = [data for data in self.allowed.get(name, [None]) if data is not None]
        return allowed if len(allowed) == len(self.allowed.get(name, [None])) else []

    async def put(self, name: str, data: bytes) -> None:
        done = await self.tried(lambda: self.store.put(name, data))
        self.allowed[name] = [data] if done else [*self.allowed.get(name, [None]), *_parts(data)]

    async def park(self, name: str, data: bytes) -> None:
        """As put() while memory is full."""
        with mock.patch.object(self.store.residency, "home_for_new", lambda: Home.COLD):
            await self.put(name, data)

    async def append(self, name: str, more: bytes, sync: bool) -> None:
        """Write behind the end; fsync while the writer has it open."""
        if before := self.there(name):
            done = await self.tried(partial(self._append, name, more, sync))
            behind = [more] if done else [b"", *_parts(more)]
            self.allowed[name] = [data + part for data in before for part in behind]

    async def _append(self, name: str, more: bytes, sync: bool) -> None:
        ino = self.store.find(name).ino
        handle = await self.store.files.open(ino, writable=True)
        try:
            path = self.store.files.staged_path(self.store.namespace.get(ino))
            with open(path, "ab", buffering=0) as file:
                view = memoryview(more)
                while view:
                    view = view[file.write(view) :]
            if sync:
                await self.store.mover.fsync(ino)
        finally:
            self.store.files.release(handle)

    async def cut(self, name: str, size: int) -> None:
        if before := self.there(name):
            done = await self.tried(lambda: self.store.files.truncate(self.store.find(name).ino, size))
            after = [data[:size].ljust(size, b"\0") for data in before]
            self.allowed[name] = after if done else [*before, *after]

    async def unlink(self, name: str) -> None:
        async def work() -> None:
            self.store.files.forget_if_gone(self.store.namespace.unlink(ROOT, name.encode()).ino)

        if before := self.there(name):
            self.allowed[name] = [None] if await self.tried(work) else [*before, None]

    async def rename(self, name: str, target: str) -> None:
        async def work() -> None:
            _, gone = self.store.namespace.rename(ROOT, name.encode(), ROOT, target.encode(), 0)
            if gone is not None:
                self.store.files.forget_if_gone(gone.ino)

        if before := self.there(name):
            if await self.tried(work):
                self.allowed[name], self.allowed[target] = [None], list(before)
            else:
                self.allowed[name] = [*before, None]
                self.allowed[target] = [*self.allowed.get(target, [None]), *before]

    async def fsync(self, name: str) -> None:
        if self.there(name):
            await self.tried(lambda: self.store.mover.fsync(self.store.find(name).ino))

    async def rounds(self) -> None:
        """What the background does; it may fail, and must not lose anything."""
        pause(self.store)
        await self.tried(self.store.mover.seal_round)
        await self.tried(lambda: self.store.mover.flush_batch(()))
        self.store.database.tend()

    async def read_all(self) -> None:
        """Reading needs no space: it fails only when the fault is on the way to the bytes."""
        for name, allowed in self.allowed.items():
            try:
                data: bytes | None = await self.store.get(name)
            except FileNotFoundError:
                data = None
            except OSError as e:
                if "READ" in self.fault.kinds and self.fault.mode == FAIL and e.errno == self.fault.error:
                    continue
                raise Wrong(f"{name} cannot be read: {e!r}") from e
            if data not in allowed:
                sizes = [None if a is None else len(a) for a in allowed]
                raise Wrong(f"{name} holds {None if data is None else len(data)} bytes, not one of {sizes}")

    def forget_memory(self) -> None:
        """Evict every clean copy."""
        for digest in list(self.store.residency.clean):
            self.store.residency.drop(self.store.residency.memory, digest)

    async def workload(self) -> None:
        """Every transition of the store, in order and without a clock."""
        await self.put("small", DATA[:3000])
        await self.put("blocks", DATA[:20_000])
        await self.put("empty", b"")
        await self.fsync("small")
        await self.park("parked", DATA[30_000:50_000])
        await self.put("twin", DATA[:20_000])
        await self.rounds()
        await self.put("small", DATA[100:9000])
        await self.append("blocks", DATA[:700], sync=True)
        await self.append("twin", DATA[:5000], sync=False)
        await self.append("twin", DATA[:40_000], sync=True)  # longer than a batch
        await self.rename("twin", "moved")
        await self.rounds()
        await self.unlink("small")
        await self.rounds()
        await self.read_all()
        await self.tried(self.store.flush)
        await self.evict_and_read()
        await self.cut("blocks", 8500)
        await self.park("parked", DATA[:1000])
        for i in range(6):
            await self.put(f"many{i}", DATA[i * 1000 : i * 1000 + 16_000])
        await self.rounds()
        await self.unlink("many3")
        await self.rename("many4", "many5")
        await self.tried(self.store.flush)

    async def evict_and_read(self) -> None:
        async def evict() -> None:
            self.forget_memory()

        await self.tried(evict)
        await self.read_all()

    async def run(self, control: Control, at: int | None) -> None:
        """The workload with the fault, then what must hold without it."""
        self.control = control
        control.arm(self.fault, at)
        self.open()
        try:
            await self.workload()
            control.off()
            await self.settled()
        finally:
            control.off()
            self.store.close()
        await self.after_the_loss_of_memory()

    async def settled(self) -> None:
        """The medium works again."""
        await self.store.flush()
        await self.store.mover.flush_batch(())
        await self.read_all()
        files, trouble = self.store.files, self.store.database.health.lines()
        if trouble or files.leftover or files.dead or self.store.mover.unflushable:
            raise Wrong(f"left behind: {trouble} {files.leftover} {len(files.dead)} {self.store.mover.unflushable}")
        if self.store.namespace.orphans() or files.live or len(files.sources):
            raise Wrong(f"orphans {self.store.namespace.orphans()} {files.live} {len(files.sources)} open")
        if wrong := miscounted(self.store):
            raise Wrong(wrong)

    async def after_the_loss_of_memory(self) -> None:
        """All was flushed: nothing falls back, and no file on the disk is unknown to the index."""
        for folder in self.settings.shm_dir.glob("cascadefs-*/*"):
            shutil.rmtree(folder)
        self.store = Store(self.settings)
        try:
            found = self.store.recovered
            if found.absent or found.fallen_back or found.orphans:
                raise Wrong(f"memory was needed after a flush: {found}")
            await self.read_all()
            known = {row[0] for row in self.store.database.connection.execute("SELECT number FROM extents WHERE size>0")}
            there = {int(path.stem) for path in (self.settings.store / "extents").iterdir()}
            if known != there:
                raise Wrong(f"extents {there}, but the index knows {known}")
            left = [path.name for part in ("staged", "objects") for path in (self.settings.store / "parking" / part).iterdir()]
            if left:
                raise Wrong(f"files left in parking: {left}")
        finally:
            self.store.close()


def _parts(data: bytes) -> list[bytes]:
    """What a write that failed at one call may have left: nothing, a short transfer, all."""
    return [b"", data[: len(data) // 2 & ~511], data[: len(data) // 2], data]


def visit(base: Path, control: Control, fault: Fault, at: int | None) -> str | None:
    """What was wrong in one run, if anything."""
    shutil.rmtree(base, ignore_errors=True)
    for part in ("disk", "shm"):
        (base / part).mkdir(parents=True)
    try:
        trio.run(Visit(base, fault).run, control, at)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    finally:
        control.off()
        for folder in (base / "shm").iterdir():
            subprocess.run(["umount", "-l", folder], check=False, capture_output=True)
    left = [name for fd in os.listdir("/proc/self/fd") if str(base) in (name := _target(fd))]
    return f"descriptors left open: {left}" if left else None


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""  # the one that listed them


def main() -> None:
    """See the first lines."""
    base, control, name = Path(sys.argv[1]), Control(Path(sys.argv[2])), sys.argv[3]
    part, parts, every = map(int, sys.argv[4:])
    fault, result = FAULTS[name], Result()
    sqlite.BLOCK_BYTES = BLOCK_BYTES
    logging.disable(logging.CRITICAL)  # thousands of faults have much to tell
    if complaint := visit(base, control, fault, None):
        result.complaints.append(f"without a fault: {complaint}")
    sites = control.sites()
    result.sites, result.meets = len(sites), sorted(set(sites))
    chosen = range(part * every, len(sites), parts * every)
    for at in chosen if not result.complaints else ():
        complaint = visit(base, control, fault, at)
        result.visited += 1
        result.met += control.fired > 0
        if complaint:
            result.complaints.append(f"{name} at call {at} ({sites[at]}): {complaint}")
        if len(result.complaints) >= COMPLAINTS:
            break
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
