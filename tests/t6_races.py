"""Sixteen threads on few names and few contents, while sealing, flushing and eviction run; then everything is counted anew.

Owns: the load, the watchdog, what must be left. `make torture` sets RACE_SECONDS. Invariants: (1) A name under `shared` is only
ever replaced by rename or link, so each reader sees one whole content. (2) A name under `own` is changed by one thread.
"""

import contextlib
import faulthandler
import json
import os
import random
import threading
import time

import pytest
from recount import recount
from twin.calls import Area

KIB = 1024
SECONDS = float(os.environ.get("RACE_SECONDS", "0")) or 3.0
THREADS, SHARED = 16, 24
STUCK_S = 60  # nothing here takes a second; a thread that has not moved for so long hangs
SIZES = (0, 1, 4096, 4097, 20_000, 70_001, 300 * KIB, 5000 * KIB)
CONTENTS = [random.Random(n).randbytes(size) for n, size in enumerate(SIZES * 2)]
WHOLE = set(CONTENTS)


class Load:
    """The threads of one run on one folder."""

    def __init__(self, folder, flush):
        self.folder, self.flush, self.stop = folder, flush, threading.Event()
        self.moved, self.faults, self.done = [time.monotonic()] * THREADS, [], [0] * THREADS
        (folder / "shared").mkdir()
        (folder / "own").mkdir()

    def run(self, seconds):
        """Every thread to its end; AssertionError when one hangs."""
        threads = [threading.Thread(target=self.work, args=(n,), daemon=True) for n in range(THREADS)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        while any(thread.is_alive() for thread in threads):
            if time.monotonic() > end or self.faults:
                self.stop.set()
            stuck = [n for n, thread in enumerate(threads) if thread.is_alive() and time.monotonic() - self.moved[n] > STUCK_S]
            if stuck:
                faulthandler.dump_traceback(all_threads=True)
                raise AssertionError(f"threads {stuck} hang")
            time.sleep(0.05)
        assert not self.faults, self.faults[:3]
        return sum(self.done)

    def work(self, number):
        dice = random.Random(number)
        moves = [self.replace, self.replace, self.link, self.unlink, self.rename, self.read, self.read, self.map_shared]
        moves += [self.own_truncate, self.own_overwrite, self.own_check, self.own_mapped, self.seal, self.sync]
        while not self.stop.is_set():
            move = dice.choice(moves)
            try:
                move(number, dice)
            except FileNotFoundError:
                pass  # another thread was first
            except Exception as e:
                self.faults.append(f"{move.__name__}: {e!r}")
                return
            self.moved[number] = time.monotonic()
            self.done[number] += 1

    def shared(self, dice):
        return self.folder / "shared" / f"s{dice.randrange(SHARED)}"

    def own(self, number, dice):
        return self.folder / "own" / f"t{number}-{dice.randrange(3)}"

    # --- on shared names

    def replace(self, number, dice):
        partial = self.folder / f"new-{number}"
        partial.write_bytes(dice.choice(CONTENTS))
        os.rename(partial, self.shared(dice))

    def link(self, number, dice):
        with contextlib.suppress(FileExistsError):
            os.link(self.shared(dice), self.shared(dice))

    def unlink(self, number, dice):
        self.shared(dice).unlink()

    def rename(self, number, dice):
        os.rename(self.shared(dice), self.shared(dice))

    def read(self, number, dice):
        path = self.shared(dice)
        data = path.read_bytes()
        assert data in WHOLE, f"{path}: {len(data)} bytes that nobody wrote"

    def map_shared(self, number, dice):
        """A mapping whose descriptor is closed still shows one whole content."""
        with open(self.shared(dice), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                return
            area = Area(file.fileno(), size, writable=False)
        time.sleep(dice.random() / 50)
        data = area.read(0, size)
        area.close()
        assert data in WHOLE, f"{size} mapped bytes that nobody wrote"

    # --- on names of one's own

    def own_truncate(self, number, dice):
        path, data = self.own(number, dice), dice.choice(CONTENTS)
        path.write_bytes(data)
        assert path.read_bytes() == data

    def own_overwrite(self, number, dice):
        """In place, over a content that others share."""
        path = self.own(number, dice)
        old, patch = path.read_bytes(), dice.randbytes(100)
        with open(path, "r+b") as file:
            file.write(patch)
        assert path.read_bytes() == patch + old[100:]
        path.write_bytes(dice.choice(CONTENTS))

    def own_mapped(self, number, dice):
        """A writer through a mapping that outlives close(): what it writes afterwards is in the file, sealed or not."""
        path = self.own(number, dice)
        data = dice.choice([c for c in CONTENTS if c])
        with open(path, "w+b") as file:
            file.write(bytes(len(data)))
            file.flush()
            area = Area(file.fileno(), len(data), writable=True)
        time.sleep(dice.random() / 5)
        area.write(0, data)
        area.close()
        assert path.read_bytes() == data

    def own_check(self, number, dice):
        path = self.own(number, dice)
        assert path.read_bytes() in WHOLE

    # --- what moves contents

    def seal(self, number, dice):
        with contextlib.suppress(OSError):
            os.getxattr(self.shared(dice), "user.cascade.hash")

    def sync(self, number, dice):
        if number == 0:
            self.flush()
            return
        fd = os.open(self.shared(dice), os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def flush(mount):
    fd = os.open(mount.path / ".cascade", os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def told(mount):
    return json.loads((mount.path / ".cascade/stats").read_text())


def descriptors(pid):
    """Open files of the daemon but sockets, pipes and its log: backing files, above all."""
    kinds = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    return [kind for kind in kinds if "/staged/" in kind or "/objects/" in kind or ".cfx" in kind]


def wait_until(what, check):
    """Background work is not announced; give it a bounded while."""
    end = time.monotonic() + 30
    while not check():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@pytest.mark.timeout(600 + 3 * SECONDS)
def test_sixteen_threads_leave_nothing_wrong_behind(mount, tmp_path):
    (tmp_path / "toml").write_text('seal_delay = 0.0\npromote_limit = "1MiB"\nextent_size = "16MiB"\nbatch_size = "8MiB"\n')
    mount.options += ("--config", str(tmp_path / "toml"), "--shm-size", "24MiB")
    mount.start()
    moves = Load(mount.path, lambda: flush(mount)).run(SECONDS)
    for path in (mount.path / "shared").iterdir():
        assert path.read_bytes() in WHOLE
    mount.stop()
    assert recount(mount.store, mount.memory) == []
    mount.start()
    pid = mount.status()["worker_pid"]
    for folder in ("shared", "own"):
        for path in (mount.path / folder).iterdir():
            assert path.read_bytes() in WHOLE
            path.unlink()
    for path in mount.path.glob("new-*"):
        path.unlink()
    flush(mount)
    wait_until("grants stay", lambda: told(mount)["granted_opens"] == 0)
    wait_until("descriptors stay open", lambda: len(descriptors(pid)) == told(mount)["spare_files"])
    wait_until("copies stay", lambda: not [*(mount.memory / "objects").iterdir()])
    wait_until("staged files stay", lambda: len([*(mount.memory / "staged").iterdir()]) == told(mount)["spare_files"])
    left = told(mount)
    assert left["files"] == 0 and left["unique_bytes"] == 0 and left["tiers"]["cold"]["live_bytes"] == 0
    mount.stop()
    assert recount(mount.store, mount.memory) == []
    print(f"{moves} moves of {THREADS} threads")
