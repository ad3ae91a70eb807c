"""`cascadefs bench io`: compares the mount with raw tmpfs and with pyfuse3's own example, in one run.

Owns: the options, the progress bar and the order of setup, warm-up, run and report. Does not measure and does not
mount. Exit code 1 when a cascadefs column failed in the middle: a benchmark must not hide that. Unmet requirements are
only shown.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cascadefs.bench import io, lines, report, targets
from cascadefs.bench.cli.compare_cli import bench_compare
from cascadefs.errors import UserError

REPEATS, QUICK_REPEATS = 5, 1
TABLE_COLUMNS = 150  # where the output is no terminal, rich assumes 80 and breaks every cell


@click.group()
def bench() -> None:
    """Measure the mount."""


class Notes:
    """Lines for the reader, each once, in the order they came."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failed: set[str] = set()

    def add(self, line: str) -> None:
        """Keep a line."""
        if line not in self.lines:
            self.lines.append(line)

    def failure(self, key: str, why: OSError) -> None:
        """A target broke in the middle of the run."""
        self.failed.add(key)
        self.add(f"{targets.TITLES[key]} FAILED and was left out from then on: {why}")


def measure(
    places: list[io.Place],
    ballast: io.Ballast,
    warm_up: list[io.Measure],
    chosen: list[io.Measure],
    repeats: int,
    notes: Notes,
    console: Console,
    buffer_bytes: int = 0,
) -> io.Samples:
    """Warm-up, then the run that counts; places that broke while warming up take no part."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=(len(warm_up) + repeats * len(chosen)) * len(places))

        def step(measure: str, key: str) -> None:
            progress.update(task, advance=1, description=f"{measure}: {targets.TITLES[key]}")

        io.run(warm_up, places, 1, ballast, step, notes.failure, buffer_bytes)
        sound = [place for place in places if place.key not in notes.failed]
        return io.run(chosen, sound, repeats, ballast, step, notes.failure, buffer_bytes)


def chosen_of(measures: list[io.Measure], words: tuple[str, ...]) -> list[io.Measure]:
    """Measures with a row that contains one of the words; all without words."""
    found = [m for m in measures if not words or any(word in row for row in m.units for word in words)]
    if not found:
        rows = ", ".join(row for measure in measures for row in measure.units)
        raise UserError(f"no measure contains {' or '.join(words)}; there are: {rows}")
    return found


def _bench_io(
    json_path: Path | None, quick: bool, only: tuple[str, ...], repeats: int, store: Path | None, notes: Notes
) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_COLUMNS)
    setup = targets.default_setup(store)
    wanted = io.QUICK if quick else io.FULL
    sizes = io.fit(wanted, setup.shm_bytes)
    if sizes != wanted:
        notes.add(f"sizes were cut to free memory (memory tier {io.size_text(setup.shm_bytes)}): some lines are not measured")
    chosen = chosen_of(io.measures(sizes), only)
    with targets.open_places(setup, notes.add) as (places, memory):
        ballast = io.Ballast(memory, sizes.ballast_bytes)
        warm_up = io.measures(io.WARM_UP if quick or only else io.fit(io.QUICK, setup.shm_bytes))
        samples = measure(places, ballast, warm_up, chosen, repeats, notes, console)
    table = report.rows(samples, io.units(chosen))
    verdicts = report.acceptance(table, sizes.calls)
    bulk = lines.bulk(samples, sizes, io.units(chosen))
    report.show(console, table, verdicts, notes.lines)
    console.print(lines.table(bulk))
    if json_path:
        facts = report.machine(setup.shm_bytes, setup.store_base)
        document = report.document(table, verdicts, facts, sizes, notes.lines)
        document["lines"] = [asdict(line) for line in bulk]
        json_path.write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"written: {json_path}", markup=False)


@bench.command("io")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here.")
@click.option("--quick", is_flag=True, help="64 MiB files, one repeat: half a minute, rough figures.")
@click.option("--only", multiple=True, metavar="WORD", help="Only measures with WORD in a row's name; may be given again.")
@click.option("--repeats", type=click.IntRange(1, 100), help=f"Samples of each figure [{REPEATS}; --quick {QUICK_REPEATS}].")
@click.option(
    "--store",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder in which the temporary stores are made (default: beside CASCADEFS_STORE, else /var/tmp).",
)
def bench_io(json_path: Path | None, quick: bool, only: tuple[str, ...], repeats: int | None, store: Path | None) -> None:
    """Compare reads, writes and names of the mount with raw tmpfs and with pyfuse3's passthroughfs, in one run."""
    notes = Notes()
    try:
        with targets.tidy_exit():
            _bench_io(json_path, quick, only, repeats or (QUICK_REPEATS if quick else REPEATS), store, notes)
    except UserError as why:
        raise click.ClickException(str(why)) from why
    if notes.failed & {targets.CASCADE, targets.PORTABLE}:
        sys.exit(1)


bench.add_command(bench_compare)
