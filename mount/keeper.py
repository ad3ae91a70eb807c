"""The process behind a mount that is never busy: it holds what must outlive a worker, and starts the next one.

Owns: the lock of the store, the FUSE device, the table (handover.py), what a worker leaves (legacy.py), the child. Serves no
request and opens no store, so that there is little that could end it. Invariants:
(1) The device stays open while a worker lives or is going to: the kernel lets requests wait, nobody sees an error.
(2) A first worker that dies before the mount answers is not replaced: what it said is the error.
(3) A worker that dies at once, again and again, is given up (plan_restart): the device is closed, every access fails at once.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from cascadefs.config import Configuration, Settings
from cascadefs.errors import UserError
from cascadefs.media.descriptors import lift_file_size, raise_limit
from cascadefs.metadata.sqlite import claim
from cascadefs.mount import daemon, lingering
from cascadefs.mount.daemon import Mounting
from cascadefs.mount.fuse import device, handover
from cascadefs.mount.fuse.device import Device, kernel_release
from cascadefs.mount.fuse.handover import Table
from cascadefs.mount.legacy import Legacy

log = logging.getLogger("cascadefs.mount.keeper")  # also when it is run as a module, after an upgrade
RESEND_SINCE = (6, 9)  # FUSE_NOTIFY_RESEND: without it the requests of a dead worker would wait for ever
SHORT_LIFE_S = 1.0
# A worker that ends by a signal of its own making (a crash) or an exit code has a reason that the next one will meet again.
# SIGKILL comes from outside (a person, the kernel short of memory), and may come often.
CRASHES_MAX, KILLS_MAX = 5, 2000
UPGRADE_SIGNAL = signal.SIGUSR1
CHECK_S = 30
# Signals that would end a process and mean nothing here. SIGINT and SIGQUIT come from a terminal to all of its processes: there
# the worker unmounts.
HARMLESS = (signal.SIGINT, signal.SIGQUIT, signal.SIGUSR2, signal.SIGPIPE, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF,
            signal.SIGIO, signal.SIGXCPU, signal.SIGXFSZ, signal.SIGPWR, signal.SIGSTKFLT,
            *range(signal.SIGRTMIN, signal.SIGRTMAX + 1))  # fmt: skip
KEEPER_SCORE = -1000  # the kernel, short of memory, ends others first: the keeper has little to give back


@dataclass(frozen=True, slots=True)
class Death:
    """How a worker ended: its wait status and how long it had lived."""

    status: int
    lived_s: float

    @property
    def killed(self) -> bool:
        """Whether somebody else ended it."""
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL

    def __str__(self) -> str:
        if os.WIFSIGNALED(self.status):
            how = signal.Signals(os.WTERMSIG(self.status)).name
        else:
            how = f"exit code {os.waitstatus_to_exitcode(self.status)}"
        return f"{how} after {self.lived_s:.1f} s"


def plan_restart(deaths: list[Death]) -> float | None:
    """Seconds to wait before the next worker is started; None: give up. `deaths`: the latest last."""
    crashes = kills = 0
    for death in reversed(deaths):
        if death.lived_s >= SHORT_LIFE_S:
            break
        crashes += not death.killed
        kills += death.killed
    if crashes >= CRASHES_MAX or kills >= KILLS_MAX:
        return None
    return 0.1 * crashes


class Keeper:
    """Keeps one mount. `device` is None until the first worker has mounted; `worker` is a child that serves already."""

    def __init__(
        self,
        wanted: Mounting,
        claim_fd: int,
        kept: Table,
        device: Device | None,
        worker: int | None,
        legacy: Legacy | None = None,
    ) -> None:
        self.wanted, self.claim_fd, self.table, self.device, self.worker = wanted, claim_fd, kept, device, worker
        self.legacy = legacy or Legacy()
        self._door: socket.socket | None = None
        self._deaths: list[Death] = []
        self._started = 0.0
        self._workers_score = 0

    def run(self, report: int | None) -> int:
        """Until the mount is gone; the exit code. `report`: a pipe for the first words of the first worker."""
        self._arrange_signals()
        self._workers_score = oom_score()
        set_oom_score(KEEPER_SCORE)
        if self.device is None:
            self._start(report)
        else:
            self._replace()
        while True:
            death = self._wait()
            ended = os.waitstatus_to_exitcode(death.status) == 0
            if ended or self.device is None:
                self._remove_mountpoint()
                if ended:
                    lingering.start(self.wanted.configuration.settings.store)
                return 0 if ended else 1
            self._deaths = [*self._deaths[-KILLS_MAX:], death]
            pause = plan_restart(self._deaths) if kernel_release() >= RESEND_SINCE else None
            if pause is None:
                log.critical("the worker died (%s) and is not started again; the mount is dead: mount it anew", death)
                return 1
            log.error("the worker died: %s; starting the next", death)
            time.sleep(pause)
            self._start(None)

    def _arrange_signals(self) -> None:
        """None but SIGKILL ends the keeper before its worker: a worker without a keeper is not replaced when it dies."""
        for number in HARMLESS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._stop)
        if self.wanted.log_to_file or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup keeps a foreground mount
            signal.signal(signal.SIGHUP, self._stop)
        signal.signal(UPGRADE_SIGNAL, self._upgrade)

    def _remove_mountpoint(self) -> None:
        """One that we made, and only if it is empty: programs that go on writing fail, and do not fill the disk below."""
        if self.table.made_mountpoint:
            with contextlib.suppress(OSError):
                self.wanted.mountpoint.rmdir()

    def _start(self, report: int | None) -> None:
        """The next worker. The first one mounts and hands the device over."""
        self.table.generation += 1
        if self._door is not None:
            self._door.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._started = time.monotonic()
        self.worker = os.fork()
        if self.worker == 0:
            ours.close()
            self._be_worker(report, theirs)
        theirs.close()
        if report is not None:
            os.close(report)
        self._door = ours
        if self.device is None:
            word, received, _, _ = socket.recv_fds(ours, 64, 1)
            self.device = Device(received[0], word[:1] == b"p", word[1:].decode()) if received else None
            if received:
                daemon.start_log(self.wanted)

    def _be_worker(self, report: int | None, door: socket.socket) -> NoReturn:
        """In the child."""
        for number in (signal.SIGINT, signal.SIGTERM, UPGRADE_SIGNAL):
            signal.signal(number, signal.SIG_DFL)
        set_oom_score(self._workers_score)
        with contextlib.suppress(BaseException):
            os._exit(daemon.work(self.wanted, self.claim_fd, self.table.fd, self.device, door, report, self.legacy.adrift))
        os._exit(1)

    def _wait(self) -> Death:
        assert self.worker is not None
        if self._door is not None:
            with contextlib.suppress(OSError):  # a kernel without descriptors of processes
                process_fd = os.pidfd_open(self.worker)
                try:
                    self.legacy.hear_until(self._door, process_fd)
                finally:
                    os.close(process_fd)
        _, status = os.waitpid(self.worker, 0)
        return Death(status, time.monotonic() - self._started)

    def _replace(self) -> None:
        """After an upgrade: the worker of the old code goes, as if it had been killed; one of the new code comes."""
        assert self.worker is not None
        os.kill(self.worker, signal.SIGKILL)
        os.waitpid(self.worker, 0)
        log.info("upgraded: starting a worker of the new code")
        self._start(None)

    def _stop(self, number: int, frame: object) -> None:
        """SIGTERM or SIGHUP to the keeper means the mount: the worker unmounts, flushes and leaves, and so does the next
        one, should this one die."""
        self.table.is_leaving = True
        if self.worker:  # 0: a child that has not yet arranged its own signals
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.worker, signal.SIGTERM)

    def _upgrade(self, number: int, frame: object) -> None:
        """Become the keeper of the code that is installed now, if it can be loaded; the worker serves meanwhile."""
        if self.device is None or self.worker is None:
            return
        command = [sys.executable, "-m", "cascadefs.mount.keeper"]
        checked = subprocess.run([*command, "--check"], capture_output=True, text=True, timeout=CHECK_S, check=False)
        if checked.stdout.split() != [str(handover.VERSION)]:
            why = (checked.stderr.strip() or f"it keeps its table as version {checked.stdout.strip()}").splitlines()[-1]
            log.error("not upgraded: the installed code cannot take over (%s)", why)
            self.table.refusals += 1
            return
        for fd in (self.claim_fd, self.table.fd, self.device.fd, self.legacy.lock_fd, *self.legacy.adrift.values()):
            if fd >= 0:
                os.set_inheritable(fd, True)
        os.execv(sys.executable, [*command, self._as_json()])

    def _as_json(self) -> str:
        """Everything that exec() must hand on."""
        assert self.device is not None
        configuration = self.wanted.configuration
        settings = {key: str(value) for key, value in asdict(configuration.settings).items()}
        return json.dumps(
            {
                "mountpoint": str(self.wanted.mountpoint),
                "options": self.wanted.options,
                "settings": settings,
                "origins": dict(configuration.origins),
                "fds": [self.claim_fd, self.table.fd, self.device.fd],
                "lock_fd": self.legacy.lock_fd,
                "adrift": list(self.legacy.adrift.items()),
                "privileged": self.device.privileged,
                "number": self.device.number,
                "worker": self.worker,
                "log_to_file": self.wanted.log_to_file,
            }
        )


def oom_score() -> int:
    """How willingly the kernel, short of memory, ends what is started here; a keeper that exec() replaced does not count."""
    found = int(Path("/proc/self/oom_score_adj").read_text())
    return 0 if found == KEEPER_SCORE else found


def set_oom_score(score: int) -> None:
    """Of this process; only root may lower it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(score))


def keep(wanted: Mounting, report: int | None) -> int:
    """Claim the store and keep a new mount of it; the exit code. UserError before anything is touched."""
    raise_limit()
    lift_file_size()
    device.check_mountpoint(wanted.mountpoint)
    return Keeper(wanted, claim(wanted.configuration.settings.store), Table.make(), None, None).run(report)


def _resume(document: dict[str, Any]) -> int:
    """Go on as the keeper that exec() has replaced."""
    known = {f.name: f.metadata["parse"] for f in fields(Settings)}
    values = {key: known[key](text) for key, text in document["settings"].items() if key in known}
    configuration = Configuration(Settings(**values), document["origins"])
    wanted = Mounting(Path(document["mountpoint"]), configuration, tuple(document["options"]), bool(document["log_to_file"]))
    claim_fd, table_fd, device_fd = document["fds"]
    legacy = Legacy(document.get("lock_fd", -1), {int(ino): fd for ino, fd in document.get("adrift", ())})
    for fd in (*document["fds"], legacy.lock_fd, *legacy.adrift.values()):
        if fd >= 0:
            os.set_inheritable(fd, False)
    daemon.start_log(wanted)
    number = document.get("number") or device.number_at(wanted.mountpoint)  # keepers before did not know it
    kept = Device(device_fd, bool(document["privileged"]), number)
    return Keeper(wanted, claim_fd, Table(table_fd), kept, document["worker"], legacy).run(None)


def in_background(wanted: Mounting) -> str:
    """Keep a mount in a process of its own; what the worker says when the mount answers. UserError when it does not."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _detach(lambda: keep(wanted, writer), writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = os.fsdecode(pipe.read()).strip()
    os.waitpid(child, 0)
    if not said.startswith("mounted"):
        raise UserError(said or f"the daemon died; its log is {wanted.configuration.settings.store}/cascadefs.log")
    try:
        os.stat(wanted.mountpoint)  # it answers
    except OSError as e:
        raise UserError(f"{wanted.mountpoint} was mounted, but does not answer ({e.strerror}); see cascadefs.log") from e
    return said


def _detach(work: Callable[[], int], writer: int) -> NoReturn:
    """In the child: a second fork leaves a process without terminal and without parent."""
    status = 1
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.chdir("/")
        status = work()
    except UserError as e:
        os.write(writer, os.fsencode(str(e)))
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.write(writer, f"the keeper failed: {e!r}".encode())
        log.exception("the keeper failed")
    finally:
        os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "--check":
        print(handover.VERSION)
    else:
        sys.exit(_resume(json.loads(sys.argv[1])))
