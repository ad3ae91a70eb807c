"""`umount` and `flush`. Owns: their arguments, the progress that is shown, how long a daemon is waited for.

Invariant: a mount that lives is not taken away before everything in it is durable.
"""

import json
import os
import threading
import time
from pathlib import Path

import click
import humanfriendly

from cascadefs.errors import UserError
from cascadefs.mount import asking, device

EXIT_S = 600  # an unmounted daemon that still flushes after ten minutes is left alone, and said so
DROP_MEMORY = "user.cascade.drop-memory"


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
def umount(mountpoint: Path, drop_memory: bool) -> None:
    """Flush, unmount, and wait until the daemon has left."""
    path = asking.mountpoint(mountpoint)
    try:
        asking.check_alive(path)
    except asking.DeadMount:
        device.unmount(path, lazy=True)
        click.echo(f"{path} was dead (its daemon was ended) and is cleared; what was closed is there at the next mount")
        return
    before = asking.stats(path)
    flush_all(path)
    if drop_memory:
        os.setxattr(path / ".cascade", DROP_MEMORY, b"1")
    device.unmount(path)
    _wait_for_exit(before["worker_pid"], before["keeper_pid"])
    kept = before["tiers"]["shm"]["used_bytes"]
    if kept and not drop_memory:
        size = humanfriendly.format_size(kept, binary=True)
        click.echo(f"unmounted; about {size} stay in memory for the next mount (--drop-memory gives them back)")


def is_running(pid: int) -> bool:
    """Whether a process still does something: a zombie, which a lazy init has not collected yet, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _wait_for_exit(*pids: int | None) -> None:
    end = time.monotonic() + EXIT_S
    while still := [pid for pid in pids if pid and is_running(pid)]:
        if time.monotonic() > end:
            raise UserError(f"unmounted, but the daemon (process {still[0]}) is still flushing; it ends by itself")
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
    try:
        fd = os.open(path if path.is_absolute() or path.exists() else root / path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as e:
        raise UserError(f"{path} cannot be flushed: {e.strerror}") from e
