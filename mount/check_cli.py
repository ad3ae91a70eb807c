"""`fsck`, `verify` and `rebuild-index`. Owns: their arguments, progress bars and what is printed; the checks are in fsck.

Exit codes: 0 clean, 1 repaired, 2 damage left (and 1 for errors of the user's, as everywhere).
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import humanfriendly
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from cascadefs.config import load
from cascadefs.errors import UserError
from cascadefs.integrity import fsck as checks
from cascadefs.integrity.fsck.report import Finding, Report
from cascadefs.integrity.rebuild import as_json, rebuild
from cascadefs.mount import asking, control, mountinfo

SHOW_AFTER_S = 2.0
POLL_S = 0.2
PATHS_SHOWN = 10


@contextmanager
def progress_bar() -> Iterator[Any]:
    """A function (what, done, in all) that draws a bar on stderr from the third second on."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar, start, task = Progress(*columns, console=Console(stderr=True), transient=True), time.monotonic(), None

    def show(what: str, done: int, total: int) -> None:
        nonlocal task
        if time.monotonic() - start < SHOW_AFTER_S:
            return
        if task is None:
            bar.start()
            task = bar.add_task(what)
        bar.update(task, description=what, completed=done, total=max(total, 1))

    try:
        yield show
    finally:
        if task is not None:
            bar.stop()


def _shm_dir(given: Path | None) -> Path:
    return Path(load({"shm_dir": given}, os.environ, None).settings.shm_dir)


def _line(finding: Finding) -> str:
    paths = list(finding.paths[:PATHS_SHOWN])
    if len(finding.paths) > PATHS_SHOWN:
        paths.append(f"and {len(finding.paths) - PATHS_SHOWN} more")
    hurt = f"\n    hurts {', '.join(paths)}" if paths else ""
    return f"{finding.check}: {finding.what}{hurt}"


def _print(outcome: checks.Outcome) -> None:
    left: Report = outcome.after
    for note in left.notes:
        click.echo(f"note: {note}")
    if outcome.after is not outcome.before:
        for finding in outcome.before.findings:
            click.echo(f"found: {_line(finding)}")
    for finding in left.findings:
        click.echo(f"damage: {_line(finding)}")
    read = humanfriendly.format_size(left.bytes_read, binary=True)
    words = {checks.CLEAN: "clean", checks.REPAIRED: "repaired, clean now", checks.DAMAGED: "damage left"}
    click.echo(f"{words[outcome.exit_code]} ({read} verified)")


SHM_DIR = click.option(
    "--shm-dir", type=click.Path(path_type=Path), help="Where the memory tier is (see `cascadefs config show`)."
)


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--repair", is_flag=True, help="Heal what can be healed without guessing.")
@click.option("--json", "as_document", is_flag=True, help="As JSON.")
@SHM_DIR
def fsck(store: Path, repair: bool, as_document: bool, shm_dir: Path | None) -> None:
    """Check every byte of an unmounted STORE. Exit code 0: clean, 1: repaired, 2: damage left."""
    store = mountinfo.resolve(store)
    with progress_bar() as progress:
        outcome = checks.run(store, _shm_dir(shm_dir), repair, progress)
    if as_document:
        click.echo(json.dumps(checks.document(outcome), indent=2))
    else:
        _print(outcome)
    sys.exit(outcome.exit_code)


@click.command("rebuild-index")
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--json", "as_document", is_flag=True, help="As JSON.")
@SHM_DIR
def rebuild_index(store: Path, as_document: bool, shm_dir: Path | None) -> None:
    """Make a new index for an unmounted STORE from its extents; the old one is kept beside it.

    Every flushed file comes back with its name and attributes as of the last flush. Exit code 2: a file is lost.
    """
    store = mountinfo.resolve(store)
    with progress_bar() as progress:
        result = rebuild(store, _shm_dir(shm_dir), lambda done, total: progress("reading extents", done, total))
    if as_document:
        click.echo(as_json(result))
    else:
        for path in result.absent:
            click.echo(f"lost: {path}")
        kept = f"; the old index is {result.kept}" if result.kept else ""
        click.echo(f"{result.files} files, {result.folders} folders, {result.lost_and_found} in /lost+found{kept}")
    sys.exit(2 if result.absent else 0)


@click.command()
@click.argument("target", metavar="MNT|STORE", type=click.Path(path_type=Path))
@click.option("--json", "as_document", is_flag=True, help="As JSON.")
@SHM_DIR
def verify(target: Path, as_document: bool, shm_dir: Path | None) -> None:
    """Read everything back; on a mount in its background, healing what it can. Exit code 0: good, 1: healed, 2: bad."""
    path = mountinfo.resolve(target)
    if path in {m.path for m in mountinfo.ours()}:
        _verify_mount(path, as_document)
    elif (path / "store.json").exists():
        with progress_bar() as progress:
            outcome = checks.run(path, _shm_dir(shm_dir), False, progress)
        if as_document:
            click.echo(json.dumps(checks.document(outcome), indent=2))
        else:
            _print(outcome)
        sys.exit(outcome.exit_code)
    else:
        raise UserError(f"{target} is neither a mounted cascadefs nor a store; give one of the two")


def _verify_state(mountpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = asking.stats(mountpoint)["verify"]
    return found


def _verify_mount(mountpoint: Path, as_document: bool) -> None:
    try:
        runs = _verify_state(mountpoint)["runs"]
        control.tell(mountpoint, control.VERIFY, b"1")
        with progress_bar() as progress:
            while (state := _verify_state(mountpoint))["runs"] == runs:
                progress("verifying", state["bytes_done"], state["bytes_total"])
                time.sleep(POLL_S)
    except OSError as e:
        raise UserError(f"the mount at {mountpoint} does not answer ({e.strerror}); see its log cascadefs.log") from e
    if as_document:
        click.echo(json.dumps(state, indent=2))
    else:
        for path in state["damaged_files"]:
            click.echo(f"damaged: {path}")
        size = humanfriendly.format_size(state["bytes_done"], binary=True)
        click.echo(f"{size} verified: {state['healed_blocks']} blocks healed, {state['damaged_blocks']} damaged")
    sys.exit(2 if state["damaged_blocks"] else 1 if state["healed_blocks"] else 0)
