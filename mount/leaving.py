"""`umount` and `flush`. Owns: their arguments, the progress that is shown, how long a daemon is waited for.

Invariant: a mount that lives is not taken away before everything in it is durable.
"""

import contextlib
import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import click
import humanfriendly

from cascadefs.config import load
from cascadefs.errors import UserError
from cascadefs.mount import asking, control, holders, mountinfo
from cascadefs.mount.fuse import device
from cascadefs.mount.mountinfo import Mounted

HOLD_S, HELD_S = 2, 6  # then who holds an unmounted mount is named; then they are not waited for any more
EXIT_S = 600  # an unmounted daemon that still flushes after ten minutes is left alone, and said so


def flush_all(mountpoint: Path, quiet: bool = False) -> None:
    """fsync of .cascade/flush makes everything durable; its progress is what `pending_bytes` loses."""
    failure: list[OSError] = []
    fd = os.open(mountpoint / ".cascade/flush", os.O_RDONLY)

    def work() -> None:
        try:
            os.fsync(fd)
        except OSError as e:
            failure.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(1.0)
    if thread.is_alive() and not quiet:
        _show_progress(mountpoint, thread)
    thread.join()
    os.close(fd)
    if failure:
        raise UserError(f"not everything could be flushed: {failure[0].strerror}; see cascadefs.log in the store")


def pause_after(asking_s: float) -> float:
    """Until the progress of a flush is asked for again: with very many files the answer costs more than what it tells of."""
    return max(0.2, 10 * asking_s)


def _pending_bytes(mountpoint: Path) -> int:
    """Asked by ourselves: the thread that flushes waits for the same daemon anyway."""
    return int(json.loads((mountpoint / ".cascade/stats").read_text())["pending_bytes"])


def _show_progress(mountpoint: Path, thread: threading.Thread) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    columns = (
        TextColumn("flushing"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        total = _pending_bytes(mountpoint)
        task = progress.add_task("flush", total=total)
        while thread.is_alive():
            asked = time.monotonic()
            pending = _pending_bytes(mountpoint)
            asking_s = time.monotonic() - asked
            total = max(total, pending)
            progress.update(task, total=total, completed=total - pending)
            thread.join(pause_after(asking_s))


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--drop-memory", is_flag=True, help="Give the memory tier back; the next mount starts cold.")
@click.option("--force", is_flag=True, help="End it for all who use it, here and in other namespaces; their files fail.")
@click.option("--keep-memory", metavar="TIME", help="Keep it so long (30m, 2h, boot) instead of the keep_memory setting.")
def umount(mountpoint: Path, drop_memory: bool, force: bool, keep_memory: str | None) -> None:
    """Flush, unmount, and wait until the daemon has left."""
    keep_s = load({"keep_memory": keep_memory}, {}, None).settings.keep_memory if keep_memory is not None else None
    keep_s = 0.0 if drop_memory else keep_s
    if force and mountinfo.resolve(mountpoint) not in {m.path for m in mountinfo.ours()}:
        _force_elsewhere(mountinfo.resolve(mountpoint))
        return
    found = asking.mount_of(mountpoint)
    whole = asking.whole_of(found)
    try:
        asking.check_alive(found.path)
        before = asking.stats(whole.path) if whole else None
    except asking.DeadMount:
        device.unmount(found.path, lazy=True)
        click.echo(f"{found.path} was dead (its daemon has ended) and is cleared; what was closed is there at the next mount")
        return
    except (asking.SilentMount, asking.FailingMount):
        if not force:
            raise
        _kill(found)
        return
    if whole is None or before is None:  # a folder of it, whose whole mount is elsewhere: others' to flush
        _unmount(found.path)
    else:
        _leave(found, whole.path, before, keep_s, force)


def _leave(found: Mounted, whole: Path, before: dict[str, Any], keep_s: float | None, force: bool) -> None:
    """A mount that lives. What shows it at another path here goes on; without such a path the daemon leaves."""
    try:
        flush_all(whole)
    except UserError as e:
        if not force:
            raise UserError(f"{e}; to leave with that in memory: cascadefs umount --force {found.path}") from e
        click.echo(f"cascadefs: {e}; it stays in memory for the next mount", err=True)
    if force:
        _tell_keep(keep_s, whole)
        _end(before)
    elif others := [str(m.path) for m in mountinfo.ours() if m.device == found.device and m.path != found.path]:
        _unmount(found.path)
        click.echo(f"{found.path} is unmounted, everything is durable; the store stays mounted at {', '.join(others)}")
        return
    else:
        _tell_keep(keep_s, whole)
        _unmount(found.path)
        _wait_for_exit(found, before["worker_pid"], before["keeper_pid"])
    _tell_what_stays(before["tiers"]["shm"]["used_bytes"], _or_boot(before["keep_memory_s"]) if keep_s is None else keep_s)


def _or_boot(keep_s: float | None) -> float:
    return math.inf if keep_s is None else keep_s


def _tell_what_stays(kept_bytes: int, keep_s: float) -> None:
    if kept_bytes and keep_s:
        size = humanfriendly.format_size(kept_bytes, binary=True)
        long = "until the next boot" if math.isinf(keep_s) else f"for {humanfriendly.format_timespan(keep_s)}"
        click.echo(f"unmounted; about {size} stay in memory for the next mount, {long} (--drop-memory gives them back)")


def _tell_keep(keep_s: float | None, path: Path) -> None:
    """How long the daemon keeps memory; None: as its setting says."""
    if keep_s == 0:
        control.tell(path, control.DROP_MEMORY, b"1")
    elif keep_s is not None:
        control.tell(path, control.KEEP_MEMORY, str(keep_s).encode())


def _unmount(path: Path) -> None:
    """UserError names who uses it."""
    try:
        device.unmount(path)
    except UserError as e:
        users = holders.users(path)
        raise UserError(f"{e}; used by {holders.named(users)}" if users else str(e)) from e


def _end(before: dict[str, Any]) -> None:
    """The keeper flushes and ends the mount, whoever uses it."""
    pids = [pid for pid in (before["keeper_pid"], before["worker_pid"]) if pid]
    os.kill(pids[0], signal.SIGTERM)
    _wait_for_exit(None, *pids)


def _force_elsewhere(path: Path) -> None:
    """End a mount that only other namespaces show, named by its mountpoint or its store."""
    for holder, _ in holders.everywhere():
        with contextlib.suppress(UserError):
            before = asking.stats(Path(f"/proc/{holder.pid}/root{holder.path}"))
            if str(path) in (before["mountpoint"], before["store"]):
                _end(before)
                click.echo("flushed and ended; programs that used it in other namespaces get errors")
                return
    raise UserError(f"no cascadefs is mounted at {path}, and none of other namespaces comes from there")


def _kill(found: Mounted) -> None:
    """A daemon that does not answer cannot be asked to flush: what is in memory stays there for the next mount."""
    for pid in holders.daemons(found.device):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        Path(f"/sys/fs/fuse/connections/{found.device.partition(':')[2]}/abort").write_text("1")
    device.detach_all(found.device)
    click.echo(f"{found.path} did not answer; its daemon was killed. What was closed is there at the next mount")


def is_running(pid: int) -> bool:
    """Whether a process still does something: a zombie, which a lazy init has not collected yet, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _wait_for_exit(found: Mounted | None, *pids: int | None) -> None:
    """UserError when others hold the unmounted `found`, or it takes too long."""
    start = time.monotonic()
    look_at, told = start + HOLD_S, False
    while still := [pid for pid in pids if pid and is_running(pid)]:
        now = time.monotonic()
        if found is not None and now > look_at:
            look_at = now + HOLD_S
            others = [h for h in holders.elsewhere(found.device) if h.pid not in pids]
            if others and not told:
                click.echo(f"cascadefs: waiting for other mount namespaces: {holders.named(others)}", err=True)
                told = True
            elif others and now > start + HELD_S:
                raise UserError(
                    f"{found.path} is unmounted here and everything is durable, but the store stays in use: other mount "
                    f"namespaces hold it ({holders.named(others)}); end them, or: cascadefs umount --force {found.path}"
                )
        if now > start + EXIT_S:
            raise UserError(f"unmounted, but the daemon (process {still[0]}) has not left yet; see cascadefs.log in the store")
        time.sleep(0.01)


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.argument("path", type=click.Path(path_type=Path), required=False)
def flush(mountpoint: Path, path: Path | None) -> None:
    """Make everything below MOUNTPOINT durable in the cold tier, or one file (PATH)."""
    root = asking.mountpoint(mountpoint)
    asking.check_alive(root)
    if path is None:
        flush_all(root)
        return
    path = path if path.is_absolute() or path.exists() else root / path
    try:
        if path.stat().st_dev != root.stat().st_dev:
            raise UserError(f"{path} does not lie on the mount at {root}; give a path on it")
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as e:
        raise UserError(f"{path} cannot be flushed: {e.strerror}") from e
