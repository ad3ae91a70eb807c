"""Goals and what a run says of them: figure, the reference beside it, ratio, target, met or not.

Owns: the arithmetic and the table of goals for all `bench` commands. Does no measuring. Invariants:
(1) A ratio is speed over speed, so more is better in every line, whatever the unit.
(2) A line is judged by one run, its medians or the median of its paired ratios, or not at all: "not measured" is never "met".
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from cascadefs.bench import report
from cascadefs.bench.io import (
    GET,
    GIB,
    LESS_IS_BETTER,
    MIB,
    PUT,
    READ,
    WRITE,
    Samples,
    Sizes,
    mapped_name,
    object_name,
    pair_name,
    stream_name,
)
from cascadefs.bench.targets import CASCADE, HUGE, TITLES

BULK, OBJECTS = 0.95, 0.75  # of raw huge tmpfs


@dataclass(frozen=True)
class Goal:
    """What is wanted of `measure` at `place`. The figure itself is judged, or with `as_ratio` its speed over the reference:
    the same measure (or `over`) at the place `beside`. `paired`: that is the median of the ratios of each repeat's two."""

    measure: str
    limit: float
    as_ratio: bool = False
    beside: str | None = HUGE
    place: str = CASCADE
    over: str | None = None
    paired: bool = False


@dataclass(frozen=True)
class Line:
    """One goal after a run. None: not measured."""

    line: str
    place: str
    unit: str
    figure: float | None
    reference: str | None
    reference_figure: float | None
    ratio: float | None
    target: str
    met: bool | None


def judge(goals: Sequence[Goal], samples: Samples, units: Mapping[str, str]) -> list[Line]:
    """One line for each goal."""
    return [_line(goal, samples, units[goal.measure]) for goal in goals if goal.measure in units]


def _median(samples: Samples, measure: str, place: str | None) -> float | None:
    figures = samples.get((measure, place or ""))
    return statistics.median(figures) if figures else None


def _line(goal: Goal, samples: Samples, unit: str) -> Line:
    figure = _median(samples, goal.measure, goal.place)
    other = _median(samples, goal.over or goal.measure, goal.beside)
    ratio = None if figure is None or other is None else report.speed_ratio(unit, figure, other)
    if ratio is not None and goal.paired:
        pairs = zip(samples[goal.measure, goal.place], samples[goal.over or goal.measure, goal.beside or ""], strict=True)
        ratio = statistics.median(report.speed_ratio(unit, one, two) for one, two in pairs)
    judged, small = (ratio, False) if goal.as_ratio else (figure, unit in LESS_IS_BETTER)
    met = None if judged is None else (judged <= goal.limit if small else judged >= goal.limit)
    sign, suffix = "<=" if small else ">=", " x" if goal.as_ratio else f" {unit}"
    title = None if goal.beside is None else TITLES[goal.beside] + (f", {goal.over}" if goal.over else "")
    target = f"{sign} {goal.limit:,g}{suffix}"
    return Line(goal.measure, TITLES[goal.place], unit, figure, title, other, ratio, target, met)


def scaling(samples: Samples, alone: str, together: str, limit: float) -> Line:
    """How much two processes gain over one, beside how much they gain on raw huge tmpfs."""
    figures = {place: [_median(samples, name, place) for name in (alone, together)] for place in (CASCADE, HUGE)}
    gains = {place: two / one for place, (one, two) in figures.items() if one and two}
    mine, raw = gains.get(CASCADE), gains.get(HUGE)
    ratio = mine / raw if mine and raw else None
    met = None if ratio is None else ratio >= limit
    return Line(f"{together}: gain over 1", TITLES[CASCADE], "x", mine, TITLES[HUGE], raw, ratio, f">= {limit:g} x", met)


def bulk(samples: Samples, sizes: Sizes, units: Mapping[str, str]) -> list[Line]:
    """The goals of `bench io`: bytes at the speed of the memory below."""
    streams = [stream_name(verb, GIB, call) for verb in (WRITE, READ) for call in sizes.calls]
    objects = [object_name(verb, 10 * MIB) for verb in (PUT, GET)]
    goals = [Goal(name, BULK, True) for name in streams] + [Goal(name, OBJECTS, True) for name in objects]
    goals.append(Goal(mapped_name(sizes.mapped), BULK, True))
    pairs = [(stream_name(verb, sizes.streams[-1], MIB), pair_name(verb, sizes.pair)) for verb in (WRITE, READ)]
    gains = [scaling(samples, alone, pair, BULK) for alone, pair in pairs if pair in units]
    return judge(goals, samples, units) + gains


def document(
    found: Sequence[Line], rows: Sequence[report.Row], facts: Mapping[str, object], method: Sequence[str], notes: Sequence[str]
) -> dict[str, object]:
    """The JSON document of one command."""
    return {
        "machine": dict(facts),
        "method": list(method),
        "rows": [asdict(row) for row in rows],
        "lines": [asdict(line) for line in found],
        "notes": list(notes),
    }


def _text(figure: float | None) -> str:
    return "-" if figure is None else report.figure_text(figure)


def table(found: Sequence[Line]) -> Table:
    """One row a goal."""
    drawn = Table(title="lines", caption="ratio: speed over the reference; more is better")
    for heading in ("line", "unit", "figure", "reference", "its figure", "ratio", "target", "met"):
        drawn.add_column(heading, justify="left" if heading in ("line", "reference") else "right")
    words = {True: "yes", False: "NO", None: "not measured"}
    for line in found:
        name = line.line if line.place == TITLES[CASCADE] else f"{line.place}: {line.line}"
        ratio = "-" if line.ratio is None else f"{line.ratio:.2f}"
        figures = (_text(line.figure), line.reference or "-", _text(line.reference_figure), ratio)
        drawn.add_row(name, line.unit, *figures, line.target, words[line.met])
    return drawn


def show(console: Console, rows: Sequence[report.Row], found: Sequence[Line], notes: Sequence[str]) -> None:
    """All figures, then the goals, then what the reader must know."""
    console.print(report.figures_table(rows))
    if found:
        console.print(table(found))
    for note in notes:
        console.print(note, markup=False, highlight=False)
