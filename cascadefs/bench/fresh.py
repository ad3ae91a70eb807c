"""Files that were just written, beside settled ones: open + close, stat, get, alone and while somebody puts; names in vain.

Owns: these measures and their goals. Does not know what filesystem a directory is on. Invariants:
(1) A fresh file is used once, FRESH_NS after its put begins at the latest; a settled one directly after it, so that both meet
    the same company.
(2) A stat asks whoever serves the directory (ops.py). Whoever puts beside is another process.
"""

import errno
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from cascadefs.bench import io
from cascadefs.bench.io import KIB, MIB, Figures, Kit, Measure, Place
from cascadefs.bench.lines import Goal
from cascadefs.bench.ops import ASKED_STAT, Statx
from cascadefs.bench.targets import CASCADE, DISK

FRESH_NS = 100_000_000
SIZE = 64 * KIB
BATCH = 16  # files written one after the other, then used
PUTS_S, PUTS_MOST = 0.001, 1500  # a put each millisecond; so many fit the memory tier beside what is measured
GET = io.object_name(io.GET, SIZE)
RENAMED, UNMOVED = "stat after write + rename", "stat of a settled file after write + rename"
NEW, AGAIN = "lookup of 1,000 absent names, each", "the same names again, each"
BULK = 1000
TIMES, TAIL = 1 / 1.2, 1 / 3  # of the speed of settled files: medians, 99th percentiles
OF_DISK = 1 / 1.5
METHOD = (
    "fresh: 16 files of 64 KiB are written one after the other, then each is used once, less than 100 ms after its put began;"
    " after each a settled one, written and flushed before. open + close: for reading. stat: statx(AT_STATX_FORCE_SYNC). get:"
    " open, one readv, close. p99: of the same samples. beside puts: another process puts 64 KiB each millisecond.",
    f"{RENAMED}: of the name that a file of 64 KiB was just renamed to; each second time of a settled file instead.",
    "Absent names: os.path.exists of 1,000 new names in one folder, then of the same ones again; the median of several"
    " thousands, beside those of the disk's own filesystem.",
    "One run, all places one after the other, the order rotating with the repeat; medians over the repeats.",
)


@dataclass(frozen=True)
class Counts:
    """How many fresh files of each kind, how many thousands of absent names."""

    files: int = 480
    bulks: int = 5


FULL, QUICK, WARM_UP = Counts(), Counts(160, 2), Counts(BATCH, 1)
SHM_BYTES, BALLAST_BYTES = 256 * MIB, 64 * MIB


def figure_name(action: str, kind: str, beside: bool, tail: bool) -> str:
    """The row of one figure."""
    return f"{action}, {kind}" + (", beside puts" if beside else "") + (", p99" if tail else "")


def _stat(statx: Statx, path: Path) -> None:
    if not statx(os.fsencode(path)):
        raise OSError(errno.ENOENT, "a file that was just written is absent", str(path))


def _open(path: Path) -> None:
    os.close(os.open(path, os.O_RDONLY))


def _actions(kit: Kit) -> dict[str, Callable[[Path], object]]:
    return {
        io.OPEN: _open,
        ASKED_STAT: partial(_stat, Statx()),
        GET: lambda path: io.read_file(path, kit.sink, SIZE, SIZE),
    }


ACTIONS = (io.OPEN, ASKED_STAT, GET)


def timed_ns(action: Callable[[Path], object], path: Path) -> int:
    """Of one call."""
    start = time.perf_counter_ns()
    action(path)
    return time.perf_counter_ns() - start


def _written(folder: Path, kit: Kit, names: Iterator[int], count: int) -> list[Path]:
    paths = [folder / f"{number:06d}" for number in islice(names, count)]
    for path in paths:
        io.write_file(path, kit.source, SIZE, SIZE)
    return paths


@contextmanager
def puts(folder: Path) -> Iterator[None]:
    """Another process puts files there until the block is left."""
    command = [sys.executable, "-m", "cascadefs.bench.fresh", str(folder)]
    root = Path(__file__).parents[2]  # the package is found from there, installed or not
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            if process.stdout.readline() != "ready\n":
                raise OSError(errno.EIO, "the process that puts did not start")
            yield
        finally:
            process.kill()


def _put_for_ever(folder: Path) -> None:
    source = io.Source(SIZE)
    for number in range(PUTS_MOST):
        io.write_file(folder / f"p{number:06d}", source, SIZE, SIZE)
        if not number:
            print("ready", flush=True)
        time.sleep(PUTS_S)


def _use(action: str, count: int, beside: bool, place: Place, kit: Kit) -> Figures:
    use, names = _actions(kit)[action], iter(range(1 << 20))
    spent: dict[str, list[int]] = {"fresh": [], "settled": []}
    with io.scratch(place) as folder:
        settled = _written(folder, kit, names, BATCH)
        place.settle()
        for path in settled:  # what is opened first is opened by others, too
            use(path)
        with puts(folder) if beside else nullcontext():
            while len(spent["fresh"]) < count:
                began = time.perf_counter_ns()
                for path, old in zip(_written(folder, kit, names, BATCH), settled, strict=True):
                    if time.perf_counter_ns() - began < FRESH_NS:
                        spent["fresh"].append(timed_ns(use, path))
                        spent["settled"].append(timed_ns(use, old))
    place.settle()
    return {
        figure_name(action, kind, beside, tail): percentile_us(found, 0.99 if tail else 0.5)
        for kind, found in spent.items()
        for tail in (False, True)
    }


def percentile_us(spent_ns: Sequence[int], share: float) -> float:
    """The smallest that so large a share does not exceed."""
    return sorted(spent_ns)[min(len(spent_ns) - 1, int(len(spent_ns) * share))] / 1e3


def _renamed(count: int, place: Place, kit: Kit) -> Figures:
    spent: dict[str, list[int]] = {RENAMED: [], UNMOVED: []}
    look, names = partial(_stat, Statx()), iter(range(BATCH))
    with io.scratch(place) as folder:
        settled = _written(folder, kit, names, BATCH)
        place.settle()
        for number in range(BATCH, BATCH + count):
            made, path = folder / f".{number:06d}.tmp", folder / f"{number:06d}"
            io.write_file(made, kit.source, SIZE, SIZE)
            made.rename(path)
            if number % 2:
                spent[RENAMED].append(timed_ns(look, path))
            else:
                spent[UNMOVED].append(timed_ns(look, settled[number % BATCH]))
    place.settle()
    return {name: percentile_us(found, 0.5) for name, found in spent.items()}


def _absent(bulks: int, place: Place, kit: Kit) -> Figures:
    found: dict[str, list[float]] = {NEW: [], AGAIN: []}
    with io.scratch(place) as folder:
        for bulk in range(bulks):
            paths = [f"{folder}/{bulk}-{number:016x}" for number in range(BULK)]
            for name in found:
                start = time.perf_counter_ns()
                for path in paths:
                    os.path.exists(path)
                found[name].append((time.perf_counter_ns() - start) / BULK / 1e3)
    return {name: statistics.median(values) for name, values in found.items()}


def measures(counts: Counts) -> list[Measure]:
    """All of them."""
    found = []
    for action in ACTIONS:
        for beside in (False, True):
            names = [figure_name(action, kind, beside, tail) for kind in ("fresh", "settled") for tail in (False, True)]
            found.append(Measure(dict.fromkeys(names, io.MICROS), partial(_use, action, counts.files, beside)))
    found.append(Measure({RENAMED: io.MICROS, UNMOVED: io.MICROS}, partial(_renamed, counts.files)))
    found.append(Measure({NEW: io.MICROS, AGAIN: io.MICROS}, partial(_absent, counts.bulks)))
    return found


def goals() -> list[Goal]:
    """Fresh files as fast as settled ones, absent names nearly as those of the disk's filesystem."""
    found = []
    for action in ACTIONS:
        for beside in (False, True):
            for tail in (False, True):
                name, settled = (figure_name(action, kind, beside, tail) for kind in ("fresh", "settled"))
                found.append(Goal(name, round(TAIL if tail else TIMES, 2), True, CASCADE, over=settled))
    found.append(Goal(RENAMED, round(TIMES, 2), True, CASCADE, over=UNMOVED))
    return found + [Goal(name, round(OF_DISK, 2), True, DISK) for name in (NEW, AGAIN)]


if __name__ == "__main__":
    _put_for_ever(Path(sys.argv[1]))
