"""make soak: a mixed load of three times the memory tier, with restarts; prints a table and a verdict, exits 1 when it is bad.

Owns: the load and the limits of the verdict. Each file's content follows from its name and generation, so that every byte can
be checked at any time by any thread. Invariant: nothing is compared with the daemon's own word, only with what was written.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from conftest import MODES, Mount, need_root_and_fuse
from recount import recount
from rich.console import Console
from rich.table import Table

from cascadefs.mount.fuse.device import kernel_release
from cascadefs.mount.keeper import RESEND_SINCE

MIB = 1 << 20
MEMORY_MIB, THREADS, NAMES = 96, 6, 60  # a third of what the files hold
SIZES = (0, 100, 4096, 70_001, MIB, 3 * MIB, 9 * MIB, 25 * MIB)
# SQLite's page cache (64 MiB) and the worker threads with their buffers of 8 MiB come in the first minute and stay.
WARM_S, RSS_GROWTH_MIB, RSS_COLD_GROWTH_MIB, RSS_MAX_MIB, DESCRIPTOR_GROWTH = 120, 32, 128, 320, 8
SAMPLES = 6  # of each epoch
NOISE = random.Random(0).randbytes(max(SIZES) + MIB)
COLUMNS = ("minute", "epoch", "operations", "GiB written", "GiB read", "RSS MiB", "descriptors", "shm MiB", "cold MiB", "wrong")


def content(name: str, generation: int) -> bytes:
    """Half of the generations are shared between names: something to deduplicate."""
    key = f"{generation % 7}" if generation % 2 else f"{name}:{generation}"
    dice = random.Random(key)
    size, start = dice.choice(SIZES), dice.randrange(MIB)
    return (key.encode() + NOISE[start : start + size])[:size]


class Soak:
    """Threads on one mount that stop and go around each restart."""

    def __init__(self, mount: Mount) -> None:
        self.mount, self.folder = mount, mount.path
        self.generations: dict[str, int] = {}
        self.locks = [threading.Lock() for _ in range(NAMES)]
        self.go, self.stop = threading.Event(), threading.Event()
        self.gate = threading.Semaphore(THREADS)
        self.operations = self.written = self.read = 0
        self.wrong: list[str] = []

    def work(self, number: int) -> None:
        dice = random.Random(number)
        while not self.stop.is_set():
            self.go.wait(1)
            if not self.go.is_set():
                continue
            with self.gate:
                at = dice.randrange(NAMES)
                with self.locks[at]:
                    try:
                        self.move(f"f{at}", dice)
                    except OSError as e:
                        self.wrong.append(f"f{at}: {e!r}")
            self.operations += 1

    def move(self, name: str, dice: random.Random) -> None:
        """One operation on a name that is ours now."""
        path, known = self.folder / name, self.generations.get(name)
        kind = dice.random()
        if known is None or kind < 0.25:
            self.generations[name] = generation = (known or dice.randrange(100)) + 1
            data = content(name, generation)
            if kind < 0.1:
                (self.folder / f"{name}.new").write_bytes(data)
                os.rename(self.folder / f"{name}.new", path)
            else:
                path.write_bytes(data)
            self.written += len(data)
        elif kind < 0.28:
            path.unlink()
            del self.generations[name]
        elif kind < 0.31:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        else:
            self.check(name)

    def check(self, name: str) -> None:
        data = (self.folder / name).read_bytes()
        self.read += len(data)
        if data != content(name, self.generations[name]):
            self.wrong.append(f"{name}: {len(data)} bytes are not those of generation {self.generations[name]}")

    def pause(self) -> None:
        """Every thread is outside of an operation afterwards."""
        self.go.clear()
        for _ in range(THREADS):
            self.gate.acquire()

    def resume(self) -> None:
        for _ in range(THREADS):
            self.gate.release()
        self.go.set()

    def check_all(self) -> None:
        """Nobody else works; names that are gone stay gone."""
        for name in list(self.generations):
            self.check(name)
        names = {path.name for path in self.folder.iterdir()}
        if names != set(self.generations):
            self.wrong.append(f"names differ: {sorted(names ^ set(self.generations))[:5]}")


def told(mount: Mount) -> dict[str, Any]:
    """What the mount says of itself."""
    return json.loads((mount.path / ".cascade/stats").read_text())


def figures(mount: Mount) -> tuple[int, int, float, float]:
    """(RSS in MiB, descriptors, MiB in memory, MiB cold) of the worker."""
    stats = told(mount)
    pid = stats["worker_pid"]
    rss = next(
        int(line.split()[1]) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    tiers = stats["tiers"]
    return rss // 1024, len(os.listdir(f"/proc/{pid}/fd")), tiers["shm"]["used_bytes"] / MIB, tiers["cold"]["used_bytes"] / MIB


def restart(soak: Soak, epoch: int) -> None:
    """By turns: SIGKILL of the worker under load (where a keeper brings it back), a warm and a cold mount."""
    kind = ("kill", "warm", "cold")[epoch % 3]
    if kind == "kill" and kernel_release() >= RESEND_SINCE:
        kill_worker(soak)
        return
    soak.pause()
    soak.mount.stop(*(["--drop-memory"] if kind == "cold" else []))
    soak.wrong += recount(soak.mount.store, soak.mount.memory)
    soak.mount.start()
    soak.check_all()
    soak.resume()


def kill_worker(soak: Soak) -> None:
    """Nobody pauses, and the next worker answers."""
    before = told(soak.mount)
    os.kill(before["worker_pid"], signal.SIGKILL)
    after = told(soak.mount)
    if after["worker_pid"] == before["worker_pid"] or after["restarts"] != before["restarts"] + 1:
        soak.wrong.append(f"worker {before['worker_pid']} was killed and counted as {after['restarts']} restarts")


def run(mount: Mount, seconds: float) -> tuple[list[tuple[object, ...]], list[str]]:
    """(rows of the table, what is wrong)."""
    soak, rows, began = Soak(mount), list[tuple[object, ...]](), time.monotonic()
    threads = [threading.Thread(target=soak.work, args=(n,), daemon=True) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    soak.go.set()
    epochs = 4  # each kind of restart once
    for epoch in range(epochs):
        for sample in range(1, SAMPLES + 1):
            end = began + seconds * (epoch + sample / SAMPLES) / epochs
            while time.monotonic() < end and not soak.wrong:
                time.sleep(0.2)
            used = figures(mount)
            gib = [round(count / MIB / 1024, 2) for count in (soak.written, soak.read)]
            minute = round((time.monotonic() - began) / 60, 1)
            rows.append(
                (minute, epoch, soak.operations, *gib, used[0], used[1], round(used[2]), round(used[3]), len(soak.wrong))
            )
        if soak.wrong:
            break
        if epoch < epochs - 1:
            restart(soak, epoch)
    soak.pause()
    soak.stop.set()
    soak.check_all()
    return rows, soak.wrong + grown(rows, warm=seconds / epochs >= WARM_S)


def grown(rows: list[tuple[object, ...]], warm: bool) -> list[str]:
    """Inside each epoch (one process) the second half may not need more than the first, but for the allowance."""
    complaints = [f"RSS {row[5]} MiB" for row in rows if int(str(row[5])) > RSS_MAX_MIB]
    rss_growth = RSS_GROWTH_MIB if warm else RSS_COLD_GROWTH_MIB
    for epoch in {row[1] for row in rows}:
        for column, limit in ((5, rss_growth), (6, DESCRIPTOR_GROWTH)):
            series = [int(str(row[column])) for row in rows if row[1] == epoch]
            half = SAMPLES // 2
            if len(series) == SAMPLES and min(series[half:]) > max(series[:half]) + limit:
                complaints.append(f"{COLUMNS[column]} grew in epoch {epoch}: {series}")
    return complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--mode", choices=list(MODES), default="passthrough")
    given = parser.parse_args()
    need_root_and_fuse()
    base = Path(tempfile.mkdtemp(prefix="cascadefs-soak-"))
    mount = Mount(base, "--shm-size", f"{MEMORY_MIB}MiB", *MODES[given.mode])
    try:
        rows, wrong = run(mount.start(), given.seconds)
        mount.stop()
        wrong += recount(mount.store, mount.memory)
    finally:
        mount.clean()
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=140).print(table)
    for complaint in wrong[:20]:
        print("WRONG:", complaint)
    if not wrong:
        shutil.rmtree(base)
    print(
        f"{'FAILED' if wrong else 'PASSED'}: {rows[-1][2]} operations, {rows[-1][1]} restarts, {len(wrong)} complaints",
        flush=True,
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
