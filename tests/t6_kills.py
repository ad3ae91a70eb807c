"""The worker, or the whole tree, dies by kill -9 in the middle of its work, again and again, under several real processes.

CASCADEFS_KILLS, CASCADEFS_TREE_KILLS, CASCADEFS_MANY_FILES and CASCADEFS_UPGRADE_MIB give the numbers for a long run (`make
torture`); here they are small. A kill at a named point (crash.py) is in the middle of an operation by construction; one from
outside may find the worker idle: each run states both.
"""

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import load
import pytest
from conftest import MODES, Mount, cascadefs, need_root_and_fuse

from cascadefs.crash import POINTS
from cascadefs.mount.fuse import device
from cascadefs.mount.leaving import is_running

KILLS = int(os.environ.get("CASCADEFS_KILLS", "30"))
TREE_KILLS = int(os.environ.get("CASCADEFS_TREE_KILLS", "5"))
PATIENCE_S = 4.0  # a point that is not passed in this time is given up, and the worker killed from outside
TREE_PATIENCE_S = 8.0
CLIENTS = 4
MANY_FILES = int(os.environ.get("CASCADEFS_MANY_FILES", "1000"))
UPGRADE_MIB = int(os.environ.get("CASCADEFS_UPGRADE_MIB", "256"))
FIO_S = 6
# Points that only an unmount passes, or that need gigabytes: they have tests of their own.
OTHERS = [name for name in POINTS if name not in ("checkpoint", "extent sealed")]
MADE_AHEAD = ("entering", "entered")  # what only passthrough does
OFTEN = ("leased", "hashed", "adopted", "sealed", "unlinked", "deleted", "commit", "committed", "answer", "created")
pytestmark = pytest.mark.timeout(3600)


def points_of(mode: str, count: int, rng: random.Random) -> Iterator[str]:
    """`count` points that a mode passes, each as often as the others."""
    others = [name for name in OTHERS if mode == "passthrough" or name not in MADE_AHEAD]
    return itertools.islice(itertools.cycle(rng.sample(others, len(others))), count)


def plan_of(mode: str, count: int, seed: int) -> str:
    """One line for each worker: early and late passages of every point."""
    rng = random.Random(seed)
    points = points_of(mode, count, rng)
    return "\n".join(f"{rng.choice((1, 2, 5, 20) if point in (*OFTEN, *MADE_AHEAD) else (1, 2))} {point}" for point in points)


def child_of(pid: int) -> int:
    """The worker of a keeper; waits for one that is being started."""
    end = time.monotonic() + 10
    while time.monotonic() < end and is_running(pid):
        if words := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            return int(words[0])
        time.sleep(0.002)
    raise AssertionError("the keeper has no worker, or is gone")


def clients(mount: Mount, base: Path, seed: int) -> list[subprocess.Popen[bytes]]:
    running = []
    for i in range(CLIENTS):
        words = [mount.path / f"c{i}", base / f"journal{i}", base / "stop", str(seed + i)]
        with (base / f"errors{i}").open("wb") as errors:
            running.append(subprocess.Popen([sys.executable, load.__file__, *words], stderr=errors))
    mount.running = running
    return running


def passed(plan: Path) -> list[str]:
    report = Path(f"{plan}.passed")
    return report.read_text().split("\n")[:-1] if report.exists() else []


def await_death(keeper: int, worker: int, plan: Path, rng: random.Random) -> None:
    """Until the worker is another one; killed from outside when its point does not come."""
    end = time.monotonic() + PATIENCE_S * rng.uniform(0.5, 1)
    while child_of(keeper) == worker:
        if time.monotonic() > end:
            os.kill(worker, signal.SIGKILL)
            end += 60
        time.sleep(0.01)


def verify(folder: Path, journal: Path) -> None:
    """A folder holds what its client's journal says."""
    files, pending = load.expected(journal)
    loose = {name for changes in pending for name in changes}
    names = [entry.name for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)]
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    for name in (set(files) | set(found)) - loose:
        assert found.get(name) == files.get(name), f"{folder / name} is not what was last written"
    if pending:
        states = [{name: found.get(name) if value == load.ANY else value for name, value in c.items()} for c in pending]
        assert any(all(found.get(name) == value for name, value in s.items()) for s in states) or load.ANY in [
            *pending[0].values()
        ], f"{folder}: {pending} left {[name for name in loose if name in found]}"


def start_in_the_end(mount: Mount) -> int:
    """Mount; a first worker that dies while it opens the store is not replaced, so the command is given again. How often."""
    for deaths in range(10):
        if cascadefs("mount", mount.path, "--store", mount.store, *mount.options, env=mount.env).returncode == 0:
            return deaths
        if mount.path in set(device.mounts()):
            device.unmount(mount.path, lazy=True)
    raise AssertionError((mount.store / "cascadefs.log").read_text()[-3000:])


@pytest.fixture(params=list(MODES))
def killable(request, tmp_path, monkeypatch):
    need_root_and_fuse()
    plan = tmp_path / "plan"
    found = Mount(tmp_path, "--shm-size", "48MiB", *MODES[request.param], env={"CASCADEFS_CRASH_PLAN": str(plan)})
    found.plan, found.running, found.mode = plan, [], request.param
    yield found
    for client in found.running:
        client.kill()
        client.wait()
    found.clean()


def test_clients_do_not_notice_that_workers_die(killable, tmp_path, capsys):
    rng = random.Random(7)
    killable.plan.write_text(plan_of(killable.mode, KILLS, 7))
    killable.start()
    keeper = killable.status()["keeper_pid"]
    running = clients(killable, tmp_path, 100)
    for _ in range(KILLS):
        worker = child_of(keeper)
        await_death(keeper, worker, killable.plan, rng)
    (tmp_path / "stop").touch()
    for i, client in enumerate(running):
        assert client.wait(120) == 0, (tmp_path / f"errors{i}").read_text()[-3000:]
    status = killable.status()
    assert status["restarts"] >= KILLS and not status["damaged_objects"]
    middle = len(passed(killable.plan))
    operations = sum(path.read_text().count("done") for path in tmp_path.glob("journal*"))
    with capsys.disabled():
        share = middle / status["restarts"]
        print(f"\n{status['restarts']} kills, {middle} in the middle of an operation ({share:.0%}); {operations} operations")
    killable.stop()
    killable.wipe_memory()
    killable.start()
    for i in range(CLIENTS):
        verify(killable.path / f"c{i}", tmp_path / f"journal{i}")
    killable.stop()


def die_as_a_tree(mount: Mount, base: Path, seed: int, patience_s: float) -> bool:
    """Mount by a plan of one line, load, kill the keeper, wait for the worker's point. Whether it died there, or on opening."""
    if start_in_the_end(mount):
        return True
    keeper = mount.status()["keeper_pid"]
    running = clients(mount, base, seed)
    worker = child_of(keeper)
    os.kill(keeper, signal.SIGKILL)
    before, end = len(passed(mount.plan)), time.monotonic() + patience_s  # nobody replaces a worker from here on
    while is_running(worker) and time.monotonic() < end:
        time.sleep(0.005)
    if is_running(worker):
        os.kill(worker, signal.SIGKILL)
    for client in running:
        client.wait(60)
    device.unmount(mount.path, lazy=True)
    return len(passed(mount.plan)) > before


def tree_plan(mode: str, count: int, rng: random.Random) -> list[str]:
    """One line for each mount. Points that each answer passes come late: the mount itself must not pass them so often."""
    points = points_of(mode, count, rng)
    late = {"answer": (300, 1000, 3000), "commit": (60, 200, 600), "committed": (60, 200, 600)}
    return [f"{rng.choice(late.get(point, (1, 2, 5) if point in OFTEN else (1,)))} {point}" for point in points]


def test_closed_files_survive_the_death_of_the_whole_tree(killable, tmp_path, capsys):
    missed, began = [], time.monotonic()
    for number, line in enumerate(tree_plan(killable.mode, TREE_KILLS, random.Random(11))):
        killable.plan.write_text(line)
        if not die_as_a_tree(killable, tmp_path, 1000 * number, TREE_PATIENCE_S):
            missed.append(line)
        killable.plan.write_text("")  # those who look at what is left are not to die
        start_in_the_end(killable)
        for i in range(CLIENTS):
            if (killable.path / f"c{i}").exists():
                verify(killable.path / f"c{i}", tmp_path / f"journal{i}")
            (tmp_path / f"journal{i}").unlink(missing_ok=True)
        subprocess.run(["rm", "-rf", *(killable.path / f"c{i}" for i in range(CLIENTS))], check=True)
        killable.stop()
    middle, seconds = TREE_KILLS - len(missed), time.monotonic() - began
    with capsys.disabled():
        share = f"{middle} in the middle of an operation ({middle / TREE_KILLS:.0%})"
        print(f"\n{TREE_KILLS} deaths of the whole tree, {share}; {seconds:.0f} s; from outside: {missed}")
    assert middle > TREE_KILLS / 2  # else it has shown little; here all of them


def test_a_worker_that_dies_at_once_is_given_up(tmp_path):
    need_root_and_fuse()
    mount = Mount(tmp_path, "--shm-size", "48MiB").start()
    try:
        status = mount.status()
        (mount.path / "f").write_text("kept")
        end = time.monotonic() + 60
        while is_running(status["keeper_pid"]) and time.monotonic() < end:
            with contextlib.suppress(AssertionError, ProcessLookupError, FileNotFoundError):
                os.kill(child_of(status["keeper_pid"]), signal.SIGSEGV)
            time.sleep(0.01)
        assert not is_running(status["keeper_pid"])
        with pytest.raises(OSError, match="not connected"):
            os.stat(mount.path)
        assert "mount it anew" in (mount.store / "cascadefs.log").read_text()
        mount.start()
        assert (mount.path / "f").read_text() == "kept"
    finally:
        mount.clean()


def test_json_status_names_both_processes(tmp_path):
    need_root_and_fuse()
    mount = Mount(tmp_path, "--shm-size", "48MiB").start()
    try:
        first = mount.status()
        old = mount.kill_worker()
        second = json.loads(mount.path.joinpath(".cascade/stats").read_text())
        assert second["keeper_pid"] == first["keeper_pid"] and second["worker_pid"] != old and second["restarts"] == 1
    finally:
        mount.clean()


def first_answer_s(act: Callable[[], object], path: Path) -> float:
    """Seconds from `act` to the answer to a question that no cache can answer."""
    began = time.monotonic()
    act()
    assert not path.exists()
    return time.monotonic() - began


def test_many_files_are_there_again_after_a_restart(tmp_path, capsys):
    need_root_and_fuse()
    mount = Mount(tmp_path, "--shm-size", "1GiB").start()
    try:
        for i in range(MANY_FILES):
            if i % 1000 == 0:
                (mount.path / f"d{i // 1000}").mkdir()
            (mount.path / f"d{i // 1000}/f{i}").write_bytes(b"%d" % i * 100)
        mount.flush()
        restarts = list[float]()
        for i in range(5):
            worker = mount.status()["worker_pid"]
            restarts.append(first_answer_s(partial(os.kill, worker, signal.SIGKILL), mount.path / f"none{i}"))
        mount.kill()
        remount = first_answer_s(mount.start, mount.path / "none")
        for i in range(0, MANY_FILES, max(1, MANY_FILES // 500)):
            assert (mount.path / f"d{i // 1000}/f{i}").read_bytes() == b"%d" % i * 100
        with capsys.disabled():
            print(f"\n{MANY_FILES} files: first answer {statistics.median(restarts):.2f} s after the worker died", end=", ")
            print(f"{remount:.2f} s after `cascadefs mount` was called when the whole tree had died")
    finally:
        mount.clean()


def longest_pause(stop: threading.Event, source: Path, target: Path, result: dict[str, float]) -> None:
    """Copy `source` to `target` in calls of 1 MiB; the longest time that one call took, and the whole."""
    start = time.monotonic()
    last = start
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        while data := reader.read(1 << 20):
            writer.write(data)
            now = time.monotonic()
            result["pause"], last = max(result.get("pause", 0.0), now - last), now
    result["all"] = time.monotonic() - start
    stop.set()


def test_an_upgrade_changes_the_worker_under_a_copy(tmp_path, capsys):
    need_root_and_fuse()
    mount = Mount(tmp_path, "--shm-size", "512MiB").start()
    size, result, stop = UPGRADE_MIB << 20, dict[str, float](), threading.Event()
    try:
        with (mount.path / "source").open("wb") as file:
            for _ in range(size >> 20):
                file.write(os.urandom(1 << 20))
        before = mount.status()
        copy = threading.Thread(target=longest_pause, args=(stop, mount.path / "source", mount.path / "copy", result))
        copy.start()
        upgraded = 0
        while not stop.is_set() or not upgraded:
            done = cascadefs("upgrade", mount.path)
            assert done.returncode == 0, done.stderr
            upgraded += 1
        copy.join()
        after = mount.status()
        assert after["restarts"] == upgraded and after["keeper_pid"] == before["keeper_pid"]
        assert (mount.path / "copy").stat().st_size == size
        assert subprocess.run(["cmp", mount.path / "source", mount.path / "copy"], check=False).returncode == 0
        with capsys.disabled():
            print(f"\n{upgraded} upgrades under a copy of {UPGRADE_MIB} MiB: longest pause {result['pause'] * 1000:.0f} ms")
    finally:
        mount.clean()


def test_an_upgrade_to_code_that_cannot_be_loaded_is_refused(tmp_path):
    need_root_and_fuse()
    code = tmp_path / "code"
    code.mkdir()
    mount = Mount(tmp_path, "--shm-size", "48MiB", env={"PYTHONPATH": str(code)}).start()
    try:
        before = mount.status()["worker_pid"]
        (code / "pyfuse3.py").write_text("raise ImportError('of another Python')\n")
        done = cascadefs("upgrade", mount.path)
        assert done.returncode == 1 and "old worker goes on" in done.stderr
        assert mount.status()["worker_pid"] == before and mount.status()["upgrades_refused"] == 1
        assert "of another Python" in (mount.store / "cascadefs.log").read_text()
    finally:
        mount.clean()


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_fio_verifies_through_worker_kills(killable, tmp_path, monkeypatch):
    killable.start()
    keeper = killable.status()["keeper_pid"]
    monkeypatch.chdir(tmp_path)  # fio leaves its state in the current folder
    job = ["--name=v", f"--directory={killable.path}", "--size=32M", "--bs=4k", "--rw=randrw", "--verify=crc32c", "--nrfiles=8"]
    words = ["fio", *job, "--time_based", f"--runtime={FIO_S}", "--do_verify=1", "--thinktime=200", "--ioengine=psync"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as fio:
        for _ in range(5):
            time.sleep(FIO_S / 6)
            worker = child_of(keeper)
            os.kill(worker, signal.SIGKILL)
        said = fio.communicate(timeout=300)[0]
    assert fio.returncode == 0 and "err= 0" in said, said[-2000:]
    assert killable.status()["restarts"] >= 5
