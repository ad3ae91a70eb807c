"""What hashing costs: bursts of writes with what is hashed behind them and without, and the processor time of the worker.

Owns: these measures and their goals. Invariants: (1) The clock stands on open, write and close: what the daemon does behind
shows only as far as it slows the writer. (2) Processor time counts until everything is durable, on both mounts.
"""

import os
import time
from functools import partial
from pathlib import Path

from cascadefs.bench import io
from cascadefs.bench.io import GIB, MIB, Figures, Kit, Measure, Place
from cascadefs.bench.lines import Goal
from cascadefs.bench.targets import CASCADE, UNHASHED, Mounted

WITHIN = 0.95
PAIRS = 7
PAUSE_S = 0.15  # longer than seal_delay and the pause that sealing waits for: the last file is hashed under the next one
CPU_ROW = "processor time of the worker, written and flushed"
METHOD = (
    "burst: files of 64 MiB in 1 MiB calls, one after the other, each under a fresh name: all bytes over the time in open,"
    " write and close. with pauses: the same with 0.15 s between two files, outside the clock, in which the daemon begins to"
    " hash and to write to the disk. seal = flush is a mount with that setting: it does neither before the flush at the end.",
    "processor time: utime + stime of the worker (/proc/PID/stat) from before the burst until a flush has returned, per GiB"
    " written: sealing, hashing, packing and writing to the extents, on both mounts.",
    "One run, all places one after the other, the order rotating with the repeat; medians over the repeats. A line's ratio is"
    " the median over the repeats of the two mounts' ratio.",
)


def burst_name(size: int) -> str:
    """The row of a burst."""
    return f"burst of {io.size_text(size)}"


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def paused_name(size: int) -> str:
    """The row of a burst with pauses."""
    return f"{burst_name(size)}, with pauses"


def _burst(size: int, pause_s: float, place: Place, kit: Kit) -> Figures:
    pid = place.status()["worker_pid"] if isinstance(place, Mounted) else None
    before, spent = cpu_seconds(pid) if pid else 0.0, 0
    with io.scratch(place) as folder:
        for number in range(size // (64 * MIB)):
            spent += io.write_file(folder / str(number), kit.source, 64 * MIB, MIB)
            time.sleep(pause_s)
        place.settle()
        used = cpu_seconds(pid) - before if pid else 0.0
    time.sleep(0.1)  # the unlinks are answered, their work behind is not the next place's
    if pause_s:
        return {paused_name(size): size * 1e9 / spent / io.GB}
    return {burst_name(size): size * 1e9 / spent / io.GB} | ({CPU_ROW: used * GIB / size} if pid else {})


def measures(size: int) -> list[Measure]:
    """The bursts."""
    return [
        Measure({burst_name(size): io.RATE_GB, CPU_ROW: io.CPU}, partial(_burst, size, 0.0)),
        Measure({paused_name(size): io.RATE_GB}, partial(_burst, size, PAUSE_S)),
    ]


def goals(size: int) -> list[Goal]:
    """Hashing costs a burst next to nothing. Processor time, and what writers with pauses notice of hashing and of the writing
    to the disk that follows it, are figures without a goal."""
    return [Goal(burst_name(size), WITHIN, True, UNHASHED, CASCADE, paired=True)]
