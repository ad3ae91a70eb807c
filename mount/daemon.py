"""The process behind a mount: opens the store, mounts, serves until unmounted, flushes, leaves.

Owns: the order of coming up and going down, the log, the report to whoever started it. Invariants:
(1) The parent is told "mounted" only after the mount answered a request.
(2) Whatever fails on the way up is one line to the parent, and everything done so far is undone.
(3) After the mount is gone everything is flushed before the process ends; what cannot be flushed stays in memory.
"""

import gc
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import humanfriendly
import trio

from cascadefs.config import Configuration
from cascadefs.errors import UserError
from cascadefs.mount import device
from cascadefs.mount.handles import Handles
from cascadefs.mount.operations import Operations
from cascadefs.mount.session import Session
from cascadefs.mount.virtual import Virtual
from cascadefs.store import Store

log = logging.getLogger(__name__)
READ_AHEAD_KIB = 4096
ANSWER_S = 20
CATCH_UP_S = 0.01
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


class Daemon:
    """One mount, from nothing to nothing."""

    def __init__(self, wanted: Mounting) -> None:
        """Everything that can fail for reasons of the user's happens here."""
        self.wanted = wanted
        settings = wanted.configuration.settings
        device.check_mountpoint(wanted.mountpoint)
        self.store = Store(settings)
        try:
            wanted.mountpoint.mkdir(parents=True, exist_ok=True)
            self.session = Session(device.mount(wanted.mountpoint, wanted.options), settings.passthrough)
        except BaseException as e:
            if not self.store.residency.memory.objects:
                self.store.release_memory()
            self.store.close()
            if isinstance(e, OSError):
                raise UserError(f"the mountpoint {wanted.mountpoint} cannot be made: {e.strerror}; give another one") from e
            raise
        self.passthrough, self.why_not = self._probe_passthrough(settings.passthrough)
        self.virtual = Virtual(self.store, wanted.configuration, self.facts)

    def _probe_passthrough(self, wanted: bool) -> tuple[bool, str]:
        """Whether the kernel will move the bytes, and if not, why."""
        if not wanted:
            return False, "switched off by the passthrough setting"
        if not self.session.wanted:
            return False, "passthrough needs root (CAP_SYS_ADMIN)"
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
            "huge_pages": memory.huge,
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
            f"  gpu   none (no cupy or no CUDA device)\n"
            f"  shm   {size} at {memory.folder} ({huge})\n"
            f"  cold  {settings.store}{' (Lustre, striped)' if self.store.residency.cold.on_lustre else ''}"
        )

    async def run(self, report: Report) -> None:
        """Serve until unmounted."""
        signal.signal(signal.SIGIO, signal.SIG_IGN)  # a lease that somebody breaks while we look is no reason to die
        gc.freeze()  # what is here now stays: the collector need not look at it again and again
        gc.set_threshold(GC_THRESHOLD)
        log.info("mounted at %s; on opening: %s", self.wanted.mountpoint, self.store.recovered)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.store.run)
            nursery.start_soon(self._unmount_on_signal)
            nursery.start_soon(self._report_when_it_answers, report)
            direct = not self.passthrough and kernel_release() >= DIRECT_WRITES_SINCE
            self.handles = Handles(self.store, self.session.transport, self.passthrough, direct)
            self.operations = Operations(self.store, self.handles, self.virtual)
            self.operations.inform_transport()
            self.store.files.maps_unseen = self.passthrough
            self.store.files.moved = self.session.forget_names
            nursery.start_soon(self._catch_up)
            await self.session.run(self.operations)
            nursery.cancel_scope.cancel()
        self._forget_the_kernel()
        await self._leave()

    async def _report_when_it_answers(self, report: Report) -> None:
        with trio.fail_after(ANSWER_S):
            await trio.to_thread.run_sync(os.stat, self.wanted.mountpoint, abandon_on_cancel=True)
        if self.passthrough and not self.session.transport.negotiated_passthrough:
            self.passthrough, self.why_not = False, "the kernel did not agree to passthrough"
            self.handles.passthrough = False
        if not self.passthrough:
            await trio.to_thread.run_sync(device.raise_read_ahead, self.wanted.mountpoint, READ_AHEAD_KIB)
        report(self.summary())

    async def _catch_up(self) -> None:
        """Releases and forgets that no other request brought along."""
        while True:
            await trio.sleep(CATCH_UP_S)
            try:
                self.operations.catch_up()
            except Exception:
                log.exception("a release or forget failed")

    async def _unmount_on_signal(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                log.info("signal %d: unmounting", number)
                await trio.to_thread.run_sync(lambda: device.unmount(self.wanted.mountpoint, lazy=True))

    def _forget_the_kernel(self) -> None:
        """No handle and no lookup outlives the mount; inodes that only they kept go."""
        self.operations.catch_up()
        self.store.files.sources.closing = lambda source: None
        for opened in list(self.handles.all_handles()):
            self.store.files.release(opened)
        lookups, self.store.files.lookups = self.store.files.lookups, {}
        for ino in lookups:
            self.store.files.forget_if_gone(ino)

    async def _leave(self) -> None:
        try:
            await self.store.flush()
        except OSError as e:
            log.error("not everything could be flushed: %s; it stays in the memory tier for the next mount", e)
        if self.operations.drops_memory:
            self.store.release_memory()
        self.store.close()
        log.info("unmounted; the daemon leaves")


def kernel_release() -> tuple[int, ...]:
    """Such as (6, 9)."""
    return tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])


def start_log(path: Path | None, level: str) -> None:
    """Log to a file, or to stderr."""
    logging.basicConfig(
        filename=path, level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )


def serve(wanted: Mounting, report: Report) -> None:
    """Come up, serve, go down. UserError when it does not come up."""
    daemon = Daemon(wanted)
    try:
        trio.run(daemon.run, report, strict_exception_groups=True)
    except BaseException:
        log.exception("the daemon failed")
        raise


def in_background(wanted: Mounting) -> str:
    """Run serve() in a process of its own; returns its summary when the mount answers. UserError when it does not."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _detach_and_serve(wanted, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    os.waitpid(child, 0)
    if not said.startswith("mounted"):
        raise UserError(said or f"the daemon died; its log is {wanted.configuration.settings.store}/cascadefs.log")
    return said


def _detach_and_serve(wanted: Mounting, writer: int) -> None:
    """In the child: a second fork leaves a process without terminal and without parent. Never returns."""
    status = 1
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)

        def report(text: str) -> None:
            os.write(writer, text.encode())
            os.close(writer)

        settings = wanted.configuration.settings
        daemon = Daemon(wanted)
        start_log(settings.store / "cascadefs.log", settings.log)
        os.chdir("/")
        trio.run(daemon.run, report)
        status = 0
    except UserError as e:
        os.write(writer, str(e).encode())
    except BaseException as e:
        log.exception("the daemon failed")
        try:
            os.write(writer, f"the daemon failed: {e!r}".encode())
        except OSError:
            print(e, file=sys.stderr)
    finally:
        os._exit(status)
