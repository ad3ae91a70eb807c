"""What a question to another process costs on this machine without any filesystem: the floor of all that asks a daemon.

Owns: this one measure. Both processes are bound: where the scheduler would put them is what changes from run to run.
"""

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

COUNT = 1000
ECHO = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile part := os.read(0, 1): os.write(1, part)\n"


@dataclass(frozen=True)
class RoundTrip:
    """Medians in microseconds of a byte through a pipe to another process and back, Python's part in it: both on one core, and
    each on its own (None where there is only one)."""

    one_core_us: float
    two_cores_us: float | None

    def __str__(self) -> str:
        apart = "" if self.two_cores_us is None else f", {self.two_cores_us:.0f} us across two cores"
        return f"a byte to another process and back takes {self.one_core_us:.1f} us on one core{apart}"


def measured() -> RoundTrip:
    """Takes a fraction of a second. The caller's thread may run where it could before afterwards."""
    cores = sorted(os.sched_getaffinity(0))
    try:
        return RoundTrip(_median_us(cores[0], cores[0]), _median_us(cores[0], cores[1]) if len(cores) > 1 else None)
    finally:
        os.sched_setaffinity(0, cores)


def _median_us(here: int, there: int) -> float:
    os.sched_setaffinity(0, {here})
    spent = []
    with subprocess.Popen([sys.executable, "-c", ECHO, str(there)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as echo:
        assert echo.stdin is not None and echo.stdout is not None
        out, back = echo.stdin.fileno(), echo.stdout.fileno()
        for _ in range(COUNT):
            start = time.perf_counter_ns()
            os.write(out, b"?")
            os.read(back, 1)
            spent.append(time.perf_counter_ns() - start)
        echo.stdin.close()
    return statistics.median(spent) / 1e3
