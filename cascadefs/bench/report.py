"""From samples to figures: medians, ratios, verdicts, the table and the JSON.

Owns: the arithmetic of the report and its words. Does no measuring. Invariants:
(1) A ratio is speed over speed, so more is better in every row: for us it is the other's time over one's own.
(2) A verdict is computed from the medians of the same run, or is None: "not measured" is never "met".
"""

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cascadefs.bench.io import GET, GIB, LESS_IS_BETTER, MIB, PUT, READ, WRITE, Samples, Sizes, object_name, stream_name
from cascadefs.bench.targets import CASCADE, EXAMPLE, HUGE, PORTABLE, SHM, TITLES

METHOD = (
    "One run: for each repeat, for each measure, all targets one after the other; the order of the targets"
    " rotates with the repeat. A smaller pass over everything comes first and is not counted. Figures are medians"
    " over the repeats; within a repeat put, get and open + close are themselves the median over many files.",
    "What is measured is the cost in the foreground: a cascadefs mount is flushed, outside the clock, between"
    " writing and reading back, and after the names, so that hashing and copying of one measure do not burden the"
    " next. Files are removed outside the clock.",
    "Data is random and unique: every 64 KiB carries a number that never repeats, written outside the clock, so"
    " deduplication finds nothing. Buffers are page-faulted before. The buffer of a streamed write is one call"
    " long, so it may lie in the cache of the processor, as it does for every target.",
    "Before each measure twice the memory that it takes is touched and freed again, for every target alike: a"
    " virtual machine gives free memory back to its host, and the first target to want it would pay for a fault in"
    " the host. 0.2 s of rest follow: that computing is the benchmark's own (see io.Ballast).",
    "write: open a fresh name, write, close. read: open, readv, close of a file that was read once before. put:"
    " open a fresh name, one write, close. get: the first read of each file, one readv. 2 processes: bytes of both"
    " over the time from the first start to the last end, in 1 MiB calls. open + close: the same file, for"
    " reading. create: empty files. stat: each name once after all were created (the kernel may answer from its"
    " own cache where the filesystem allows it). mmap read: map, copy out, unmap of a file that was mapped twice"
    " before.",
    "What the last call of a read delivered is compared with what was written, outside the clock. Rates are"
    " decimal: 1 GB/s = 1e9 bytes per second. pyfuse3 passthroughfs runs with its default options over the same"
    " huge tmpfs.",
)
WRITE_READ_OF_HUGE, WRITE_READ_OF_SHM, OBJECT_OF_HUGE, PORTABLE_OF_EXAMPLE = 0.85, 2.5, 0.6, 1.0


@dataclass(frozen=True)
class Row:
    """One measure of one target."""

    measure: str
    unit: str
    target: str
    median: float
    min: float
    max: float
    repeats: int
    ratio_to_huge: float | None


@dataclass(frozen=True)
class Verdict:
    """One requirement: `figure` and `met` are None when this run did not measure it."""

    line: str
    required: float
    figure: float | None
    met: bool | None


def speed_ratio(unit: str, figure: float, reference: float) -> float:
    """How many times faster than the reference."""
    return reference / figure if unit in LESS_IS_BETTER else figure / reference


def rows(samples: Samples, units: Mapping[str, str]) -> list[Row]:
    """In the order of `units`, then of the targets."""
    found = []
    for name, unit in units.items():
        huge = samples.get((name, HUGE))
        for key in TITLES:
            figures = samples.get((name, key))
            if figures:
                median = statistics.median(figures)
                ratio = speed_ratio(unit, median, statistics.median(huge)) if huge else None
                found.append(Row(name, unit, key, median, min(figures), max(figures), len(figures), ratio))
    return found


def ratio(table: Sequence[Row], measure: str, target: str, reference: str) -> float | None:
    """Speed of `target` over speed of `reference`; None when one of them was not measured."""
    by_target = {row.target: row for row in table if row.measure == measure}
    if target not in by_target or reference not in by_target:
        return None
    return speed_ratio(by_target[target].unit, by_target[target].median, by_target[reference].median)


def _verdict(line: str, required: float, figure: float | None) -> Verdict:
    return Verdict(line, required, figure, None if figure is None else figure >= required)


def _against(table: Sequence[Row], measure: str, reference: str, required: float) -> Verdict:
    line = f"{TITLES[CASCADE]}, {measure}: speed over {TITLES[reference]}"
    return _verdict(line, required, ratio(table, measure, CASCADE, reference))


def _worst_portable(table: Sequence[Row]) -> Verdict:
    """One verdict for every line: it holds when the worst line holds."""
    line = f"{TITLES[PORTABLE]}, every measure: speed over {TITLES[EXAMPLE]}"
    found = {name: ratio(table, name, PORTABLE, EXAMPLE) for name in dict.fromkeys(row.measure for row in table)}
    measured = {name: figure for name, figure in found.items() if figure is not None}
    if not measured:
        return _verdict(line, PORTABLE_OF_EXAMPLE, None)
    worst = min(measured, key=measured.__getitem__)
    below = sum(figure < PORTABLE_OF_EXAMPLE for figure in measured.values())
    return _verdict(f"{line} (worst: {worst}; {below} of {len(measured)} below)", PORTABLE_OF_EXAMPLE, measured[worst])


def acceptance(table: Sequence[Row], calls: Sequence[int]) -> list[Verdict]:
    """The requirements on a full run."""
    streams = [stream_name(verb, GIB, call) for verb in (WRITE, READ) for call in calls]
    found = [_against(table, name, HUGE, WRITE_READ_OF_HUGE) for name in streams]
    found += [_against(table, name, SHM, WRITE_READ_OF_SHM) for name in streams]
    found += [_against(table, object_name(verb, 10 * MIB), HUGE, OBJECT_OF_HUGE) for verb in (PUT, GET)]
    return [*found, _worst_portable(table)]


def machine(shm_bytes: int, store_base: Path) -> dict[str, object]:
    """What the figures depend on."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "memory_tier_bytes": shm_bytes,
        "store_base": str(store_base),
    }


def document(
    table: Sequence[Row], verdicts: Sequence[Verdict], facts: Mapping[str, object], sizes: Sizes, notes: Sequence[str]
) -> dict[str, object]:
    """The JSON document."""
    return {
        "machine": dict(facts),
        "method": list(METHOD),
        "sizes": asdict(sizes),
        "targets": TITLES,
        "rows": [asdict(row) for row in table],
        "acceptance": [asdict(verdict) for verdict in verdicts],
        "notes": list(notes),
    }


def figure_text(figure: float) -> str:
    """Three digits that matter."""
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def cell(table: Sequence[Row], measure: str, target: str) -> str:
    """The median, with the ratios that belong to the column."""
    row = next((row for row in table if row.measure == measure and row.target == target), None)
    if row is None:
        return "-"
    ratios = [] if row.ratio_to_huge is None or target not in (CASCADE, PORTABLE) else [f"{row.ratio_to_huge:.2f}h"]
    to_example = ratio(table, measure, PORTABLE, EXAMPLE) if target == PORTABLE else None
    if to_example is not None:
        ratios.append(f"{to_example:.2f}e")
    return f"{figure_text(row.median)} ({' '.join(ratios)})" if ratios else figure_text(row.median)


def figures_table(table: Sequence[Row]) -> Table:
    """One line a measure, one column a target that was measured."""
    shown = [key for key in TITLES if any(row.target == key for row in table)]
    caption = f"in brackets: speed over {TITLES[HUGE]} (h) and over {TITLES[EXAMPLE]} (e); more is better"
    drawn = Table(title="medians", caption=caption)
    drawn.add_column("measure")
    drawn.add_column("unit")
    for key in shown:
        drawn.add_column(TITLES[key], justify="right")
    for name, unit in {row.measure: row.unit for row in table}.items():
        drawn.add_row(name, unit, *(cell(table, name, key) for key in shown))
    return drawn


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """One line a requirement."""
    drawn = Table(title="required")
    for heading in ("line", "required", "figure", "met"):
        drawn.add_column(heading, justify="left" if heading == "line" else "right")
    words = {True: "yes", False: "NO", None: "not measured"}
    for verdict in verdicts:
        figure = "-" if verdict.figure is None else f"{verdict.figure:.2f}"
        drawn.add_row(verdict.line, f"{verdict.required:.2f}", figure, words[verdict.met])
    return drawn


def show(console: Console, table: Sequence[Row], verdicts: Sequence[Verdict], notes: Sequence[str]) -> None:
    """Everything a reader needs, notes last so that they are seen."""
    console.print(figures_table(table))
    console.print(verdict_table(verdicts))
    for note in notes:
        console.print(note, markup=False, highlight=False)
