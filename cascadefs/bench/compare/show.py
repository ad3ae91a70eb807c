"""The tables for people: in the terminal by rich, in Markdown for documents. Owns: headings and the form of a figure."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from cascadefs.bench.compare.rows import FIGURES, Row, against, same_shape, verdict
from cascadefs.bench.io import size_text

SHOWN = ("write", "hot read", "cold read")
PAIRED = tuple(f"x {name}" for name in SHOWN)
HEADINGS = ("system", *SHOWN, "write + flush", "stored", "durable after put", *PAIRED, "cascadefs is")
RATES = ("write_gbs", "read_hot_gbs", "read_cold_gbs", "write_flush_gbs")
TEXT_COLUMNS = {0, 6, 10}


def _rate(row: Row, name: str) -> str:
    """Median, and half of what lies between the smallest and the largest sample."""
    figure = getattr(row, name)
    if figure is None:
        return "-"
    low, high = row.spread[name]
    return f"{figure:.2f} ± {(high - low) / 2:.2f}"


def cells(rows: Sequence[Row], row: Row) -> tuple[str, ...]:
    """One line."""
    if row.status != "measured":
        return (row.title, *[""] * 5, row.durable, *[""] * 3, row.status)
    stored = "-" if row.stored_ratio is None else f"{row.stored_ratio:.2f}"
    ratios = against(rows, row)
    paired = (str(ratios[name]) if name in ratios else "" for name in FIGURES)
    return (row.title, *(_rate(row, name) for name in RATES), stored, row.durable, *paired, verdict(rows, row))


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one shape together: systems first, then references, then what could not run; the fastest hot read first."""
    found: list[list[Row]] = []
    for row in rows:
        home = next((group for group in found if same_shape(group[0], row)), None)
        if home is None:
            found.append(home := [])
        home.append(row)
    for group in found:
        group.sort(key=lambda row: (row.status != "measured", row.reference, -(row.read_hot_gbs or 0)))
    return found


def caption(group: Sequence[Row]) -> str:
    """What a table shows."""
    row = group[0]
    repeats = max(row.repeats for row in group)
    return (
        f"{row.preset}: {row.ranks} ranks x {row.blocks} blocks of {size_text(row.block_bytes)},"
        f" {row.duplicates:.0%} of them not unique; GB/s, medians of {repeats} ± half of their span;"
        f" stored: bytes occupied over bytes put; x: cascadefs over it in the same repeat, median and 95 % interval"
    )


def terminal(console: Console, rows: Sequence[Row], notes: Sequence[str]) -> None:
    """All tables, then the notes."""
    for group in groups(rows):
        drawn = Table(title=caption(group))
        for number, heading in enumerate(HEADINGS):
            drawn.add_column(heading, justify="left" if number in TEXT_COLUMNS else "right")
        for row in group:
            style = "bold" if row.system.startswith("cascadefs") else "dim" if row.reference else None
            drawn.add_row(*cells(group, row), style=style)
        console.print(drawn)
    for note in notes:
        console.print(note, markup=False, highlight=False)


def markdown(rows: Sequence[Row]) -> str:
    """The same tables, to be pasted into a document."""
    parts = []
    for group in groups(rows):
        rule = "|".join("---" if number in TEXT_COLUMNS else "--:" for number in range(len(HEADINGS)))
        lines = ["| " + " | ".join(cells(group, row)) + " |" for row in group]
        parts.append("\n".join([caption(group), "", "| " + " | ".join(HEADINGS) + " |", f"|{rule}|", *lines]))
    return "\n\n".join(parts) + "\n"
