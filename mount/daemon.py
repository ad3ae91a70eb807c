"""The worker of a mount: opens the store, mounts or takes a mount over, serves until unmounted, flushes, leaves.

Owns: the order of coming up and going down, the log, the report to whoever started it. keeper.py starts it. Invariants:
(1) "mounted" is reported only when the kernel has its answer to INIT; whoever started us looks at the mount then, not we: a
    thread that waits for an answer of its own process cannot be killed, and the keeper would wait for it for ever.
(2) Whatever fails on the way up of a new mount is one line, and everything done so far is undone.
(3) After the mount is gone everything is flushed before the process ends; what cannot be flushed stays in memory.
(4) The first request is read when all that an earlier worker had open is known again.
"""

import contextlib
import ctypes
import gc
import logging
import os
import signal
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import humanfriendly
import trio

from cascadefs import crash
from cascadefs.config import Configuration
from cascadefs.errors import UserError
from cascadefs.ext import listing
from cascadefs.ext.fuse_transport import LARGEST_SPLICED_READ
from cascadefs.formats.name_ring import PLACE as NAMES
from cascadefs.media import file_io
from cascadefs.mount.fuse import device
from cascadefs.mount.fuse.device import Device, kernel_release
from cascadefs.mount.fuse.handles import Handles
from cascadefs.mount.fuse.handover import Table
from cascadefs.mount.fuse.operations import Operations
from cascadefs.mount.fuse.resent import Once
from cascadefs.mount.fuse.session import Session
from cascadefs.mount.fuse.virtual import Virtual
from cascadefs.mount.fuse.watcher import MountWatcher
from cascadefs.mount.legacy import Will
from cascadefs.store import Store

log = logging.getLogger(__name__)
# Two READs: one for each reader thread. More only push each other out of the caches (4 MiB: 2 to 4 % more processor time).
READ_AHEAD_KIB = 2 * LARGEST_SPLICED_READ >> 10
ANSWER_S = 20
LAST_CALL_S = 2  # after an unmount on a signal: so long who still uses the mount may take to finish
CATCH_UP_S, HURRY_S = 0.01, 0.001
UNMOUNTING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
QUIET_ROUNDS, DOZE_S = 10, 1.0  # without a request; then nothing is looked at for so long, or until one comes
M_ARENA_MAX, ARENAS = -8, 2  # malloc.h
PASSTHROUGH_SINCE = (6, 9)
DIRECT_WRITES_SINCE = (6, 6)  # from here on a direct write drops the pages that readers of the file have cached
GC_THRESHOLD = 50_000  # requests leave no cycles behind; the default of 700 looks for them at every third request
Report = Callable[[str], None]


@dataclass(frozen=True)
class Mounting:
    """What to mount where, with which FUSE options."""

    mountpoint: Path
    configuration: Configuration
    options: tuple[str, ...]
    log_to_file: bool


class Daemon:
    """A mount from its beginning, or from the death of the worker before, to its end or this worker's."""

    def __init__(
        self, wanted: Mounting, claim_fd: int, table: Table, kept: Device | None, adrift: Mapping[int, int] | None = None
    ) -> None:
        """Everything that can fail for reasons of the user's happens here. `kept`: the mount to take over; `adrift`: as
        legacy.py has them."""
        self.wanted, self.table, self.took_over = wanted, table, kept is not None
        settings = wanted.configuration.settings
        listing.offer()
        self.watcher = MountWatcher()
        self.store = Store(settings, claim_fd, self.took_over, table.first_ino, adrift, self.watcher)
        if not self.took_over:
            table.first_ino = self.store.namespace.first_ino
        try:
            if kept is None:
                table.made_mountpoint = not wanted.mountpoint.exists()
                wanted.mountpoint.mkdir(parents=True, exist_ok=True)
            portable = not settings.passthrough or kernel_release() < PASSTHROUGH_SINCE or not device.in_first_namespace()
            self.device = kept or device.mount(wanted.mountpoint, str(settings.store), wanted.options, portable)
            self.session = Session(self.device, settings.passthrough, table, self.store.ring.memory)
        except BaseException as e:
            if not self.store.residency.memory.objects:
                self.store.release_memory()
            self.store.close()
            if isinstance(e, OSError):
                raise UserError(f"the mountpoint {wanted.mountpoint} cannot be made: {e.strerror}; give another one") from e
            raise
        self.passthrough, self.why_not = self._probe_passthrough(settings.passthrough)
        self.virtual = Virtual(self.store, wanted.configuration, self.facts)
        self.keeper_pid = os.getppid()
        self._is_ending = False

    def make_will(self, will: Will) -> None:
        """From now on the keeper has what the next worker will need."""
        self.store.residency.memory.claim.bequeath(will)
        self.store.files.adrift.bequeath(will)

    def _probe_passthrough(self, wanted: bool) -> tuple[bool, str]:
        """Whether the kernel will move the bytes, and if not, why."""
        if not wanted:
            return False, "switched off by the passthrough setting"
        if not device.in_first_namespace():
            return False, "passthrough needs root of the machine, this is a user namespace"
        if not self.session.wanted:
            return False, "passthrough needs root (CAP_SYS_ADMIN)"
        if shortage := self.store.residency.memory.shortage():
            return False, f"{shortage}: the kernel would write past that"
        if kernel_release() < PASSTHROUGH_SINCE:
            return False, f"passthrough needs Linux 6.9, this is {os.uname().release}"
        return True, ""

    def facts(self) -> dict[str, Any]:
        """What only the mount knows."""
        memory = self.store.residency.memory
        return {
            "mountpoint": str(self.wanted.mountpoint),
            "mode": "passthrough" if self.passthrough else "portable",
            "mode_reason": self.why_not,
            "keeper_pid": self.keeper_pid if os.getppid() == self.keeper_pid else None,
            "restarts": self.table.generation - 1,
            "upgrades_refused": self.table.refusals,
            "huge_pages": memory.huge,
            "granted_opens": self.operations.answered.grants.count,
            "spare_files": self.operations.answered.spares.count,
            "requests": self.session.transport.counts(),
        }

    def summary(self) -> str:
        """What the user is told: where, tiers and sizes, mode, and why if it is not the best one."""
        settings, memory = self.store.settings, self.store.residency.memory
        size = humanfriendly.format_size(memory.capacity_bytes, binary=True)
        huge = "huge pages" if memory.huge else f"4 KiB pages: {memory.why_not or 'no tmpfs of our own'}"
        mode = "passthrough" if self.passthrough else f"portable ({self.why_not})"
        return (
            f"mounted at {self.wanted.mountpoint}, mode {mode}\n"
            "  gpu   not used: there is no tier for it yet\n"
            f"  shm   {size} at {memory.folder} ({huge})\n"
            f"  cold  {settings.store}{' (Lustre, striped)' if self.store.residency.cold.on_lustre else ''}"
            + "".join(f"\n{note}" for note in memory.claim.notes)
        )

    async def run(self, report: Report) -> None:
        """Serve until unmounted."""
        signal.signal(signal.SIGIO, signal.SIG_IGN)  # a lease that somebody breaks while we look is no reason to die
        gc.freeze()  # what is here now stays: the collector need not look at it again and again
        gc.set_threshold(GC_THRESHOLD)
        gc.enable()
        log.info("mounted at %s; on opening: %s", self.wanted.mountpoint, self.store.recovered)
        for note in self.store.database.notes:
            log.warning("index: %s", note)
        async with trio.open_nursery() as nursery:
            if self.table.is_leaving:
                nursery.start_soon(self._end_mount)
            nursery.start_soon(self.store.run)
            nursery.start_soon(self._unmount_on_signal, nursery)
            nursery.start_soon(self._report_when_it_answers, report)
            direct = not self.passthrough and kernel_release() >= DIRECT_WRITES_SINCE
            transport = self.session.transport
            self.handles = Handles(self.store, transport, self.table, self.passthrough, direct)
            once = Once(self.table, transport, self.store.namespace)
            self.operations = Operations(self.store, self.handles, self.virtual, once)
            self.watcher.begin(self.operations.answered)
            nursery.start_soon(self.operations.inform_transport)
            if self.took_over:
                self.operations.answered.inherit()
            nursery.start_soon(self._catch_up)
            nursery.start_soon(self.operations.listings.serve)
            await self.session.run(self.operations)
            nursery.cancel_scope.cancel()
        self._forget_the_kernel()
        await self._leave()

    async def _report_when_it_answers(self, report: Report) -> None:
        with trio.fail_after(ANSWER_S):
            while not self.session.transport.is_ready:
                await trio.sleep(0.001)
        self.table.init_request = self.session.transport.init_request
        if self.passthrough and (why_not := self._refusal()):
            self.passthrough, self.why_not = False, why_not
            self.handles.passthrough = False
        if not self.passthrough:
            await trio.to_thread.run_sync(device.raise_read_ahead, self.wanted.mountpoint, READ_AHEAD_KIB)
        report(self.summary())

    def _refusal(self) -> str:
        """Why the kernel will not move the bytes, though it should; one file of the memory tier is tried."""
        transport, memory = self.session.transport, self.store.residency.memory
        if not transport.negotiated_passthrough:
            return "the kernel did not agree to passthrough"
        fd = file_io.open_file(memory.folder.joinpath(*NAMES), os.O_RDONLY)
        try:
            transport.backing_close(transport.backing_open(fd))
        except OSError as e:
            return f"the kernel does not pass through to {memory.folder}: {e.strerror}"
        finally:
            os.close(fd)
        return ""

    async def _catch_up(self) -> None:
        """Releases and forgets that no other request brought along. A mount that is not used costs nothing."""
        hurry, quiet, seen = False, 0, self._came()
        while True:
            await trio.sleep(HURRY_S if hurry else CATCH_UP_S)
            hurry = False
            try:
                self.operations.answered.catch_up()
                hurry = self.operations.answered.offer()
                self.operations.answered.grants.give_wanted()
            except Exception:
                log.exception("a release or forget failed")
            quiet = 0 if hurry or self.store.files.to_seal or self._came() != seen else quiet + 1
            seen = self._came()
            if quiet >= QUIET_ROUNDS:
                quiet = 0 if await self._doze(seen) else QUIET_ROUNDS - 1

    def _came(self) -> tuple[int, int]:
        return self.session.transport.came, self.session.transport.events_put()

    async def _doze(self, seen: tuple[int, int]) -> bool:
        """Until a request comes, somebody rings (delegations.py), or a second is over; whether it was not the latter."""
        bell = self.session.transport.arm()
        if self._came() != seen:
            return True
        with trio.move_on_after(DOZE_S) as slept:
            await trio.lowlevel.wait_readable(bell)
        return not slept.cancelled_caught

    async def _unmount_on_signal(self, nursery: trio.Nursery) -> None:
        with trio.open_signal_receiver(*UNMOUNTING) as signals:
            async for number in signals:
                log.info("signal %d: unmounting", number)
                if not self._is_ending:
                    nursery.start_soon(self._end_mount)

    async def _end_mount(self) -> None:
        """Whoever still has a file open, a bind mount or a namespace of its own cannot hold up the end: what they wrote is
        flushed, then their files fail."""
        self._is_ending = self.table.is_leaving = True
        await trio.to_thread.run_sync(device.detach_all, self.device.number)
        await trio.sleep(LAST_CALL_S)  # ends here when the kernel lets the mount go
        log.warning("the mount is still in use; it is flushed and ended")
        try:
            await self.store.flush()
        except OSError as e:
            log.error("not everything could be flushed before the end: %s", e)
        self.session.end()

    def _forget_the_kernel(self) -> None:
        """No handle and no lookup outlives the mount; inodes that only they kept go."""
        self.operations.answered.catch_up()
        self.operations.answered.withdraw(connected=False)
        self.watcher.end()
        with contextlib.suppress(OSError):
            self.operations.answered.grants.end_all()
        for opened in list(self.handles.all_handles()):
            self.store.files.release(opened)
        lookups, self.store.files.lookups = self.store.files.lookups, Counter()
        self.store.files.forget_all_gone(set(lookups))

    async def _leave(self) -> None:
        try:
            await self.store.flush()
        except OSError as e:
            log.error("not everything could be flushed: %s; it stays in the memory tier for the next mount", e)
        if self.operations.drops_memory or self.store.keep_s == 0:
            self.store.release_memory()
        self.store.close()
        log.info("unmounted; the daemon leaves")


def share_arenas() -> None:
    """glibc gives each thread a heap of its own and keeps what it once held: with buffers of MiBs in a dozen threads that come
    and go, 100 to 150 MiB more in a minute. Before the first thread. Other C libraries have no such heaps."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)


def start_log(wanted: Mounting) -> None:
    """Log to the store's file, or to stderr."""
    settings = wanted.configuration.settings
    logging.basicConfig(
        filename=settings.store / "cascadefs.log" if wanted.log_to_file else None,
        level=settings.log.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )


def work(
    wanted: Mounting,
    claim_fd: int,
    table_fd: int,
    kept: Device | None,
    door: socket.socket,
    report: int | None,
    adrift: Mapping[int, int],
) -> int:
    """Be the worker: come up, hand a new device to the keeper through `door`, serve, go down; the exit code."""

    def tell(text: str) -> None:
        if report is None:
            log.info(text.splitlines()[0])
        else:
            os.write(report, os.fsencode(f"{text}\n"))
            os.close(report)

    share_arenas()
    gc.disable()  # opening a store makes a hundred thousand things that stay: looking through them takes a tenth of a second
    try:
        if plan := os.environ.get("CASCADEFS_CRASH_PLAN"):
            crash.arm(Path(plan))
        if kept is not None:
            start_log(wanted)
        worker = Daemon(wanted, claim_fd, Table(table_fd), kept, adrift)
        start_log(wanted)
        if kept is None:
            kind = "p" if worker.device.privileged else "u"
            socket.send_fds(door, [f"{kind}{worker.device.number}".encode()], [worker.device.fd])
        worker.make_will(Will(door))
        trio.run(worker.run, tell, strict_exception_groups=True)
    except UserError as e:
        tell(str(e))
        return 1
    except BaseException as e:
        log.exception("the worker failed")
        with contextlib.suppress(OSError):
            tell(f"the daemon failed: {e!r}")
        return 1
    return 0
