"""Plots of a run by matplotlib, each as PNG and SVG: write, hot read, cold read, all three, scaling, dedup.

Owns: what is drawn from which rows. Does not measure. matplotlib is imported only here, and only when plots are asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascadefs.bench.compare.rows import FAMILY, WORDS, Row
from cascadefs.bench.compare.show import groups
from cascadefs.bench.io import MIB
from cascadefs.errors import UserError

OURS, OTHERS, RAW = "#d1495b", "#30638e", "#b0b0b0"
LINES_MAX = 10  # more curves cannot be told apart
TEXTS = {name: f"{word}, GB/s" for name, word in WORDS.items()} | {"stored_ratio": "bytes occupied over bytes put"}
NAMES = {"write_gbs": "write", "read_hot_gbs": "read-hot", "read_cold_gbs": "read-cold", "stored_ratio": "dedup"}


@dataclass(frozen=True)
class Along:
    """What a curve runs along, and which figures are drawn so."""

    name: str
    text: str
    of: Callable[[Row], float]
    figures: tuple[str, ...] = tuple(WORDS)


ALONGS = (
    Along("ranks", "ranks", lambda row: row.ranks),
    Along("blocks", "MiB a block", lambda row: row.block_bytes / MIB),
    Along("duplicates", "share of blocks that are not unique", lambda row: row.duplicates, ("stored_ratio",)),
)


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as why:
        raise UserError("plots need matplotlib: make bench-deps") from why
    matplotlib.use("agg")
    # Text as text, no date, fixed ids: a small SVG that changes only where the figures do.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "cascadefs"})
    import matplotlib.pyplot as plt

    return plt


def _colour(row: Row) -> str:
    return OURS if row.system.startswith(FAMILY) else RAW if row.reference else OTHERS


def _panel(axes: Any, shown: Sequence[Row], figure: str, axis_text: str) -> None:
    """One bar a system; a whisker from the smallest to the largest sample. A system without the figure has no bar."""
    values = [getattr(row, figure) or 0.0 for row in shown]
    spans = [row.spread.get(figure, (value, value)) for row, value in zip(shown, values, strict=True)]
    whiskers = [
        [value - low for value, (low, _) in zip(values, spans, strict=True)],
        [high - value for value, (_, high) in zip(values, spans, strict=True)],
    ]
    axes.barh([row.title for row in shown], values, xerr=whiskers, color=[_colour(row) for row in shown], ecolor="#444444")
    axes.set_xlabel(axis_text)
    axes.margins(y=0.01)


def _title(row: Row) -> str:
    return f"{row.ranks} ranks, blocks of {row.block_bytes / MIB:g} MiB"


def bars(plt: Any, group: Sequence[Row], figure: str, axis_text: str) -> Any:
    """One figure of all systems, the highest on top."""
    shown = sorted((row for row in group if getattr(row, figure)), key=lambda row: float(getattr(row, figure)))
    drawn, axes = plt.subplots(figsize=(8, 0.32 * len(shown) + 1.2), layout="constrained")
    _panel(axes, shown, figure, axis_text)
    if figure == "stored_ratio":
        axes.axvline(group[0].unique_ratio, color="#444444", linestyle="--", label="each content once")
        axes.legend(loc="lower right", fontsize=8)
    axes.set_title(_title(group[0]), fontsize=10)
    return drawn


def overview(plt: Any, group: Sequence[Row]) -> Any:
    """Write, hot read and cold read side by side, in the order of hot reads."""
    shown = sorted(group, key=lambda row: row.read_hot_gbs or 0)
    drawn, panels = plt.subplots(1, 3, sharey=True, figsize=(11, 0.28 * len(shown) + 1.2), layout="constrained")
    for axes, (figure, word) in zip(panels, WORDS.items(), strict=True):
        _panel(axes, shown, figure, f"{word}, GB/s")
    drawn.suptitle(_title(group[0]), fontsize=10)
    return drawn


def curves(plt: Any, table: Sequence[Row], figure: str, along: Along) -> Any:
    """One line a system: those of our own, then those with the highest figures."""
    names = dict.fromkeys(row.system for row in sorted(table, key=lambda row: -(getattr(row, figure) or 0)))
    chosen = sorted(names, key=lambda name: not name.startswith(FAMILY))[:LINES_MAX]
    drawn, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    for name in chosen:
        points = sorted((along.of(row), getattr(row, figure)) for row in table if row.system == name and getattr(row, figure))
        if points:
            title = next(row.title for row in table if row.system == name)
            width = 2.5 if name.startswith(FAMILY) else 1.2
            axes.plot(*zip(*points, strict=True), marker="o", label=title, linewidth=width)
    if along.name == "duplicates":
        points = sorted({(row.duplicates, row.unique_ratio) for row in table})
        axes.plot(*zip(*points, strict=True), color="#444444", linestyle="--", label="each content once")
    else:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(along.text)
    axes.set_ylabel(TEXTS[figure])
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return drawn


def _save(plt: Any, drawn: Any, folder: Path, name: str) -> str:
    for kind in ("png", "svg"):
        drawn.savefig(folder / f"{name}.{kind}", dpi=110, metadata={"Date": None} if kind == "svg" else None)
    plt.close(drawn)
    return f"drawn: {folder / name}.png, .svg"


def _varied(table: Sequence[Row], along: Along) -> list[Row]:
    """Rows that differ in this one respect only; of several such sets the one with the most values."""
    kinds: dict[object, list[Row]] = {}
    for row in table:
        fixed = tuple(other.of(row) for other in ALONGS if other is not along)
        kinds.setdefault(fixed, []).append(row)
    return max(kinds.values(), key=lambda rows: len({along.of(row) for row in rows}))


def _all_curves(plt: Any, table: Sequence[Row], folder: Path) -> list[str]:
    lines = []
    for along in ALONGS:
        rows = _varied(table, along)
        for figure in along.figures if len({along.of(row) for row in rows}) > 1 else ():
            lines.append(_save(plt, curves(plt, rows, figure, along), folder, f"{along.name}-{NAMES[figure]}"))
    return lines


def _all_bars(plt: Any, group: Sequence[Row], folder: Path) -> list[str]:
    shown = [figure for figure in TEXTS if any(getattr(row, figure) for row in group)]
    return [_save(plt, bars(plt, group, figure, TEXTS[figure]), folder, NAMES[figure]) for figure in shown]


def draw(table: Sequence[Row], folder: Path) -> list[str]:
    """Of one shape each figure by itself; of several an overview of each and the curves. One line for each plot."""
    plt = _matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    measured = [row for row in table if row.status == "measured"]
    if not measured:
        return ["nothing to draw: no system was measured"]
    shapes = groups(measured)
    if len(shapes) == 1:
        return [_save(plt, overview(plt, shapes[0]), folder, "overview"), *_all_bars(plt, shapes[0], folder)]
    lines = []
    for group in shapes:
        row = group[0]
        name = f"overview-{row.ranks}-ranks-{row.tokens}-tokens-{row.duplicates:.0%}".removesuffix("%")
        lines.append(_save(plt, overview(plt, group), folder, name))
    return lines + _all_curves(plt, measured, folder)
