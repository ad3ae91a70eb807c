"""The ranks of one system: `python -m cascadefs.bench.compare.host NAME` forks them and hands out their phases.

Owns: the ranks' processes, their barrier and their clock. Does not know the order of phases, nor what a figure means.
A host reads commands as lines of JSON and answers each with one line; what libraries print goes elsewhere. Invariants:
(1) What is slow to import is imported once, before the ranks are forked.
(2) Only put(), get() and flush() stand between two readings of the clock; making, staging, checking and recycling do not.
(3) Buffers for a read are zeroed before it, and every block is compared with what was put after it.
(4) Ranks end with their host, the host with its parent, whatever kills those.
"""

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TextIO

from cascadefs.bench.compare import kv
from cascadefs.bench.compare.adapter import Pair, Shape, StorageAdapter, all_systems, split

PR_SET_PDEATHSIG = 1
BARRIER_NS = 20_000_000  # every rank has heard the start time by then
WARM_UP = "ffff" + "0" * 12

Answer = dict[str, Any]


def die_with_parent(parent: int) -> None:
    """SIGKILL for this process when the thread that made it ends; at once if that was before we asked for it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def block_name(rank: int, number: int) -> str:
    """Hexadecimal, as hashes of prefixes are."""
    return f"{rank:04x}{number:012x}"


@dataclass(frozen=True)
class Span:
    """One rank's phase: monotonic ns of its first and last moment, and how many blocks came back as they were put."""

    began: int
    ended: int
    good: int = 0


class Rank:
    """What one process does in each phase."""

    def __init__(
        self, system: type[StorageAdapter], data: kv.KvData, address: str, number: int, shape: Shape, seed: int
    ) -> None:
        self.shape, self.names = shape, [block_name(number, block) for block in range(shape.blocks)]
        self.sources, self.sinks = self._made(data, number, seed), kv.blocks(shape, shape.blocks)
        self.adapter = system()
        self.adapter.initialize(address, number, shape)
        self._warm_up(WARM_UP[:-4] + f"{number:04x}")

    def _made(self, data: kv.KvData, number: int, seed: int) -> list[Pair]:
        found = kv.wholes(self.shape, self.shape.blocks)
        for whole, content in zip(found, kv.contents(self.shape)[number], strict=True):
            data.fill(whole, content, seed)
        return [split(whole) for whole in found]

    def _warm_up(self, name: str) -> None:
        """Once through the path: connections, caches of code, the first pages."""
        self.adapter.stage(name, *self.sources[0])
        self.adapter.put(name, *self.sources[0])
        self.adapter.get(name, self.sinks[0])
        self.adapter.recycle()
        self.adapter.clear()

    def ready(self, verb: str) -> None:
        """What must be there before the clock of a phase runs."""
        if verb == "write":
            for name, source in zip(self.names, self.sources, strict=True):
                self.adapter.stage(name, *source)
        if verb == "read":
            for view in (half for sink in self.sinks for half in sink):
                kv.zero(view)

    def phase(self, verb: str, start: int) -> Span:
        """Wait for the moment, work, check."""
        while (left := start - time.monotonic_ns()) > 0:
            time.sleep(left / 1e9)
        work: Callable[[], Any] = getattr(self, verb)
        began = time.monotonic_ns()
        found = work()
        ended = time.monotonic_ns()
        return Span(began, ended, self._good(found) if verb == "read" else 0)

    def write(self) -> None:
        """All puts of this rank."""
        for name, source in zip(self.names, self.sources, strict=True):
            self.adapter.put(name, *source)

    def flush(self) -> None:
        """As durable as it gets."""
        self.adapter.flush()

    def read(self) -> list[Pair | None]:
        """All gets of this rank."""
        return [self.adapter.get(name, sink) for name, sink in zip(self.names, self.sinks, strict=True)]

    def cool(self) -> None:
        """What this process caches."""
        self.adapter.cool()

    def end(self) -> None:
        """Leave nothing behind."""
        self.adapter.clear()
        self.adapter.close()

    def _good(self, found: list[Pair | None]) -> int:
        good = sum(pair is not None and kv.same(pair, source) for pair, source in zip(found, self.sources, strict=True))
        found.clear()
        self.adapter.recycle()
        return good


def _serve_rank(parent: int, pipe: Connection, make: Callable[[], Rank]) -> None:
    """Ready, phase, ready, phase: what the pipe says, until it says end. A failure is answered, then it is over."""
    die_with_parent(parent)
    try:
        rank = make()
        pipe.send(None)
        verb = ""
        while verb != "end":
            verb = pipe.recv()
            rank.ready(verb)
            pipe.send(None)
            pipe.send(rank.phase(verb, pipe.recv()))
    except BaseException as failure:
        traceback.print_exc()
        pipe.send(f"{type(failure).__name__}: {failure}")
    finally:
        pipe.close()
        sys.stderr.flush()
        os._exit(0)  # without the atexit handlers of libraries that the host loaded


class Failed(Exception):
    """A rank could not go on; str() says why."""


class Team:
    """The ranks of one cell."""

    def __init__(self, system: type[StorageAdapter], data: kv.KvData, command: Answer) -> None:
        shape = Shape(**command["shape"])
        context = multiprocessing.get_context("fork")
        self.members: list[tuple[BaseProcess, Connection]] = []
        try:
            for number in range(shape.ranks):
                here, there = context.Pipe()
                arguments = (system, data, command["address"], number, shape, command["seed"])
                process = context.Process(target=_serve_rank, args=(os.getpid(), there, lambda given=arguments: Rank(*given)))
                process.start()
                there.close()
                self.members.append((process, here))
            self._hear()
        except BaseException:
            self.stop()
            raise

    def _hear(self) -> list[Any]:
        """One answer of each rank."""
        try:
            heard = [pipe.recv() for _, pipe in self.members]
        except EOFError:
            raise Failed("a rank died") from None
        for answer in heard:
            if isinstance(answer, str):
                raise Failed(answer)
        return heard

    def _tell(self, word: object) -> None:
        for _, pipe in self.members:
            pipe.send(word)

    def phase(self, verb: str) -> list[Span]:
        """Everybody ready, everybody started at one moment, everybody heard."""
        self._tell(verb)
        self._hear()
        self._tell(time.monotonic_ns() + BARRIER_NS)
        return self._hear()

    def stop(self) -> None:
        """No rank is left."""
        for process, pipe in self.members:
            process.kill()
            process.join()
            pipe.close()
        self.members.clear()


class HostProgram:
    """Answers commands: start, a phase, stop."""

    def __init__(self, names: list[str]) -> None:
        self.systems = {name: system for name, system in all_systems().items() if name in names}
        for system in self.systems.values():
            system.load()
        self.data = kv.KvData()
        self.team: Team | None = None

    def answer(self, command: Answer) -> Answer:
        """Never raises: a failure of the ranks is an answer, and ends them."""
        try:
            return self._do(command)
        except (Failed, OSError) as failure:
            self._stop()
            return {"failed": str(failure)}

    def _do(self, command: Answer) -> Answer:
        verb = command["do"]
        if verb == "stop":
            self._stop()
            return {}
        if verb == "start":
            self._stop()
            self.team = Team(self.systems[command["system"]], self.data, command)
            return {}
        if self.team is None:
            raise Failed("no ranks")
        return {"spans": [[span.began, span.ended, span.good] for span in self.team.phase(verb)]}

    def _stop(self) -> None:
        if self.team is not None:
            self.team.stop()
            self.team = None


def _own_output() -> TextIO:
    """Our stdout; whatever else writes to descriptor 1 from now on writes to stderr."""
    mine = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return mine


def main(names: list[str]) -> None:
    """Until stdin ends."""
    die_with_parent(os.getppid())  # should it have gone before: stdin has ended, too
    output = _own_output()
    program: HostProgram | None = None
    first: Answer = {}
    try:
        program = HostProgram(names)
    except Exception as failure:
        first = {"failed": f"cannot be loaded: {type(failure).__name__}: {failure}"}
    print(json.dumps(first), file=output, flush=True)
    if program is not None:
        for line in sys.stdin:
            print(json.dumps(program.answer(json.loads(line))), file=output, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
