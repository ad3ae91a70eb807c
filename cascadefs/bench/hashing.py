"""What hashing costs: a burst of writes with deduplication and one without, and the processor time of the worker.

Owns: these measures and their goals. Invariants: (1) The burst's clock stops with its last close: what the daemon does behind
it shows only as far as it slows the writer. (2) Processor time counts until everything is durable.
"""

import os
import time
from functools import partial
from pathlib import Path

from cascadefs.bench import io
from cascadefs.bench.io import GIB, MIB, Figures, Kit, Measure, Place
from cascadefs.bench.lines import Goal
from cascadefs.bench.targets import CASCADE, NO_DEDUP, Mounted

WITHIN = 0.95
CPU_ROW = "processor time of the worker, written and flushed"
METHOD = (
    "burst: files of 64 MiB in 1 MiB calls, one after the other, each under a fresh name: all bytes over the time in open,"
    " write and close. dedup off is a mount with that setting: it shares no content, but fingerprints blocks all the same,"
    " because they are what reads from the cold tier are verified with.",
    "processor time: utime + stime of the worker (/proc/PID/stat) from before the burst until a flush has returned, per GiB"
    " written: sealing, hashing, packing and writing to the extents.",
    "One run, all places one after the other, the order rotating with the repeat; medians over the repeats.",
)


def burst_name(size: int) -> str:
    """The row of a burst."""
    return f"burst of {io.size_text(size)}"


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _burst(size: int, place: Place, kit: Kit) -> Figures:
    pid = place.status()["worker_pid"] if isinstance(place, Mounted) else None
    before, spent = cpu_seconds(pid) if pid else 0.0, 0
    with io.scratch(place) as folder:
        for number in range(size // (64 * MIB)):
            spent += io.write_file(folder / str(number), kit.source, 64 * MIB, MIB)
        place.settle()
        used = cpu_seconds(pid) - before if pid else 0.0
    time.sleep(0.1)  # the unlinks are answered, their work behind is not the next place's
    figures = {burst_name(size): size * 1e9 / spent / io.GB}
    return figures | ({CPU_ROW: used * GIB / size} if pid else {})


def measures(size: int) -> list[Measure]:
    """The burst."""
    return [Measure({burst_name(size): io.RATE_GB, CPU_ROW: io.CPU}, partial(_burst, size))]


def goals(size: int) -> list[Goal]:
    """Deduplication costs the writer next to nothing; of the processor time there is no goal, only a figure."""
    return [Goal(burst_name(size), WITHIN, True, NO_DEDUP, CASCADE)]
