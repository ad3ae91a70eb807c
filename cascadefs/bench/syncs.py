"""Small syncs of large open files: a few pages change, then fsync, again and again.

Owns: these measures and their goals. Does not know what filesystem a directory is on. Invariant: the clock is on the writes and
the fsync, after a few syncs by which whoever learns from them has learnt.
"""

import os
import random
import time
from functools import partial
from pathlib import Path

from cascadefs.bench import io
from cascadefs.bench.fresh import percentile_us
from cascadefs.bench.io import KIB, MIB, Figures, Kit, Measure, Place
from cascadefs.bench.lines import Goal
from cascadefs.bench.targets import DISK

SIZE, PAGE, MANY = 64 * MIB, 4 * KIB, 64
ONE, SOME = "4 KiB + fsync in 64 MiB", f"{MANY} x 4 KiB + fsync in 64 MiB"
OWN = "4 KiB + fsync in 64 MiB, by who made it"
FULL, QUICK, WARM_UP = 60, 20, 2
ONE_US, OF_DISK = 1000, 0.5
SHM_BYTES = 512 * MIB  # of the memory tier: one file and what was before it, without pressure
METHOD = (
    "fsync: os.pwrite of 4 KiB at random places of a file of 64 MiB and os.fsync. The file was written and closed before, and"
    " is opened for reading and writing; by who made it: by the same descriptor."
)


def _synced_us(fd: int, pages: int, count: int) -> float:
    """Median of `count` syncs of so many pages each."""
    chance, data, spent = random.Random(count), os.urandom(PAGE), list[int]()
    for turn in range(-5, count):
        places = [chance.randrange(SIZE // PAGE) * PAGE for _ in range(pages)]
        start = time.perf_counter_ns()
        for at in places:
            os.pwrite(fd, data, at)
        os.fsync(fd)
        if turn >= 0:
            spent.append(time.perf_counter_ns() - start)
    return percentile_us(spent, 0.5)


def _updated(count: int, place: Place, kit: Kit) -> Figures:
    with io.scratch(place) as folder:
        path = folder / "updated"
        io.write_file(path, kit.source, SIZE, MIB)
        place.settle()
        figures = {name: _of_opened(path, pages, count) for name, pages in ((ONE, 1), (SOME, MANY))}
    place.settle()
    return figures


def _of_opened(path: Path, pages: int, count: int) -> float:
    fd = os.open(path, os.O_RDWR)
    try:
        return _synced_us(fd, pages, count)
    finally:
        os.close(fd)


def _made(count: int, place: Place, kit: Kit) -> Figures:
    with io.scratch(place) as folder:
        fd = os.open(folder / "made", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            for at in range(0, SIZE, MIB):
                os.pwrite(fd, os.urandom(MIB), at)
            found = _synced_us(fd, 1, count)
        finally:
            os.close(fd)
    place.settle()
    return {OWN: found}


def measures(count: int) -> list[Measure]:
    """All of them."""
    names = (ONE, SOME)
    return [
        Measure(dict.fromkeys(names, io.MICROS), partial(_updated, count)),
        Measure({OWN: io.MICROS}, partial(_made, count)),
    ]


def goals() -> list[Goal]:
    """A millisecond, as one sync of the disk and the way there take; many pages at half the disk's speed."""
    return [Goal(ONE, ONE_US, beside=DISK), Goal(SOME, OF_DISK, True, DISK), Goal(OWN, ONE_US, beside=DISK)]
