"""The command line. Owns: arguments, what is printed, exit codes. Errors of the user's are one line and exit code 1.

Commands talk to a running mount through the mount itself (`.cascade/`), so they need no socket and no pid file.
"""

import errno
import importlib
import json
import os
import signal
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import humanfriendly

from cascadefs.config import Configuration, Settings, load
from cascadefs.errors import ConfigError, UserError
from cascadefs.mount import device

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
UPGRADE_S = 15
EXIT_S = 600  # an unmounted daemon that still flushes after ten minutes is left alone, and said so
DROP_MEMORY = "user.cascade.drop-memory"
# Commands of other modules, loaded when they are called: numpy and the rest would make `cascadefs status` three times as slow.
# For the same reason rich is imported where something is drawn.
ELSEWHERE = {
    "bench": ("lines_cli", "bench"),
    "fsck": ("check_cli", "fsck"),
    "verify": ("check_cli", "verify"),
    "rebuild-index": ("check_cli", "rebuild_index"),
}


class Group(click.Group):
    """Turns UserError into one line and exit code 1; finds the commands of ELSEWHERE."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """For --help."""
        return sorted([*self.commands, *ELSEWHERE])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Ours, or one that is loaded now."""
        if name not in ELSEWHERE:
            return super().get_command(ctx, name)
        module, function = ELSEWHERE[name]
        found: click.Command = getattr(importlib.import_module(f"cascadefs.mount.{module}"), function)
        return found

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Parse and run."""
        hold_standard_streams()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except UserError as e:
            click.echo(f"cascadefs: {e}", err=True)
        except OSError as e:
            if e.errno == errno.EPIPE:  # whoever read our output has gone: click ends quietly
                raise
            click.echo(f"cascadefs: {e.strerror or e}{f': {e.filename}' if e.filename else ''}", err=True)
        sys.exit(1)


def hold_standard_streams() -> None:
    """Descriptors 0 to 2 that were closed (cron, some launchers) lead to /dev/null: else files and sockets of ours would get
    these numbers, and what is printed would go there."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(package_name="cascadefs")
def main() -> None:
    """A filesystem over a tiered, content-addressed cache.

    \b
    cascadefs mount /cascade        memory speed when hot, packed extents when cold
    cp -r kv-cache /cascade/        any program that uses plain files works
    cascadefs status                what lies where, how much was stored once only
    cascadefs umount /cascade       flushes first; everything is back at the next mount
    """


def _settings(config: Path | None, **flags: object) -> Configuration:
    given = {name: value for name, value in flags.items() if value is not None and value is not False}
    found = load(given, os.environ, config or (Path(c) if (c := os.environ.get("CASCADEFS_CONFIG")) else None))
    for note in found.notes:
        click.echo(f"cascadefs: warning: {note}", err=True)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if found.settings.shm_size > total:
        sizes = [humanfriendly.format_size(n, binary=True) for n in (found.settings.shm_size, total)]
        raise ConfigError(f"shm_size {sizes[0]} is more than this machine's memory ({sizes[1]}); give a smaller --shm-size")
    return found


@main.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--store", metavar="DIR", help="Folder of the cold tier and the index (default: see `cascadefs config show`).")
@click.option("--shm-size", metavar="SIZE", help="Memory tier, such as 8GiB (default: a quarter of RAM).")
@click.option("--config", type=click.Path(path_type=Path), metavar="TOML", help="File with settings.")
@click.option("--foreground", is_flag=True, help="Stay in the terminal, log to it; Ctrl-C unmounts.")
@click.option("--sync", type=click.Choice(["fsync", "close"]), help="close: data are durable when close() returns, too.")
@click.option("--seal", type=click.Choice(["auto", "flush"]), help="flush: hash and store only when flush or fsync asks.")
@click.option("--no-passthrough", is_flag=True, help="Do not let the kernel move the bytes (the portable path).")
@click.option("-o", "options", multiple=True, metavar="FUSE_OPTIONS", help="Mount options, separated by commas.")
def mount(
    mountpoint: Path,
    store: str | None,
    shm_size: str | None,
    config: Path | None,
    foreground: bool,
    sync: str | None,
    seal: str | None,
    no_passthrough: bool,
    options: tuple[str, ...],
) -> None:
    """Mount a store at MOUNTPOINT (made when missing). Returns when the mount answers."""
    words = tuple(word for option in options for word in option.split(",") if word)
    passthrough = "false" if no_passthrough else None
    found = _settings(config, store=store, shm_size=shm_size, sync=sync, seal=seal, passthrough=passthrough)
    _prepare_store(found)
    daemon, keeper = _daemon()
    wanted = daemon.Mounting(mountpoint.absolute(), found, words, log_to_file=not foreground)
    if foreground:
        daemon.start_log(wanted)
        sys.exit(keeper.keep(wanted, os.dup(1)))
    click.echo(keeper.in_background(wanted))


def _prepare_store(found: Configuration) -> None:
    """A default store may need its parents made; one that was named must have its parent: a typo makes no tree."""
    from cascadefs.database import check_store_folder

    folder = found.settings.store
    if found.origins["store"] == "default":
        folder.parent.mkdir(parents=True, exist_ok=True)
    check_store_folder(folder)


def _daemon() -> tuple[Any, Any]:
    """The modules that need pyfuse3, which needs the system's libfuse3."""
    try:
        from cascadefs.mount import daemon, keeper
    except ImportError as e:
        raise UserError(f"libfuse3 or pyfuse3 cannot be loaded ({e}); run: sudo apt-get install -y fuse3 libfuse3-3") from e
    return daemon, keeper


def _mountpoint(path: Path | None) -> Path:
    """A live mount: the one that was named, or the only one."""
    known = list(device.mounts())
    if path is None:
        if len(known) != 1:
            have = ", ".join(map(str, known)) or "none"
            raise UserError(f"say which mount is meant; mounted: {have}")
        return known[0]
    absolute = Path(os.path.abspath(path))
    if absolute not in known:
        raise UserError(f"no cascadefs is mounted at {absolute}; mounted: {', '.join(map(str, known)) or 'none'}")
    return absolute


def _stats(mountpoint: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((mountpoint / ".cascade/stats").read_text())
    except OSError as e:
        raise UserError(f"the mount at {mountpoint} does not answer ({e.strerror}); see its log cascadefs.log") from e
    return found


def _flush(mountpoint: Path, quiet: bool = False) -> None:
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
        total = _stats(mountpoint)["pending_bytes"]
        task = progress.add_task("flush", total=total)
        while thread.is_alive():
            asked = time.monotonic()
            pending = _stats(mountpoint)["pending_bytes"]
            asking_s = time.monotonic() - asked
            total = max(total, pending)
            progress.update(task, total=total, completed=total - pending)
            thread.join(pause_after(asking_s))


@main.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--drop-memory", is_flag=True, help="Give the memory tier back; the next mount starts cold.")
def umount(mountpoint: Path, drop_memory: bool) -> None:
    """Flush, unmount, and wait until the daemon has left."""
    path = _mountpoint(mountpoint)
    before = _stats(path)
    _flush(path)
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


@main.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
def upgrade(mountpoint: Path) -> None:
    """Restart the worker of a mount in the code that is installed now. Programs that use it notice a pause, no error."""
    path = _mountpoint(mountpoint)
    before = _stats(path)
    if before["keeper_pid"] is None:
        raise UserError(f"the mount at {path} has no keeper (it was killed): unmount and mount it again")
    os.kill(before["keeper_pid"], signal.SIGUSR1)
    end = time.monotonic() + UPGRADE_S
    while (now := _stats(path))["worker_pid"] == before["worker_pid"]:
        if now["upgrades_refused"] > before["upgrades_refused"] or time.monotonic() > end:
            raise UserError("the old worker goes on: the installed code cannot take over; see cascadefs.log in the store")
        time.sleep(0.05)
    click.echo(f"upgraded: process {before['worker_pid']} -> {now['worker_pid']}, {now['version']}")


@main.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.argument("path", type=click.Path(path_type=Path), required=False)
def flush(mountpoint: Path, path: Path | None) -> None:
    """Make everything below MOUNTPOINT durable in the cold tier, or one file (PATH)."""
    root = _mountpoint(mountpoint)
    if path is None:
        _flush(root)
        return
    try:
        fd = os.open(path if path.is_absolute() or path.exists() else root / path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as e:
        raise UserError(f"{path} cannot be flushed: {e.strerror}") from e


@main.command()
@click.argument("mountpoint", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="The whole document.")
def status(mountpoint: Path | None, as_json: bool) -> None:
    """What lies in which tier, and how much was stored once only."""
    found = _stats(_mountpoint(mountpoint))
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    reason = f" ({found['mode_reason']})" if found["mode_reason"] else ""
    process = f"process {found['worker_pid']} ({found['restarts']} restarts)"
    click.echo(f"{found['mountpoint']}: {found['mode']}{reason}, {process}, store {found['store']}")
    logical, unique = (_size(found[key]) for key in ("logical_bytes", "unique_bytes"))
    click.echo(f"{found['files']} files, {logical}, stored as {unique} (dedup {found['dedup_ratio']:g})")
    click.echo(f"not yet durable: {_size(found['pending_bytes'])}")
    _draw_tiers(found["tiers"])
    for line in found["trouble"]:
        click.echo(f"trouble: {line}")
    if found["last_error"]:
        click.echo(f"last error: {found['last_error']}")


def _draw_tiers(tiers: dict[str, dict[str, int]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("tier", "used", "capacity", "dirty", "objects", "hits", "misses", "extents"):
        table.add_column(heading, justify="left" if heading == "tier" else "right")
    for name, tier in tiers.items():
        sizes = [_size(tier[key]) for key in ("used_bytes", "capacity_bytes", "dirty_bytes")]
        counts = [str(tier.get(key, "")) for key in ("objects", "hits", "misses", "extents")]
        table.add_row(name, *sizes, *counts)
    Console().print(table)


def _size(count: int) -> str:
    return str(humanfriendly.format_size(count, binary=True))


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def info(path: Path, as_json: bool) -> None:
    """Hash, address, tier, blocks, extents and references of one file on a mount."""
    try:
        told = json.loads(os.getxattr(path, "user.cascade.info"))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; give a regular file on a cascadefs mount") from e
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return
    for key, value in told.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        click.echo(f"{key.replace('_', ' '):12} {shown}")


@main.group()
def config() -> None:
    """Settings."""


@config.command()
@click.option("--config", "file", type=click.Path(path_type=Path), metavar="TOML", help="File with settings.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def show(file: Path | None, as_json: bool) -> None:
    """Each setting with its value, its origin and what it means."""
    found = _settings(file)
    rows = [(f.name, str(getattr(found.settings, f.name)), found.origins[f.name], f.metadata["help"]) for f in fields(Settings)]
    if as_json:
        click.echo(json.dumps({name: {"value": value, "origin": origin} for name, value, origin, _ in rows}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("setting", "value", "origin", "meaning")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def mount_helper() -> None:
    """mount.cascadefs STORE MOUNTPOINT [-o options]: what mount(8) and /etc/fstab call."""
    words, options, rest = sys.argv[1:], [], list[str]()
    while words:
        word = words.pop(0)
        if word == "-o" and words:
            options.append(words.pop(0))
        elif not word.startswith("-"):
            rest.append(word)
    if len(rest) != 2:
        click.echo("usage: mount.cascadefs STORE MOUNTPOINT [-o options]", err=True)
        sys.exit(1)
    arguments = ["mount", rest[1], *(["--store", rest[0]] if rest[0] not in ("cascadefs", "none") else [])]
    main([*arguments, *(item for option in options for item in ("-o", option))])


if __name__ == "__main__":
    main()
