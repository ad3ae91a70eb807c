"""Single bits flipped all over a small store, each judged by the whole of fsck; a process for each core.

Owns: which bytes are flipped and the processes. Knows two copies of a store: `closed`, every byte of whose files counts, and
`killed`, of which the WAL is flipped, because a closed store has none. Invariants: (1) Each process flips in copies of its own,
in memory: a flip must not wait for a disk. (2) A flip is undone before the next: what is found is found by that bit alone.
"""

import multiprocessing
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from stores import flip, move_in

from cascadefs.integrity import fsck
from cascadefs.metadata.page_sums import FRAME_HEADER, WAL_HEADER, read_wal

Spot = tuple[str, str, int]  # the copy, the file in it, the bit
# No content of a store: blocks without data, the log, and the mark of the boot, of which any other value means "do not trust".
# A closed store has no ring of creates.
NOT_CHECKED = ("reserve", "cascadefs.log", "boot", "memory.json", "record")  # the last two are believed when they agree only


def region(spot: Spot) -> str:
    """The file of a spot, for people."""
    folder, _, name = spot[1].rpartition("/")
    return "copies in memory" if folder.startswith("shm/") else name


def judged(base: Path) -> int:
    """fsck's exit code for one copy; the memory tier lies beside the store."""
    return fsck.run(base / "store", base / "shm", False, lambda what, done, total: None).exit_code


def spots(base: Path, dice: random.Random) -> list[Spot]:
    """One bit of each byte, in a random order."""
    found = [("closed", name, size) for name, size in _sizes(base / "closed") if Path(name).name not in NOT_CHECKED]
    wal = "store/index.db-wal"
    seen = read_wal((base / "killed" / wal).read_bytes())  # behind the last transaction there are older frames
    found.append(("killed", wal, WAL_HEADER + seen.committed * (FRAME_HEADER + seen.page_bytes)))
    chosen = [(copy, name, 8 * byte + dice.randrange(8)) for copy, name, size in found for byte in range(size)]
    dice.shuffle(chosen)
    return chosen


def _sizes(base: Path) -> Iterator[tuple[str, int]]:
    for path in sorted(base.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(base)), path.stat().st_size


def unnoticed(base: Path, chosen: list[Spot]) -> list[Spot]:
    """Those flips that fsck does not call damage; done one after the other in copies of our own."""
    with tempfile.TemporaryDirectory(prefix="cascadefs-flips-", dir="/dev/shm") as folder:
        own = Path(folder)
        for copy in ("closed", "killed"):
            shutil.copytree(base / copy, own / copy, ignore=shutil.ignore_patterns("reserve"))
            move_in(own / copy / "store", own / copy / "shm")
            assert judged(own / copy) == fsck.CLEAN, copy
        missed = []
        for spot in chosen:
            copy, name, bit = spot
            flip(own / copy / name, bit)
            if judged(own / copy) != fsck.DAMAGED:
                missed.append(spot)
            flip(own / copy / name, bit)
        assert judged(own / "closed") == judged(own / "killed") == fsck.CLEAN
    return missed


def on_all_cores(base: Path, chosen: list[Spot]) -> list[Spot]:
    """As unnoticed(), shared among as many processes as there are cores."""
    shares = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(shares, multiprocessing.get_context("spawn")) as pool:
        results = pool.map(unnoticed, [base] * shares, [chosen[n::shares] for n in range(shares)])
        return [spot for missed in results for spot in missed]


def summary(chosen: list[Spot], missed: list[Spot]) -> str:
    """How many of how many, in all and for each file."""
    counts, lost = Counter(map(region, chosen)), Counter(map(region, missed))
    parts = ", ".join(f"{name} {count - lost[name]}/{count}" for name, count in sorted(counts.items()))
    return f"{len(chosen) - len(missed)} of {len(chosen)} flips detected ({parts})"
