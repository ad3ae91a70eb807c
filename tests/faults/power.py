"""Power loss: records a workload, then opens the store in states that a crash could have left, and looks at it.

Owns: the loop over crash points and states. `python -m tests.faults.power BASE SHIM SEED STATES MUTANT` prints a Result as
JSON. The memory tier is lost in every state, and the machine has booted since: parking/boot names another boot.
"""

import json
import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import trio

from cascadefs.integrity.rebuild import LOST, rebuild
from cascadefs.metadata.namespace import ROOT
from cascadefs.store import Store
from tests import faults
from tests.faults import crash
from tests.faults.oracle import Oracle
from tests.faults.recorder import settings

PARTS, STEPS = 2, 50  # processes of the recording one after the other, operations in each
USE_EVERY = 10  # of so many states one is also written to, flushed and opened again
REBUILD_EVERY = 7  # of so many one loses its index, which is made anew from the extents
AT_RENAMES = 8  # states more are looked at after each rename: what it makes count should be on the disk before it
COMPLAINTS = 5  # so many are enough to tell what is wrong


@dataclass
class Result:
    """Distinct states that were opened; how many of them with a rebuilt index, too; operations in the log; how many states
    showed a fallback; what was wrong in some; what the recording did: words such as "PUNCH extents"."""

    states: int = 0
    rebuilt: int = 0
    operations: int = 0
    fallen_back: int = 0
    complaints: list[str] = field(default_factory=list)
    did: list[str] = field(default_factory=list)


class Replay:
    """One recording and its crash states."""

    def __init__(self, base: Path, log: Path, seed: int) -> None:
        self.base, self.chance, self.result = base, random.Random(seed), Result()
        self.log = list(crash.entries(log))
        self.result.operations = sum(entry.kind != crash.MARK for entry in self.log)
        self.result.did = crash.summary(self.log)
        self._seen: set[bytes] = set()

    def run(self, recorded: Path, wanted: int) -> Result:
        """Open up to `wanted` distinct states, spread over the log."""
        disk, oracle = crash.Disk(recorded / "disk"), Oracle()
        for at, entry in enumerate(self.log):
            if (mark := crash.mark_of(entry)) is not None:
                oracle.hear(mark)
            else:
                disk.follow(entry)
            if entry.kind == crash.RENAME:
                for _ in range(AT_RENAMES):
                    self.look(disk.image(self.chance), oracle, at)
            due = wanted * (at + 1) // len(self.log) - self.result.states
            for _ in range(min(due * 2, 12) if due > 0 else 0):
                if wanted * (at + 1) // len(self.log) > self.result.states:
                    self.look(disk.image(self.chance), oracle, at)
            if len(self.result.complaints) >= COMPLAINTS:
                break
        return self.result

    def look(self, state: dict[str, bytes | bytearray | None], oracle: Oracle, at: int) -> None:
        """Open the store in one state, unless it was seen before."""
        key = crash.state_key(state)
        if key in self._seen:
            return
        self._seen.add(key)
        self.result.states += 1
        self.materialize(state)
        try:
            complaint = trio.run(self.visit, oracle)
            if not complaint and self.result.states % REBUILD_EVERY == 0 and "store/store.json" in state:
                self.materialize(state)
                complaint = trio.run(self.rebuilt, oracle)
        except Exception as e:
            complaint = f"{type(e).__name__}: {e}"
        if complaint:
            self.result.complaints.append(f"after operation {at}: {complaint}")

    def materialize(self, state: Mapping[str, bytes | bytearray | None]) -> None:
        """A fresh folder with that state, and no memory."""
        disk = self.base / "disk"
        shutil.rmtree(disk, ignore_errors=True)
        disk.mkdir()
        for folder in (self.base / "shm").glob("cascadefs-*/*"):
            shutil.rmtree(folder)
        for path in sorted(state):
            data = state[path]
            if data is None:
                os.mkdir(disk / path, 0o700)
            else:
                (disk / path).write_bytes(b"another boot" if path == "store/parking/boot" and data else data)

    async def visit(self, oracle: Oracle) -> str | None:
        """What is wrong with the store, if anything."""
        store = Store(settings(self.base))
        try:
            self.result.fallen_back += bool(store.recovered.fallen_back)
            shown = {name.decode(): await store.get(name.decode()) for _, name, _ in store.namespace.listing(ROOT, 0)}
            complaint = oracle.complaint(shown) or miscounted(store)
            if not complaint and self.result.states % USE_EVERY == 0:
                complaint = await self.use(store, shown)
        finally:
            store.close()
            self.forget_new_memory()
        return complaint

    async def rebuilt(self, oracle: Oracle) -> str | None:
        """What the extents alone give back: what was synced has its name and its bytes."""
        folder = self.base / "disk" / "store"
        for path in folder.glob("index.*"):
            path.unlink()
        rebuild(folder, self.base / "shm", lambda *_: None)
        self.result.rebuilt += 1
        store = Store(settings(self.base))
        try:
            names = [name.decode() for _, name, _ in store.namespace.listing(ROOT, 0) if name != LOST]
            complaint = oracle.complaint({name: await store.get(name) for name in names}) or miscounted(store)
        finally:
            store.close()
            self.forget_new_memory()
        return complaint and f"rebuilt: {complaint}"

    async def use(self, store: Store, shown: dict[str, bytes]) -> str | None:
        """The store goes on: a new file and the old ones are durable after a flush."""
        await store.put("new", b"after the crash" * 1000)
        await store.flush()
        for digest in list(store.residency.memory.objects):
            store.residency.drop(store.residency.memory, digest)
        for name, data in {**shown, "new": b"after the crash" * 1000}.items():
            if await store.get(name) != data:
                return f"{name} changed when the store was used again"
        return miscounted(store)

    def forget_new_memory(self) -> None:
        """A state without store.json made a store of its own, with a tmpfs of its own; one is kept mounted for the rest."""
        for folder in list((self.base / "shm").iterdir())[1:]:
            subprocess.run(["umount", "-l", folder], check=False, capture_output=True)
            shutil.rmtree(folder)

    def clean(self) -> None:
        """Nothing stays mounted."""
        for folder in (self.base / "shm").iterdir():
            subprocess.run(["umount", "-l", folder], check=False, capture_output=True)


COUNTS = {
    "objects.refs": "SELECT count(*) FROM objects o WHERE refs != (SELECT count(*) FROM inodes WHERE oid=o.oid)"
    " + (SELECT count(*) FROM inodes WHERE durable_oid=o.oid) OR refs = 0",
    "blocks.refs": "SELECT count(*) FROM blocks b WHERE refs != (SELECT count(*) FROM object_blocks WHERE bid=b.bid)"
    " OR refs = 0",
    "extents.live": "SELECT count(*) FROM extents e WHERE live != (SELECT coalesce(sum((length + 64 + 4095) / 4096 * 4096), 0)"
    " FROM blocks WHERE extent=e.number)",
}


def miscounted(store: Store) -> str | None:
    """A count in the index that a recount does not confirm."""
    for name, query in COUNTS.items():
        wrong = store.database.connection.execute(query).fetchone()[0]
        if wrong:
            return f"{wrong} rows have a wrong {name}"
    return None


def record(base: Path, shim: Path, seed: int, mutant: str) -> Path:
    """Run the workload under the shim; the log."""
    log = base / f"log-{seed}"
    recorded = base / "recorded"
    shutil.rmtree(recorded, ignore_errors=True)
    for part in ("shm", "disk"):
        (recorded / part).mkdir(parents=True)
    env = faults.environment(shim, recorded / "disk", log=log)
    try:
        for part in range(PARTS):
            faults.run("recorder", recorded, seed * PARTS + part, STEPS, mutant, env=env)
    finally:
        for folder in (recorded / "shm").iterdir():
            subprocess.run(["umount", "-l", folder], check=False, capture_output=True)
    return log


def explore(base: Path, shim: Path, seed: int, states: int, mutant: str = "none") -> Result:
    """Record and replay."""
    base.mkdir(parents=True, exist_ok=True)
    log = record(base, shim, seed, mutant)
    (base / "shm").mkdir(exist_ok=True)
    replay = Replay(base, log, seed)
    try:
        return replay.run(base / "recorded", states)
    finally:
        replay.clean()


def main() -> None:
    """See the first lines."""
    base, shim, seed, states, mutant = sys.argv[1:]
    logging.disable(logging.CRITICAL)  # recovery has much to tell here
    print(json.dumps(asdict(explore(Path(base), Path(shim), int(seed), int(states), mutant))))


if __name__ == "__main__":
    main()
