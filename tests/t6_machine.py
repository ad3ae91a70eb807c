"""A random walk over a live mount and a tmpfs: no result, errno, byte or attribute may differ (tests/twin).

`make test` runs a short walk that is the same each time; `make torture` sets TORTURE_STEPS for a long one with new choices.
"""

import contextlib
import json
import os
import signal
import subprocess
import time

import pytest
from conftest import MODES, Mount, need_root_and_fuse
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from twin.machine import Walk

from cascadefs.mount.fuse.device import kernel_release
from cascadefs.mount.keeper import RESEND_SINCE

MIB = 1 << 20
TORTURE_STEPS = int(os.environ.get("TORTURE_STEPS", "0"))
SEED = int(os.environ.get("TORTURE_SEED", "") or time.time_ns() % 1_000_000)
SHORT_STEPS, STEPS_PER_EXAMPLE = 800, 100
# Sealed at once, streamed from 1 MiB on, extents sealed after two blocks: a short walk meets every state of a file.
CONFIG = 'shm_size = "16MiB"\nseal_delay = 0.0\npromote_limit = "1MiB"\nextent_size = "8MiB"\nbatch_size = "4MiB"\n'
SETTLE_S = 0.12  # sealing waits for 30 ms without an open or close


class Plant:
    """One mount and one tmpfs below a folder, and what can be done behind the mount."""

    def __init__(self, base, *options):
        (base / "toml").write_text(CONFIG)
        self.mount = Mount(base, "--config", str(base / "toml"), *options)
        self.judge, self.examples = base / "judge", 0
        self.judge.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "noatime,size=2g", "judge", self.judge], check=True)
        self.mount.start()

    def close(self):
        subprocess.run(["umount", "-l", self.judge], check=True)
        self.mount.clean()

    def told(self):
        return json.loads((self.mount.path / ".cascade/stats").read_text())

    def fresh_roots(self):
        self.examples += 1
        roots = [root / f"example{self.examples}" for root in (self.mount.path, self.judge)]
        for root in roots:
            root.mkdir()
        return roots[0], roots[1]

    def seal(self, path):
        with contextlib.suppress(OSError):  # no file there, or nothing in it
            os.getxattr(path, "user.cascade.hash")

    def settle(self):
        time.sleep(SETTLE_S)

    def flush(self):
        fd = os.open(self.mount.path / ".cascade", os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def evict(self):
        """12 of 16 MiB of new content: what was there before and is not open has to go."""
        self.flush()
        for part in range(3):
            (self.mount.path / f"filler{part}").write_bytes(os.urandom(4 * MIB))
        self.flush()
        for part in range(3):
            (self.mount.path / f"filler{part}").unlink()

    def restart(self, cold):
        self.mount.stop(*(["--drop-memory"] if cold else []))
        self.mount.start()

    def replaces_workers(self):
        return kernel_release() >= RESEND_SINCE

    def kill_worker(self):
        os.kill(self.told()["worker_pid"], signal.SIGKILL)


@pytest.fixture(params=list(MODES))
def plant(request, tmp_path):
    need_root_and_fuse()
    found = Plant(tmp_path, *MODES[request.param])
    yield found
    found.close()


def walk(plant, steps, seed_number):
    """At least so many steps, by the choices of a seed (None: the same ones each time); the counts of what was done."""
    Walk.plant, Walk.counts = plant, {}
    while (left := steps - Walk.counts.get("steps", 0)) > 0:  # an example may end early
        chosen = settings(
            max_examples=-(-left // STEPS_PER_EXAMPLE),
            stateful_step_count=STEPS_PER_EXAMPLE,
            derandomize=seed_number is None,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
            report_multiple_bugs=False,
            print_blob=False,
            verbosity=Verbosity.quiet,
        )
        machine = Walk if seed_number is None else seed(seed_number + left)(Walk)
        run_state_machine_as_test(machine, settings=chosen)
    return Walk.counts


@pytest.mark.timeout(7200 if TORTURE_STEPS else 120)
def test_a_random_walk_finds_no_difference_from_tmpfs(plant, capsys):
    counts = walk(plant, TORTURE_STEPS or SHORT_STEPS, SEED if TORTURE_STEPS else None)
    told = plant.told()
    with capsys.disabled():
        how = f"seed {SEED}" if TORTURE_STEPS else "fixed choices"
        print(f"\n{told['mode']}, {how}: {counts['steps']} steps, 0 differences; {dict(sorted(counts.items()))}")
    # The walk has shown something only if files went through every state.
    assert counts["evict"] and counts["seal"] and counts["write_mapped"]
    assert counts.get("kill_worker") or not plant.replaces_workers()
