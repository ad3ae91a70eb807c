"""One measurement after the other: serve a system, start ranks, write, flush, read, cool, read again.

Owns: the order of systems and phases, fresh folders, the programs of hosts. Does not know any system. Invariants:
(1) Systems rotate within each repeat, so that drift of the machine hits all alike.
(2) A system that fails is left out of its shape with the reason, its samples are dropped, and the others go on.
(3) A sample whose reads did not all come back byte for byte counts as a failure.
"""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from cascadefs.bench.compare.adapter import Room, Service, Shape, StorageAdapter
from cascadefs.bench.io import MIB, Ballast, Source, rotation
from cascadefs.bench.targets import SHM_FOLDER, LeftOut, Note, Setup, available_bytes, huge_tmpfs, temporary_folder

ANSWER_S = 300  # a phase that takes longer hangs
TOUCHED, TOUCHED_BYTES = 1.25, 256 * MIB  # of the data, and more: what servers take for themselves; see Ballast
Systems = Mapping[str, type[StorageAdapter]]


class Host:
    """The program that runs the ranks of systems whose modules are the same."""

    def __init__(self, names: Sequence[str]) -> None:
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - lives as long as the program
        self._program = subprocess.Popen(
            [sys.executable, "-m", "cascadefs.bench.compare.host", *names],
            cwd=Path(__file__).parents[3],  # the package is found from there, installed or not
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C is for us: we end it, and it its ranks
        )
        self._was_ready = False

    def _hear(self, timeout_s: float) -> dict[str, Any]:
        assert self._program.stdout is not None
        if not select.select([self._program.stdout], [], [], timeout_s)[0]:
            raise LeftOut(f"no answer in {timeout_s:.0f} s")
        line = self._program.stdout.readline()
        if not line:
            raise LeftOut(f"its program ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise LeftOut(answer["failed"])
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip()
        return said.splitlines()[-1] if said else "no output"

    def call(self, do: str, **more: object) -> dict[str, Any]:
        """One command, its answer."""
        if not self._was_ready:
            self._hear(ANSWER_S)
            self._was_ready = True
        assert self._program.stdin is not None
        try:
            self._program.stdin.write(json.dumps({"do": do, **more}).encode() + b"\n")
            self._program.stdin.flush()
        except OSError as gone:
            raise LeftOut(f"its program ended: {self._last_words()}") from gone
        return self._hear(ANSWER_S)

    def close(self) -> None:
        """The program and its ranks end."""
        self._program.kill()
        self._program.communicate()
        self._log.close()


@dataclass(frozen=True)
class Sample:
    """Seconds of each phase from the first start to the last end; `stored_bytes`: what lay in the system after the flush."""

    write_s: float
    flush_s: float
    hot_s: float
    cold_s: float | None
    stored_bytes: int | None


@dataclass
class Result:
    """All samples of one system in one shape; `trouble`: why there are none."""

    system: type[StorageAdapter]
    shape: Shape
    samples: list[Sample] = field(default_factory=list)
    trouble: str | None = None

    def fail(self, why: str) -> None:
        """Left out from now on."""
        self.samples.clear()
        self.trouble = why


def _phase(host: Host, verb: str, shape: Shape) -> float:
    """Seconds from the first start to the last end."""
    spans = host.call(verb)["spans"]
    if verb == "read" and sum(span[2] for span in spans) != shape.ranks * shape.blocks:
        good = sum(span[2] for span in spans)
        raise LeftOut(f"wrong data: {good} of {shape.ranks * shape.blocks} blocks came back as they were put")
    return float(max(span[1] for span in spans) - min(span[0] for span in spans)) / 1e9


def _cold(host: Host, service: Service, shape: Shape, touch: Callable[[], None]) -> float | None:
    if service.cool is None:
        return None
    _phase(host, "cool", shape)
    service.cool()
    touch()
    return _phase(host, "read", shape)


def _sample(
    host: Host, system: type[StorageAdapter], service: Service, shape: Shape, seed: int, touch: Callable[[], None]
) -> Sample:
    host.call("start", system=system.name, address=service.address, shape=asdict(shape), seed=seed)
    touch()  # after the ranks have taken their buffers: the pages that are freed last are used first
    write_s = _phase(host, "write", shape)
    flush_s = 0.0 if system.flush is StorageAdapter.flush else _phase(host, "flush", shape)
    stored = service.stored_bytes()
    hot_s, cold_s = _phase(host, "read", shape), _cold(host, service, shape, touch)
    _phase(host, "end", shape)
    return Sample(write_s, flush_s, hot_s, cold_s, stored)


class Runner:
    """Everything that lasts for a whole run: hosts, a tmpfs with huge pages, the ballast."""

    def __init__(self, systems: Systems, setup: Setup, memory: Path, huge: Path | None, note: Note) -> None:
        self.systems, self.setup, self.note = systems, setup, note
        self.memory, self.huge = memory, huge
        self._hosts: dict[str, Host] = {}
        self._filler = Source(1 << 24).view

    def close(self) -> None:
        """No program is left."""
        for host in self._hosts.values():
            host.close()

    def _host(self, system: type[StorageAdapter]) -> Host:
        family = system.__module__
        if family not in self._hosts:
            names = [name for name, other in self.systems.items() if other.__module__ == family and not other.missing()]
            self._hosts[family] = Host(names)
        return self._hosts[family]

    @contextmanager
    def _room(self) -> Iterator[Room]:
        with ExitStack() as stack:
            disk = stack.enter_context(temporary_folder(self.setup.store_base, self.note))
            memory = stack.enter_context(temporary_folder(self.memory, self.note))
            huge = stack.enter_context(temporary_folder(self.huge, self.note)) if self.huge else None
            yield Room(disk, memory, huge, self.setup.cli, self.note)

    def _measure(self, result: Result, seed: int) -> None:
        host, shape = self._host(result.system), result.shape
        ballast = Ballast(self.huge or self.memory, int(TOUCHED * shape.total_bytes) + TOUCHED_BYTES)
        touch = partial(ballast.touch, self._filler)
        with self._room() as room, result.system.serve(room, shape) as service:
            try:
                result.samples.append(_sample(host, result.system, service, shape, seed, touch))
                host.call("stop")
            except BaseException:  # also Ctrl-C: nobody may use the service while it is taken down
                self._hosts.pop(result.system.__module__).close()
                raise

    def _try(self, result: Result, seed: int) -> None:
        try:
            self._measure(result, seed)
        except (LeftOut, OSError) as why:
            result.fail(f"failed: {why}")

    def run(self, shape: Shape, repeats: int, on_step: Callable[[str], None]) -> list[Result]:
        """All systems in one shape."""
        results = {name: Result(system, shape, trouble=system.missing()) for name, system in self.systems.items()}
        for repeat in range(repeats):
            for name in rotation(list(results), repeat):
                on_step(results[name].system.title)
                if results[name].trouble is None:
                    self._try(results[name], time.time_ns() ^ os.getpid() << 32)
        return list(results.values())


@contextmanager
def open_runner(systems: Systems, setup: Setup, note: Note) -> Iterator[Runner]:
    """A runner with its places; everything is taken down afterwards."""
    with ExitStack() as stack:
        memory = stack.enter_context(temporary_folder(SHM_FOLDER, note))
        huge: Path | None = None
        try:
            huge = stack.enter_context(huge_tmpfs(replace(setup, huge_bytes=available_bytes() // 2), note))
        except LeftOut as why:
            note(f"no tmpfs with huge pages: {why}")
        runner = Runner(systems, setup, memory, huge, note)
        stack.callback(runner.close)
        yield runner
