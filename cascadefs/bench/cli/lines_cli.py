"""`cascadefs bench ops|cold|hashing|portable|growth`: goals beside their references, one command each.

Owns: the options of these commands and what they share: places, warm-up, run, table, JSON. Does not measure. Exit code 1 when a
cascadefs column failed in the middle; unmet goals are only shown.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cascadefs.bench import cold, fresh, growth, hashing, io, lines, ops, portable, report, round_trip, syncs, targets
from cascadefs.bench.cli import io_cli
from cascadefs.bench.cli.io_cli import Notes
from cascadefs.bench.io import MIB, Measure, Samples
from cascadefs.bench.lines import Goal
from cascadefs.bench.targets import CASCADE, DISK, EXAMPLE, HUGE, PORTABLE, UNHASHED
from cascadefs.errors import UserError

REPEATS = 3
QUICK_BALLAST_BYTES = 64 * MIB
OURS = {CASCADE, PORTABLE, UNHASHED}


@dataclass(frozen=True)
class Plan:
    """One command: the measures of its warm-up, those that count, and those that are run once only. `shm_bytes` bounds the
    memory tier of each mount; `ballast_bytes` is twice what a measure holds (see io.Ballast)."""

    keys: tuple[str, ...]
    warm_up: list[Measure]
    measures: list[Measure]
    once: list[Measure]
    goals: list[Goal]
    method: Sequence[str]
    shm_bytes: int
    ballast_bytes: int
    buffer_bytes: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)


def new_console() -> Console:
    """As wide as the tables need where the output is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=io_cli.TABLE_COLUMNS)


def setup_for(shm_bytes: int, store: Path | None) -> targets.Setup:
    """What the machine offers, with a memory tier of at most so much."""
    found = targets.default_setup(store)
    return replace(found, shm_bytes=min(shm_bytes, found.shm_bytes))


def run_plan(plan: Plan, repeats: int, json_path: Path | None, store: Path | None) -> None:
    """Everything from the mounts to the table."""
    console, notes, setup = new_console(), Notes(), setup_for(plan.shm_bytes, store)
    setup = replace(setup, environment=plan.environment)
    if setup.shm_bytes < plan.shm_bytes:
        need, have = (io.size_text(size) for size in (plan.shm_bytes, setup.shm_bytes))
        raise UserError(f"not enough free memory: a memory tier of {need} is needed, {have} can be had; try --quick")
    with targets.open_places(setup, notes.add, plan.keys) as (places, memory):
        ballast = io.Ballast(memory, plan.ballast_bytes)
        samples = io_cli.measure(places, ballast, plan.warm_up, plan.measures, repeats, notes, console, plan.buffer_bytes)
        sound = [place for place in places if place.key not in notes.failed]
        if plan.once:
            samples |= io_cli.measure(sound, ballast, [], plan.once, 1, notes, console, plan.buffer_bytes)
    _report(plan, samples, setup, json_path, notes, console)
    if notes.failed & OURS:
        sys.exit(1)


def _report(plan: Plan, samples: Samples, setup: targets.Setup, json_path: Path | None, notes: Notes, console: Console) -> None:
    units = io.units([*plan.measures, *plan.once])
    rows, found, trip = report.rows(samples, units), lines.judge(plan.goals, samples, units), round_trip.measured()
    notes.add(str(trip))
    lines.show(console, rows, found, notes.lines)
    if json_path:
        write_json(json_path, lines.document(found, rows, _facts(setup, trip), plan.method, notes.lines), console)


def _facts(setup: targets.Setup, trip: round_trip.RoundTrip) -> dict[str, object]:
    return report.machine(setup.shm_bytes, setup.store_base) | {"round_trip": asdict(trip)}


def write_json(path: Path, document: dict[str, object], console: Console) -> None:
    """The document, and where it is."""
    path.write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"written: {path}", markup=False)


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What all these commands take."""
    path = click.Path(exists=True, file_okay=False, path_type=Path)
    where = "Folder for the temporary stores (default: beside CASCADEFS_STORE, else /var/tmp)."
    command = click.option("--store", type=path, help=where)(command)
    return click.option(
        "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures and lines here."
    )(command)


def repeated(command: Callable[..., Any]) -> Callable[..., Any]:
    """Of those that take samples."""
    command = click.option("--repeats", type=click.IntRange(1, 100), help=f"Samples of each figure [{REPEATS}; --quick 1].")(
        options(command)
    )
    return click.option("--quick", is_flag=True, help="Little data, one repeat: rough figures in half a minute.")(command)


def _run(plan: Plan, quick: bool, repeats: int | None, json_path: Path | None, store: Path | None) -> None:
    try:
        with targets.tidy_exit():
            run_plan(plan, repeats or (1 if quick else REPEATS), json_path, store)
    except UserError as why:
        raise click.ClickException(str(why)) from why


@click.command("ops")
@repeated
@click.option("--names", type=click.IntRange(10), help=f"Names to list [{ops.FULL.listed:,}; --quick {ops.QUICK.listed}].")
@click.option("--fresh", "only_fresh", is_flag=True, help="Instead: files just written; names in vain; small fsyncs.")
def bench_ops(
    json_path: Path | None, store: Path | None, quick: bool, repeats: int | None, names: int | None, only_fresh: bool
) -> None:
    """Round trips: open, stat, lookups in vain, put and get of 64 KiB, create, unlink, listings.

    Beside a raw tmpfs with huge pages and pyfuse3's passthroughfs. Takes about 6 minutes, most of it to make 100,000 files at
    each place for the listing; --names makes that shorter. --fresh takes half a minute.
    """
    if only_fresh:
        given = fresh.QUICK if quick else fresh.FULL
        plan = Plan(
            (DISK, CASCADE), [*fresh.measures(fresh.WARM_UP), *syncs.measures(syncs.WARM_UP)],
            [*fresh.measures(given), *syncs.measures(syncs.QUICK if quick else syncs.FULL)], [],
            [*fresh.goals(), *syncs.goals()], (*fresh.METHOD, syncs.METHOD), syncs.SHM_BYTES, fresh.BALLAST_BYTES,
        )  # fmt: skip
        _run(plan, quick, repeats, json_path, store)
        return
    counts = ops.QUICK if quick else ops.FULL
    counts = replace(counts, listed=names or counts.listed)
    plan = Plan(
        (HUGE, CASCADE, EXAMPLE), ops.measures(ops.WARM_UP), ops.measures(counts), ops.listings(counts), ops.goals(counts),
        ops.METHOD, 256 * MIB, QUICK_BALLAST_BYTES if quick else ops.BALLAST_BYTES,
    )  # fmt: skip
    _run(plan, quick, repeats, json_path, store)


@click.command("cold")
@repeated
def bench_cold(json_path: Path | None, store: Path | None, quick: bool, repeats: int | None) -> None:
    """The cold tier beside its disk: flush, cold reads, small blocks made durable in batches.

    The reference is one O_DIRECT stream on the same disk (4 MiB requests, four in flight), and for small blocks a file each
    with fsync. About a minute, 0.5 GiB of disk at a time.
    """
    blocks, batches = (cold.QUICK_BLOCKS, cold.QUICK_BATCHES) if quick else (cold.FULL_BLOCKS, cold.FULL_BATCHES)
    held = 2 * blocks * cold.BLOCK  # below the high watermark: nothing is evicted, nothing staged on the disk
    warm_up = cold.measures(cold.WARM_UP_BLOCKS, cold.WARM_UP_BATCHES)
    plan = Plan(
        (DISK, CASCADE), warm_up, cold.measures(blocks, batches), [], cold.goals(blocks), cold.METHOD, held, held, cold.BLOCK,
        cold.ENVIRONMENT,
    )  # fmt: skip
    _run(plan, quick, repeats, json_path, store)


@click.command("hashing")
@repeated
def bench_hashing(json_path: Path | None, store: Path | None, quick: bool, repeats: int | None) -> None:
    """What hashing costs: bursts of writes as mounted by default and with seal = flush, where nothing is hashed behind the
    writer, and the worker's processor time per GiB until all is durable.

    Beside a raw tmpfs with huge pages. The mounts take turns; a line is the median ratio of their pairs. About two minutes.
    """
    size = (128 if quick else 1024) * MIB
    repeats = repeats or (None if quick else hashing.PAIRS)
    plan = Plan(
        (HUGE, UNHASHED, CASCADE), hashing.measures(64 * MIB), hashing.measures(size), [], hashing.goals(size),
        hashing.METHOD, 2 * size, 2 * size,
    )  # fmt: skip
    _run(plan, quick, repeats, json_path, store)


@click.command("portable")
@repeated
def bench_portable(json_path: Path | None, store: Path | None, quick: bool, repeats: int | None) -> None:
    """Reads and writes without passthrough, by 1, 2 and 4 processes, beside pyfuse3's passthroughfs.

    About two minutes.
    """
    size = portable.QUICK_BYTES if quick else portable.FULL_BYTES
    held = 8 * size
    plan = Plan(
        (HUGE, PORTABLE, EXAMPLE), portable.measures(portable.WARM_UP_BYTES), portable.measures(size), [],
        portable.goals(size), portable.METHOD, max(held, 128 * MIB), held,
    )  # fmt: skip
    _run(plan, quick, repeats, json_path, store)


GROWTH_SHM_BYTES = 1024 * MIB


def _grow(up_to: int, file_bytes: int, store: Path | None, notes: Notes, console: Console) -> list[growth.Stage]:
    need = GROWTH_SHM_BYTES + 2 * up_to * file_bytes
    with targets.open_places(setup_for(need, store), notes.add, (CASCADE,)) as (places, _):
        if not places or not isinstance(place := places[0], targets.Mounted):
            raise UserError("\n".join(notes.lines))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=up_to)
            return growth.run(
                place, up_to, file_bytes, lambda what, done: progress.update(task, completed=done, description=what)
            )


@click.command("growth")
@options
@click.option("--up-to", type=click.IntRange(100, 4_000_000), default=100_000, show_default=True, help="Files at the end.")
@click.option("--file-bytes", type=click.IntRange(0, 1 << 20), default=0, show_default=True, help="Bytes in each file.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw it here (PNG, SVG; needs matplotlib).")
def bench_growth(json_path: Path | None, store: Path | None, up_to: int, file_bytes: int, plot: Path | None) -> None:
    """What a file costs when there are many: times and memory at 1,000, 10,000, 100,000 ... files of one store.

    100,000 files take about a minute, 1,000,000 about ten (--up-to 1000000). Empty files by default; with --file-bytes each
    has a content of its own, which also takes memory tier and disk (4 KiB and 8 KiB a file at least).
    """
    notes, console = Notes(), new_console()
    try:
        with targets.tidy_exit():
            found = _grow(up_to, file_bytes, store, notes, console)
        if plot:
            growth.plot(found, plot)
    except UserError as why:
        raise click.ClickException(str(why)) from why
    judged = growth.judge(found)
    console.print(growth.table(found))
    console.print(lines.table(judged))
    if json_path:
        setup = setup_for(GROWTH_SHM_BYTES, store)
        document = lines.document(judged, (), _facts(setup, round_trip.measured()), growth.METHOD, notes.lines)
        write_json(json_path, document | {"stages": [asdict(stage) for stage in found]}, console)


bench = io_cli.bench
for command in (bench_ops, bench_cold, bench_hashing, bench_portable, bench_growth):
    bench.add_command(command)
