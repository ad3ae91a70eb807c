"""`cascadefs bench compare`: cascadefs beside other stores of KV blocks, in one run.

Owns: options, progress bar, exit code: 1 when a row of cascadefs itself failed. A system that is not installed is a row.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cascadefs.bench import report, targets
from cascadefs.bench.compare import plots, presets, rows, show
from cascadefs.bench.compare.adapter import Shape, all_systems
from cascadefs.bench.compare.runner import Result, Runner, Systems, open_runner
from cascadefs.errors import UserError

TABLE_COLUMNS = 190  # where the output is no terminal, rich assumes 80 and breaks every cell


def _chosen(words: Sequence[str]) -> Systems:
    """Systems with one of the words in their name."""
    systems = all_systems()
    found = {name: system for name, system in systems.items() if not words or any(word in name for word in words)}
    if not found:
        raise UserError(f"no system's name contains {' or '.join(words)}; there are: {rows.known(systems)}")
    return found


def _measure(runner: Runner, shapes: Sequence[Shape], repeats: int, console: Console) -> list[Result]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(shapes) * repeats * len(runner.systems))
        found: list[Result] = []
        for shape in shapes:
            on_step = lambda title: progress.update(task, advance=1, description=title)  # noqa: E731
            found += runner.run(shape, repeats, on_step)
        return found


def _compare(
    preset: str, shapes: Sequence[Shape], repeats: int, systems: Systems, store: Path | None
) -> tuple[list[rows.Row], dict[str, object], list[str]]:
    notes: list[str] = []
    setup = targets.default_setup(store)
    fitted = [presets.fit(shape, targets.available_bytes()) for shape in shapes]
    if fitted != list(shapes):
        notes.append("fewer blocks than the preset has: memory is short")
    with open_runner(systems, setup, notes.append) as runner:
        results = _measure(runner, fitted, repeats, Console(stderr=True))
    return [rows.row(result, preset) for result in results], report.machine(setup.shm_bytes, setup.store_base), notes


def _preset_help() -> str:
    return "; ".join(f"{name}: {preset.help}" for name, preset in presets.PRESETS.items())


@click.command("compare")
@click.option("--preset", type=click.Choice(list(presets.PRESETS)), default="quick", show_default=True, help=_preset_help())
@click.option("--systems", multiple=True, metavar="WORD", help="Only systems with WORD in their name; may be given again.")
@click.option("--tokens", type=click.IntRange(1, 4096), help="Tokens of a block, 320 KiB each, instead of the preset's.")
@click.option("--ranks", type=click.IntRange(1, 256), help="Processes, instead of the preset's.")
@click.option("--duplicates", type=click.FloatRange(0, 1), help="Share of blocks whose content others have, too.")
@click.option("--repeats", type=click.IntRange(1, 100), default=presets.REPEATS, show_default=True, help="Samples of a figure.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here.")
@click.option("--plot", "plot_folder", type=click.Path(file_okay=False, path_type=Path), help="Draw PNGs and SVGs in here.")
@click.option("--markdown", is_flag=True, help="Print the tables in Markdown.")
@click.option(
    "--store",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder on the disk that is measured (default: beside CASCADEFS_STORE, else /var/tmp).",
)
def bench_compare(
    preset: str,
    systems: tuple[str, ...],
    tokens: int | None,
    ranks: int | None,
    duplicates: float | None,
    repeats: int,
    json_path: Path | None,
    plot_folder: Path | None,
    markdown: bool,
    store: Path | None,
) -> None:
    """Compare cascadefs with LMCache, Redis, HDF5, PDC, vLLM's file tier, torch.save and raw files, in one run."""
    try:
        shapes = presets.adjusted(presets.PRESETS[preset].shapes, tokens, ranks, duplicates)
        with targets.tidy_exit():
            table, machine, notes = _compare(preset, shapes, repeats, _chosen(systems), store)
        if json_path:
            json_path.write_text(json.dumps(rows.document(table, machine, notes), indent=1) + "\n")
            notes.append(f"written: {json_path}")
        if plot_folder:
            notes += plots.draw(table, plot_folder)
    except UserError as why:
        raise click.ClickException(str(why)) from why
    if markdown:
        click.echo(show.markdown(table))
    else:
        console = Console()
        show.terminal(console if console.is_terminal else Console(width=TABLE_COLUMNS), table, notes)
    if any(row.status.startswith("failed") for row in table if row.system.startswith(rows.FAMILY)):
        sys.exit(1)
