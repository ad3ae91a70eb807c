"""The command line. Owns: arguments, what is printed, exit codes. Errors of the user's are one line and exit code 1.

Commands talk to a running mount through the mount itself (`.cascade/`), so they need no socket and no pid file.
"""

import errno
import importlib
import io
import json
import os
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import click
import humanfriendly

from cascadefs.config import Configuration, Settings, load
from cascadefs.errors import ConfigError, UserError
from cascadefs.mount import asking, mountinfo
from cascadefs.mount.fuse import device
from cascadefs.mount.options import Options, parse, parse_helper
from cascadefs.mount.places import check_apart

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
UPGRADE_S = 15
USAGE, MOUNT_FAILED = 1, 32  # exit codes of mount(8)
NO_SOURCE = ("cascadefs", "none")
# Commands of other modules, loaded when they are called: numpy and the rest would make `cascadefs status` three times as slow.
# For the same reason rich is imported where something is drawn.
ELSEWHERE = {
    "umount": ("mount.leaving", "umount"),
    "flush": ("mount.leaving", "flush"),
    "bench": ("bench.cli.lines_cli", "bench"),
    "fsck": ("mount.check_cli", "fsck"),
    "verify": ("mount.check_cli", "verify"),
    "rebuild-index": ("mount.check_cli", "rebuild_index"),
    "new-id": ("mount.stores_cli", "new_id"),
    "list": ("mount.stores_cli", "list_all"),
    "drop": ("mount.stores_cli", "drop"),
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
        found: click.Command = getattr(importlib.import_module(f"cascadefs.{module}"), function)
        return found

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Parse and run."""
        hold_standard_streams()
        if not args and not kwargs and is_asked_by_mount(sys.argv[1:]):
            mount_helper()
            sys.exit(0)
        return super().main(*args, **{"prog_name": "cascadefs"} | kwargs)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse what stands before the command."""
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as e:
            _end_with_usage(e)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except click.UsageError as e:
            _end_with_usage(e)
        except UserError as e:
            click.echo(f"cascadefs: {e}", err=True)
        except OSError as e:
            if e.errno == errno.EPIPE:  # whoever read our output has gone: click ends quietly
                raise
            click.echo(f"cascadefs: {e.strerror or e}{f': {e.filename}' if e.filename else ''}", err=True)
        sys.exit(1)


def is_asked_by_mount(words: list[str]) -> bool:
    """Whether mount.fuse3 calls us (STORE MOUNTPOINT -o options), as mount(8) makes it do where our helper is not installed."""
    return len(words) == 4 and words[2] == "-o" and os.path.isabs(words[1]) and words[0] not in (*main.commands, *ELSEWHERE)


def _end_with_usage(error: click.UsageError) -> NoReturn:
    """One line and click's exit code; a group without a command shows its help, as click does."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        raise error
    told = error.format_message().rstrip(".")
    command = error.ctx.command_path if error.ctx else "cascadefs"
    click.echo(f"cascadefs: {told[:1].lower()}{told[1:]}; see: {command} --help", err=True)
    sys.exit(error.exit_code)


def hold_standard_streams() -> None:
    """Descriptors 0 to 2 that were closed (cron, some launchers) lead to /dev/null: else files and sockets of ours would get
    these numbers, and what is printed would go there."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # a path may have any bytes, and is shown with them
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
    found = load(given, os.environ, config)
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
@click.option("-o", "options", multiple=True, metavar="OPTIONS", help="As in /etc/fstab; settings, too (shm_size=8GiB).")
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
    passthrough = "false" if no_passthrough else None
    flags = {"store": store, "shm_size": shm_size, "sync": sync, "seal": seal, "passthrough": passthrough}
    given = parse(options)
    path = mountinfo.resolve(mountpoint)
    if "remount" in given.flags:
        _remount(path, given)
        return
    found = _settings(config, **given.settings | {name: value for name, value in flags.items() if value is not None})
    check_apart(path, *(mountinfo.resolve(folder) for folder in (found.settings.store, found.settings.shm_dir)))
    device.check_mountpoint(path)  # first: a store below a dead mount cannot be looked at
    _prepare_store(found)
    daemon, keeper = _daemon()
    wanted = daemon.Mounting(path, found, given.words, log_to_file=not foreground)
    if foreground:
        daemon.start_log(wanted)
        sys.exit(keeper.keep(wanted, os.dup(1)))
    click.echo(keeper.in_background(wanted))


def _remount(path: Path, given: Options) -> None:
    """Only what the kernel keeps can change while a mount lives; settings may be named (as /etc/fstab does), not changed."""
    shown = json.loads(asking.ask(path, (asking.mountpoint(path) / ".cascade/config").read_bytes))
    wanted = load(given.settings, {}, None).settings
    if changed := [name for name in given.settings if str(getattr(wanted, name)) != shown[name]["value"]]:
        raise UserError(f"{', '.join(changed)} cannot be changed on a live mount; unmount it and mount it again")
    device.remount(path, given)


def _prepare_store(found: Configuration) -> None:
    """A default store may need its parents made; one that was named must have its parent: a typo makes no tree."""
    from cascadefs.metadata.sqlite import check_store_folder

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


@main.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
def upgrade(mountpoint: Path) -> None:
    """Restart the worker of a mount in the code that is installed now. Programs that use it notice a pause, no error."""
    path = asking.mountpoint(mountpoint)
    before = asking.stats(path)
    if before["keeper_pid"] is None:
        raise UserError(f"the mount at {path} has no keeper (it was killed): unmount and mount it again")
    os.kill(before["keeper_pid"], signal.SIGUSR1)
    end = time.monotonic() + UPGRADE_S
    while (now := asking.stats(path))["worker_pid"] == before["worker_pid"]:
        if now["upgrades_refused"] > before["upgrades_refused"] or time.monotonic() > end:
            raise UserError("the old worker goes on: the installed code cannot take over; see cascadefs.log in the store")
        time.sleep(0.05)
    click.echo(f"upgraded: process {before['worker_pid']} -> {now['worker_pid']}, {now['version']}")


@main.command()
@click.argument("mountpoint", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="The whole document.")
def status(mountpoint: Path | None, as_json: bool) -> None:
    """What lies in which tier, and how much was stored once only."""
    found = asking.stats(asking.mountpoint(mountpoint))
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
    for line in found["memory_notes"]:
        click.echo(f"memory: {line}")
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
        around = asking.mount_around(path)
        if around is not None:
            asking.check_alive(around)
        path.stat()
        told = json.loads(os.getxattr(path, "user.cascade.info"))
    except OSError as e:
        why = "not one" if e.errno in (errno.ENODATA, errno.EOPNOTSUPP) else e.strerror
        raise UserError(f"{path}: {why}; give a regular file on a cascadefs mount") from e
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
    from rich.table import Column, Table

    table = Table("setting", Column("value", overflow="fold"), "origin", "meaning")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def mount_helper() -> None:
    """mount.cascadefs STORE MOUNTPOINT [-o options]: what mount(8) and /etc/fstab call."""
    try:
        asked = parse_helper(sys.argv[1:])
        options = parse(asked.options, asked.sloppy)
    except UserError as e:
        click.echo(f"mount.cascadefs: {e}", err=True)
        sys.exit(USAGE)
    if asked.fake:
        return
    store = [] if asked.store in NO_SOURCE else ["--store", asked.store]
    source = options.settings.get("store", "") if asked.store in NO_SOURCE else asked.store
    settings = [f'{name}="{value}"' for name, value in options.settings.items()]
    given = [word for option in (*options.words, *settings) for word in ("-o", option)]
    try:
        main(["mount", *store, *given, "--", asked.mountpoint])
    except SystemExit as e:
        soft = options.fails_softly and "remount" not in options.flags and _lacks_source(source)
        sys.exit(0 if soft or not e.code else MOUNT_FAILED)


def _lacks_source(store: str) -> bool:
    """As mount(8) says of `nofail`: the device is not there, here the disk that the store lies on. Nothing else is forgiven."""
    folder = mountinfo.resolve(Path(store))
    return bool(store) and not folder.exists() and not folder.parent.is_dir()


if __name__ == "__main__":
    main()
