"""What a file costs when there are many: time of each operation and memory of the worker at 1k, 10k, 100k ... files.

Owns: the stages, their table and plot. Sets up nothing. Invariants:
(1) One store grows through all stages, so that a stage sees what the earlier ones left behind.
(2) Operations are done on files spread over the whole store, not on those that were made last.
(3) Memory is what the worker holds beyond what it held with no file.
"""

import importlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from cascadefs.bench import ops
from cascadefs.bench.io import KIB
from cascadefs.bench.lines import Line
from cascadefs.bench.report import figure_text
from cascadefs.bench.targets import CASCADE, TITLES, Mounted
from cascadefs.errors import UserError

STAGES = (1_000, 10_000, 100_000, 1_000_000)
SAMPLES = 500
SERIES, APART_S = 7, 0.5  # threads of a virtual machine wake on one core or across two, for seconds; a series takes 0.1 s
FOLDER_FILES = 10_000  # a folder holds so many: what a client's cache of many shards looks like
FLAT, KIB_A_FILE, MOUNT_S = 2.0, 1.5, 5.0
METHOD = (
    "One store grows from stage to stage, in folders of 10,000 files. create: the mean over all files of the stage, one after"
    " the other; stat (AT_STATX_FORCE_SYNC) and open + close: the median over 500 files spread over the store; list: a"
    " folder with os.scandir and DirEntry.stat; unlink: the mean over 500 files made for it, once they are settled.",
    "memory: VmRSS of the worker after a flush, less what it was with no file, over the number of files; all of them have been"
    " created and are known to the kernel. mount: the mount command on the store of the last stage, memory tier kept.",
)


@dataclass(frozen=True)
class Stage:
    """Figures at `files` files; times in microseconds (of `list_us`: for one name)."""

    files: int
    create_us: float
    stat_us: float
    open_us: float
    unlink_us: float
    list_us: float
    rss_kib_a_file: float
    mount_s: float | None = None


TIMES = ("create_us", "stat_us", "open_us", "unlink_us", "list_us")


def stages(up_to: int) -> list[int]:
    """Numbers of files; the last is `up_to` itself."""
    return [*(files for files in STAGES if files < up_to), up_to]


def rss_bytes(pid: int) -> int:
    """Memory that a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * KIB


def _path(root: Path, number: int) -> str:
    return f"{root}/{number // FOLDER_FILES}/{number:07d}"


def _write(path: str, content: bytes) -> None:
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        if content:
            os.write(fd, content)
    finally:
        os.close(fd)


def _usual_us(action: Callable[[bytes], object], paths: list[bytes]) -> float:
    """Of one call: the median of the medians of some series."""
    found = []
    for _ in range(SERIES):
        found.append(ops.median_us(action, paths))
        time.sleep(APART_S)
    return statistics.median(found)


def _open_and_close(path: bytes) -> None:
    os.close(os.open(path, os.O_RDONLY))


def _fill(root: Path, first: int, last: int, file_bytes: int, on_file: Callable[[int], None]) -> float:
    """Make files; microseconds of one. Contents differ, and are made outside the clock."""
    spent = 0
    for number in range(first, last):
        if number % FOLDER_FILES == 0:
            (root / str(number // FOLDER_FILES)).mkdir()
        path, content = _path(root, number), number.to_bytes(8, "little") * (file_bytes // 8)
        start = time.perf_counter_ns()
        _write(path, content)
        spent += time.perf_counter_ns() - start
        if number % 500 == 0:
            on_file(number)
    return spent / (last - first) / 1e3


def _unlink_us(place: Mounted, root: Path, file_bytes: int) -> float:
    folder = root / "unlinked"
    folder.mkdir()
    paths = [f"{folder}/{number}" for number in range(SAMPLES)]
    for path in paths:
        _write(path, os.urandom(file_bytes))
    place.settle()
    start = time.perf_counter_ns()
    for path in paths:
        os.unlink(path)
    spent = (time.perf_counter_ns() - start) / SAMPLES / 1e3
    folder.rmdir()
    return spent


def _stage(place: Mounted, root: Path, files: int, create_us: float, file_bytes: int, empty_bytes: int) -> Stage:
    held = rss_bytes(place.status()["worker_pid"]) - empty_bytes
    spread = [os.fsencode(_path(root, number)) for number in range(0, files, max(1, files // SAMPLES))]
    stat_us, open_us = (_usual_us(action, spread) for action in (ops.Statx(), _open_and_close))
    folders = list(range(-(-files // FOLDER_FILES)))
    rates = [ops.list_all(root / str(number)) for number in folders[:: max(1, len(folders) // 5)]]
    unlink_us = _unlink_us(place, root, file_bytes)
    return Stage(files, create_us, stat_us, open_us, unlink_us, 1e6 / statistics.median(rates), held / KIB / files)


def run(place: Mounted, up_to: int, file_bytes: int, on_step: Callable[[str, int], None]) -> list[Stage]:
    """Grow the store of `place` up to so many files; `on_step` hears what is done and how many files there are."""
    root, found, before = place.folder, list[Stage](), 0
    empty_bytes = rss_bytes(place.status()["worker_pid"])
    for files in stages(up_to):
        create_us = _fill(root, before, files, file_bytes, lambda number: on_step("creating", number))
        on_step(f"measuring at {files:,}", files)
        place.settle()
        found.append(_stage(place, root, files, create_us, file_bytes, empty_bytes))
        before = files
    on_step("mounting again", up_to)
    return [*found[:-1], Stage(**asdict(found[-1]) | {"mount_s": place.remount(False)})]


def judge(found: Sequence[Stage]) -> list[Line]:
    """Flat times, little memory, a quick mount."""
    first, last, title = found[0], found[-1], TITLES[CASCADE]
    flat = [_flat(getattr(first, name), getattr(last, name), name, first.files, last.files) for name in TIMES]
    held = last.rss_kib_a_file
    memory = Line(
        f"memory of the worker per file, {last.files:,} files", title, "KiB", held, None, None, None,
        f"<= {KIB_A_FILE:g} KiB", held <= KIB_A_FILE,
    )  # fmt: skip
    seconds = last.mount_s
    mount = Line(
        f"mount of a store with {last.files:,} files", title, "s", seconds, None, None, None, f"<= {MOUNT_S:g} s",
        None if seconds is None else seconds <= MOUNT_S,
    )  # fmt: skip
    return [*flat, memory, mount]


def _flat(first_us: float, last_us: float, name: str, few: int, many: int) -> Line:
    """A time is flat when it is at most FLAT times that of the smallest store."""
    ratio = first_us / last_us
    what = f"{name.removesuffix('_us')} at {many:,} files"
    target = f">= {1 / FLAT:g} x"
    return Line(what, TITLES[CASCADE], "us", last_us, f"at {few:,} files", first_us, ratio, target, ratio >= 1 / FLAT)


def table(found: Sequence[Stage]) -> Table:
    """One row a stage."""
    drawn = Table(title="growth", caption="times are us for one operation, of list for one name")
    for heading in ("files", "create", "stat", "open + close", "unlink", "list", "KiB of the worker per file", "mount s"):
        drawn.add_column(heading, justify="right")
    for stage in found:
        figures = [figure_text(getattr(stage, name)) for name in (*TIMES, "rss_kib_a_file")]
        drawn.add_row(f"{stage.files:,}", *figures, "" if stage.mount_s is None else f"{stage.mount_s:.2f}")
    return drawn


def plot(found: Sequence[Stage], path: Path) -> None:
    """Times and memory over the number of files, in the format that the name of `path` says."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        pyplot: Any = importlib.import_module("matplotlib.pyplot")
    except ImportError as e:
        raise UserError("a plot needs matplotlib: pip install matplotlib") from e
    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(10, 4))
    files = [stage.files for stage in found]
    for name in TIMES:
        times.plot(files, [getattr(stage, name) for stage in found], "o-", label=name.removesuffix("_us"))
    times.set(xscale="log", yscale="log", xlabel="files", ylabel="us")
    times.legend()
    memory.plot(files, [stage.rss_kib_a_file for stage in found], "o-")
    memory.axhline(KIB_A_FILE, linestyle=":")
    memory.set(xscale="log", yscale="log", xlabel="files", ylabel="KiB of the worker per file")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
