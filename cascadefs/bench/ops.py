"""Round trips: how long one small operation takes, and how many there are in a second.

Owns: these measures and their goals. Does not know what filesystem a directory is on. Invariants:
(1) A stat here asks whoever serves the directory: statx with AT_STATX_FORCE_SYNC is not answered from the kernel's cache.
(2) A name that is looked up in vain is a new one each time: no negative entry of the kernel's answers.
"""

import ctypes
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cascadefs.bench import io
from cascadefs.bench.io import KIB, MIB, Figures, Kit, Measure, Place
from cascadefs.bench.lines import Goal

ASKED_STAT, ABSENT = "stat, asked of the filesystem", "lookup of an absent name"
AT_FDCWD, AT_STATX_FORCE_SYNC, STATX_BASIC_STATS = -100, 0x2000, 0x7FF
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
METHOD = (
    "open + close: the same settled 64 KiB file, for reading. stat: statx(AT_STATX_FORCE_SYNC) of that file. Absent names:"
    " statx of a name that never was, a new one each time. put: a fresh name, one write, close; get: the first read of each."
    " These are medians over many, in microseconds, with 1 to 2 us of Python in each.",
    "create: open(O_CREAT|O_EXCL) and close of empty files, one after the other; unlink: of the same files.",
    "list + stat: os.scandir and DirEntry.stat of every name. The first time with what the kernel knows of the names from their"
    " creation, the second after it was told to forget (drop_caches, root only): then the filesystem is asked.",
    "list: os.listdir, again after the first of those, and once more when the kernel has forgotten everything.",
    "One run, all places one after the other, the order rotating with the repeat; medians over the repeats.",
)


@dataclass(frozen=True)
class Counts:
    """How many of each."""

    single: int = 2000  # open + close, stat, absent names
    objects: int = 200
    created: int = 2000
    listed: int = 100_000


FULL, QUICK, WARM_UP = Counts(), Counts(200, 20, 200, 500), Counts(20, 2, 20, 20)


def listed_name(count: int, forgotten: bool) -> str:
    """The row of a listing."""
    return f"list + stat {count:,} names" + (", forgotten before" if forgotten else "")


def names_name(count: int, forgotten: bool) -> str:
    """The row of a listing that looks at nothing."""
    return f"list {count:,} names" + (", forgotten before" if forgotten else " again")


class Statx:
    """statx(2) on paths made ready in advance."""

    def __init__(self) -> None:
        self._call = ctypes.CDLL(None, use_errno=True).statx
        self._call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
        self._answer = ctypes.create_string_buffer(256)

    def __call__(self, path: bytes) -> bool:
        """Whether there is such a file."""
        return not self._call(AT_FDCWD, path, AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, self._answer)


def median_us(action: Callable[[bytes], object], paths: list[bytes]) -> float:
    """Of one call."""
    spent = []
    for path in paths:
        start = time.perf_counter_ns()
        action(path)
        spent.append(time.perf_counter_ns() - start)
    return statistics.median(spent) / 1e3


def _lookups(count: int, place: Place, kit: Kit) -> Figures:
    statx = Statx()
    with io.scratch(place) as folder:
        path = os.fsencode(folder / "f")
        io.write_file(folder / "f", kit.source, 64 * KIB, 64 * KIB)
        place.settle()
        asked = median_us(statx, [path] * count)
        absent = median_us(statx, [path + b"%d" % i for i in range(count)])
    return {ASKED_STAT: asked, ABSENT: absent}


def _names(count: int, place: Place, kit: Kit) -> Figures:
    with io.scratch(place) as folder:
        paths = [f"{folder}/{i:06d}" for i in range(count)]
        created = io.rate(io.make_empty, paths)
        place.settle()
        return {io.CREATE: created, io.UNLINK: io.rate(os.unlink, paths)}


def list_all(folder: Path) -> float:
    """Names per second of a listing that looks at each."""
    start, count = time.perf_counter(), 0
    with os.scandir(folder) as entries:
        for entry in entries:
            entry.stat(follow_symlinks=False)
            count += 1
    return count / (time.perf_counter() - start)


def list_names(folder: Path) -> float:
    """Names per second of a listing that looks at none."""
    start = time.perf_counter()
    return len(os.listdir(folder)) / (time.perf_counter() - start)


def _listing(count: int, forget: bool, place: Place, kit: Kit) -> Figures:
    with io.scratch(place) as folder:
        for i in range(count):
            io.make_empty(f"{folder}/{i:06d}")
        place.settle()
        figures = {listed_name(count, False): list_all(folder), names_name(count, False): list_names(folder)}
        for row, measured in ((listed_name, list_all), (names_name, list_names)) if forget else ():
            DROP_CACHES.write_text("2")
            figures[row(count, True)] = measured(folder)
    place.settle()
    return figures


def measures(counts: Counts) -> list[Measure]:
    """All but the listing."""
    objects = {io.object_name(verb, 64 * KIB): io.MICROS for verb in (io.PUT, io.GET)}
    return [
        Measure({io.OPEN: io.MICROS}, partial(io.opens, counts.single)),
        Measure({ASKED_STAT: io.MICROS, ABSENT: io.MICROS}, partial(_lookups, counts.single)),
        Measure(objects, partial(io.objects_of, 64 * KIB, counts.objects)),
        Measure({io.CREATE: io.PER_S, io.UNLINK: io.PER_S}, partial(_names, counts.created)),
    ]


def listings(counts: Counts) -> list[Measure]:
    """The listing: it takes minutes, nearly all of them to make the files."""
    forget = os.access(DROP_CACHES, os.W_OK)
    names = [row(counts.listed, forgotten) for forgotten in (False, True)[: 1 + forget] for row in (listed_name, names_name)]
    return [Measure(dict.fromkeys(names, io.PER_S), partial(_listing, counts.listed, forget))]


def goals(counts: Counts) -> list[Goal]:
    """Figures for a machine of two cores at 2 to 3 GHz."""
    return [
        Goal(io.OPEN, 14),
        Goal(ASKED_STAT, 9),
        Goal(ABSENT, 9),
        Goal(io.object_name(io.PUT, 64 * KIB), 90),
        Goal(io.object_name(io.GET, 64 * KIB), 25),
        Goal(io.CREATE, 15_000),
        Goal(io.UNLINK, 15_000),
        Goal(listed_name(counts.listed, False), 200_000),
        Goal(listed_name(counts.listed, True), 200_000),
        Goal(names_name(counts.listed, False), 1_000_000),
    ]


BALLAST_BYTES = 256 * MIB
