"""Plots of a run by matplotlib, each as PNG and SVG: write, hot read, cold read, all three, scaling, dedup.

Owns: what is drawn from which rows. Does not measure. matplotlib is imported only here, and only when plots are asked for.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cascadefs.bench.compare.rows import FAMILY, WORDS, Row
from cascadefs.bench.compare.show import groups
from cascadefs.bench.io import MIB
from cascadefs.errors import UserError

OURS, OTHERS, RAW = "#d1495b", "#30638e", "#b0b0b0"
LINES_MAX = 10  # more curves cannot be told apart


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


def curves(plt: Any, table: Sequence[Row], figure: str, along: Callable[[Row], float], axis_text: str) -> Any:
    """One line a system: those of our own, then the fastest others."""
    names = dict.fromkeys(row.system for row in sorted(table, key=lambda row: -(getattr(row, figure) or 0)))
    chosen = sorted(names, key=lambda name: not name.startswith(FAMILY))[:LINES_MAX]
    drawn, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in chosen:
        points = sorted((along(row), getattr(row, figure)) for row in table if row.system == name and getattr(row, figure))
        if points:
            title = next(row.title for row in table if row.system == name)
            width = 2.5 if name.startswith(FAMILY) else 1.2
            axes.plot(*zip(*points, strict=True), marker="o", label=title, linewidth=width)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(axis_text)
    axes.set_ylabel(f"{WORDS.get(figure, figure)}, GB/s")
    axes.legend(fontsize=8)
    return drawn


def _save(plt: Any, drawn: Any, folder: Path, name: str) -> str:
    for kind in ("png", "svg"):
        drawn.savefig(folder / f"{name}.{kind}", dpi=110, metadata={"Date": None} if kind == "svg" else None)
    plt.close(drawn)
    return f"drawn: {folder / name}.png, .svg"


def _most_common(table: Sequence[Row], fixed: Callable[[Row], object], varying: Callable[[Row], object]) -> list[Row]:
    """The rows that agree in `fixed` and have the most values of `varying`."""
    kinds: dict[object, list[Row]] = {}
    for row in table:
        kinds.setdefault(fixed(row), []).append(row)
    return max(kinds.values(), key=lambda rows: len({varying(row) for row in rows}))


def _scaling(plt: Any, table: Sequence[Row], folder: Path) -> list[str]:
    by_ranks = _most_common(table, lambda row: (row.tokens, row.duplicates), lambda row: row.ranks)
    by_block = _most_common(table, lambda row: (row.ranks, row.duplicates), lambda row: row.tokens)
    lines = []
    for figure in ("write_gbs", "read_hot_gbs"):
        short = figure.removesuffix("_gbs")
        if len({row.ranks for row in by_ranks}) > 1:
            drawn = curves(plt, by_ranks, figure, lambda row: row.ranks, "ranks")
            lines.append(_save(plt, drawn, folder, f"ranks-{short}"))
        if len({row.tokens for row in by_block}) > 1:
            drawn = curves(plt, by_block, figure, lambda row: row.block_bytes / MIB, "MiB a block")
            lines.append(_save(plt, drawn, folder, f"blocks-{short}"))
    return lines


def draw(table: Sequence[Row], folder: Path) -> list[str]:
    """All plots that the rows allow; one line for each."""
    plt = _matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    measured, lines = [row for row in table if row.status == "measured"], []
    if not measured:
        return ["nothing to draw: no system was measured"]
    shapes = groups(measured)
    wanted = {**{name: f"{word}, GB/s" for name, word in WORDS.items()}, "stored_ratio": "bytes occupied over bytes put"}
    for group in shapes:
        row = group[0]
        suffix = f"-{row.ranks}x{row.tokens}-{row.duplicates:g}" if len(shapes) > 1 else ""
        lines.append(_save(plt, overview(plt, group), folder, "overview" + suffix))
        for figure, text in wanted.items():
            if any(getattr(row, figure) for row in group):
                name = "dedup" if figure == "stored_ratio" else figure.removesuffix("_gbs").replace("_", "-")
                lines.append(_save(plt, bars(plt, group, figure, text), folder, name + suffix))
    return lines + _scaling(plt, measured, folder)
