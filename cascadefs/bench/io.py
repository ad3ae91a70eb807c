"""What is measured, and in which order: every measure is a function of a directory.

Owns: the measures, their clock and data, the interleaving. Does not know what filesystem a directory is on, nor how
figures are compared. Invariants:
(1) No block is written twice: each STAMP_BYTES of a source carry a nonce of the process and a number that never comes
    again.
(2) Only what stands between two readings of the clock counts: making data, settling, checking and unlinking do not.
(3) What a timed read delivered last is compared with what was written, outside the clock: a fast wrong answer is no
    figure.
(4) A measure removes its files, also when it fails.
"""

import errno
import mmap
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cascadefs.errors import UserError
from cascadefs.media.transfers import page_buffer

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
STAMP_BYTES = 64 * KIB  # finer than any block of a store, coarse enough to cost 2 us per MiB, outside the clock
GB = 1e9  # rates are decimal GB/s, sizes binary
BARRIER_NS = 30_000_000  # both workers have read the start time long before it comes
WORKER_S = 300  # a pair that takes longer than this hangs
WRITE, READ, PUT, GET = "write", "read", "put", "get"
CREATE, STAT, UNLINK, OPEN = "create", "stat", "unlink", "open + close"
RATE_GB, MICROS, PER_S = "GB/s", "us", "1/s"
SECONDS, PER_FILE, CPU = "s", "KiB/file", "s/GiB"
LESS_IS_BETTER = (MICROS, SECONDS, PER_FILE, CPU)

_STAMP = struct.Struct("<8sQ")
_clock = time.perf_counter_ns


@dataclass(frozen=True)
class Sizes:
    """How much each measure moves. `objects` are (bytes of one file, number of files)."""

    streams: tuple[int, ...] = (64 * MIB, GIB)
    calls: tuple[int, ...] = (MIB, 16 * MIB)
    objects: tuple[tuple[int, int], ...] = ((64 * KIB, 200), (MIB, 100), (10 * MIB, 20))
    pair: int = 256 * MIB
    mapped: int = 256 * MIB
    names: int = 2000
    opens: int = 500

    @property
    def buffer_bytes(self) -> int:
        """The largest single call."""
        return max(*self.calls, *(size for size, _ in self.objects), MIB)

    @property
    def ballast_bytes(self) -> int:
        """Twice what the largest measure holds (a FUSE mount may cache a second copy), and some room."""
        # A pair holds two files and, in its processes, two buffers as large.
        held = (*self.streams, *(size * count for size, count in self.objects), 4 * self.pair, self.mapped)
        return 2 * max(held) + 256 * MIB


FULL = Sizes()
QUICK = Sizes((64 * MIB,), FULL.calls, ((64 * KIB, 50), (MIB, 30), (10 * MIB, 10)), 64 * MIB, 64 * MIB, 500, 200)
WARM_UP = Sizes((16 * MIB,), FULL.calls, ((64 * KIB, 5), (MIB, 3), (10 * MIB, 2)), 16 * MIB, 16 * MIB, 50, 20)


@dataclass(frozen=True)
class Place:
    """A directory to measure. `settle` returns when the work that earlier operations left behind is done (bounded)."""

    key: str
    folder: Path
    settle: Callable[[], None]


class Source:
    """One page-faulted buffer of random bytes on huge pages, made unique again by `stamp` before each use."""

    def __init__(self, size_bytes: int) -> None:
        self.view = memoryview(page_buffer(size_bytes))
        seed = os.urandom(min(size_bytes, 4 * MIB))
        for offset in range(0, size_bytes, len(seed)):
            length = min(len(seed), size_bytes - offset)
            self.view[offset : offset + length] = seed[:length]
        self._nonce = os.urandom(8)
        self.next_number = 0

    def stamp(self, length: int) -> int:
        """Make the first `length` bytes unlike anything before; returns the number of their first stamp."""
        first = self.next_number
        for offset in range(0, length, STAMP_BYTES):
            _STAMP.pack_into(self.view, offset, self._nonce, self.next_number)
            self.next_number += 1
        return first


REST_S = 0.2  # what a thread has computed counts half after 32 ms; free memory is taken back after one or two seconds


@dataclass(frozen=True)
class Ballast:
    """Touches the memory that the next measure will take, as a file on a tmpfs, directly before it starts.

    A virtual machine may hand free memory back to its host within seconds; the first touch after that costs a fault in
    the host (seen: a fresh write of 0.6 instead of 26 GB/s), and it would hit whichever target comes first. The kernel
    uses the pages freed last first, so every target finds memory that is there. An anonymous mapping instead of a file
    did not do: a tmpfs got other pages.
    """

    folder: Path
    size_bytes: int

    def touch(self, filler: memoryview) -> None:
        """Write and remove a file of `size_bytes`; `filler` is any memory. Then rest: who has just computed for long is woken
        across cores by some schedulers, and this was our own computing, not that of what is measured."""
        with tempfile.TemporaryFile(dir=self.folder, buffering=0) as file:
            for offset in range(0, self.size_bytes, len(filler)):
                write_all(file.fileno(), filler[: self.size_bytes - offset])
        time.sleep(REST_S)


@dataclass(frozen=True)
class Kit:
    """The buffers of one run: `sink` is page-faulted too, so that reads fault in nothing of ours."""

    source: Source
    sink: memoryview
    ballast: Ballast

    def touch(self) -> None:
        """Directly before the clock of a measure, or of a part of one before which memory was given back."""
        self.ballast.touch(self.sink)


def make_kit(size_bytes: int, ballast: Ballast) -> Kit:
    """Buffers for calls of up to `size_bytes`."""
    return Kit(Source(size_bytes), Source(size_bytes).view, ballast)


Figures = dict[str, float]


@dataclass(frozen=True)
class Measure:
    """`run(place, kit)` gives one figure for each name in `units`; several when one file serves a write and a read."""

    units: dict[str, str]
    run: Callable[[Place, Kit], Figures]


def size_text(size_bytes: int) -> str:
    """64 KiB, 1 MiB, 1 GiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size_bytes >= unit and size_bytes % unit == 0:
            return f"{size_bytes // unit} {name}"
    return f"{size_bytes} B"


def stream_name(verb: str, size_bytes: int, call_bytes: int) -> str:
    """The row of a streamed write or read."""
    return f"{verb} {size_text(size_bytes)} in {size_text(call_bytes)} calls"


def object_name(verb: str, size_bytes: int) -> str:
    """The row of a put or get."""
    return f"{verb} {size_text(size_bytes)}"


def pair_name(verb: str, size_bytes: int) -> str:
    return f"2 processes {verb} {size_text(size_bytes)} each"


def fit(sizes: Sizes, shm_bytes: int) -> Sizes:
    """`sizes` such that no measure holds more than a third of a memory tier: beyond that eviction would be measured."""
    limit = 1 << ((shm_bytes // 3).bit_length() - 1)
    if limit < 64 * MIB:
        raise UserError(f"not enough free memory: a memory tier would get {size_text(shm_bytes)}, a benchmark needs 256 MiB")
    streams = tuple(dict.fromkeys(min(size, limit) for size in sizes.streams))
    objects = tuple((size, max(1, min(count, limit // size))) for size, count in sizes.objects)
    return replace(sizes, streams=streams, objects=objects, pair=min(sizes.pair, limit // 2), mapped=min(sizes.mapped, limit))


@contextmanager
def scratch(place: Place) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=place.folder))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def write_all(fd: int, view: memoryview) -> None:
    done = os.write(fd, view)
    while done < len(view):
        done += os.write(fd, view[done:])


def read_all(fd: int, view: memoryview) -> None:
    done = os.readv(fd, [view])
    while done < len(view):
        more = os.readv(fd, [view[done:]])
        if not more:
            raise OSError(errno.EIO, f"end of file after {done} of {len(view)} bytes")
        done += more


def check(view: memoryview, first: int) -> None:
    """`view` holds stamps `first`, `first + 1`, ..."""
    for step, offset in enumerate(range(0, len(view), STAMP_BYTES)):
        found = _STAMP.unpack_from(view, offset)[1]
        if found != first + step:
            raise OSError(errno.EIO, f"read back stamp {found} where {first + step} was written")


def write_file(path: Path, source: Source, size: int, call: int) -> int:
    """Write a new file; returns the ns spent in open, write and close (stamping stands outside)."""
    start = _clock()
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    spent = _clock() - start
    try:
        for offset in range(0, size, call):
            view = source.view[: min(call, size - offset)]
            source.stamp(len(view))
            start = _clock()
            write_all(fd, view)
            spent += _clock() - start
    finally:
        start = _clock()
        os.close(fd)
    return spent + _clock() - start


def read_file(path: Path, sink: memoryview, size: int, call: int) -> int:
    """Read a file of `size` bytes; returns the ns of open, readv and close. The last call's bytes stay in `sink`."""
    start = _clock()
    fd = os.open(path, os.O_RDONLY)
    try:
        for offset in range(0, size, call):
            read_all(fd, sink[: min(call, size - offset)])
    finally:
        os.close(fd)
    return _clock() - start


def _stream(size: int, call: int, place: Place, kit: Kit) -> Figures:
    """Fresh write, then hot read: the file is read once before the read that counts."""
    last = size - (size - 1) // call * call
    with scratch(place) as folder:
        wrote_ns = write_file(folder / "f", kit.source, size, call)
        place.settle()
        read_file(folder / "f", kit.sink, size, call)
        read_ns = read_file(folder / "f", kit.sink, size, call)
        check(kit.sink[:last], kit.source.next_number - -(-last // STAMP_BYTES))
    wrote, read = size * 1e9 / wrote_ns / GB, size * 1e9 / read_ns / GB
    return {stream_name(WRITE, size, call): wrote, stream_name(READ, size, call): read}


def objects_of(size: int, count: int, place: Place, kit: Kit) -> Figures:
    """put: a fresh name, one write. get: the first read of each, one readv."""
    put_ns, get_ns, firsts = [], [], []
    with scratch(place) as folder:
        for i in range(count):
            firsts.append(kit.source.next_number)
            put_ns.append(write_file(folder / f"{i:06d}", kit.source, size, size))
        place.settle()
        for i in range(count):
            get_ns.append(read_file(folder / f"{i:06d}", kit.sink, size, size))
            check(kit.sink[:size], firsts[i])
    put_us, get_us = statistics.median(put_ns) / 1e3, statistics.median(get_ns) / 1e3
    return {object_name(PUT, size): put_us, object_name(GET, size): get_us}


def opens(count: int, place: Place, kit: Kit) -> Figures:
    """The same settled 64 KiB file, opened for reading again and again."""
    spent = []
    with scratch(place) as folder:
        path = folder / "f"
        write_file(path, kit.source, 64 * KIB, 64 * KIB)
        place.settle()
        for _ in range(count):
            start = _clock()
            os.close(os.open(path, os.O_RDONLY))
            spent.append(_clock() - start)
    return {OPEN: statistics.median(spent) / 1e3}


def rate(action: Callable[[str], object], paths: list[str]) -> float:
    start = _clock()
    for path in paths:
        action(path)
    return len(paths) * 1e9 / (_clock() - start)


def make_empty(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _names(count: int, place: Place, kit: Kit) -> Figures:
    """Empty files in one folder; the stat of each name is its first, soon after all were created."""
    with scratch(place) as folder:
        paths = [f"{folder}/{i:06d}" for i in range(count)]
        rates = {CREATE: rate(make_empty, paths), STAT: rate(os.stat, paths), UNLINK: rate(os.unlink, paths)}
    place.settle()
    return rates


def mapped_name(size: int) -> str:
    return f"mmap read {size_text(size)}"


def _copy_mapped(path: Path, size: int, sink: memoryview) -> None:
    with ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        view = stack.enter_context(memoryview(stack.enter_context(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ))))
        for offset in range(0, size, MIB):
            length = min(MIB, size - offset)
            sink[:length] = view[offset : offset + length]


def _mapped(size: int, place: Place, kit: Kit) -> Figures:
    """Map, copy out every byte, unmap: page faults included. Twice before it counts: the kernel moves a page to its active
    list at the second use, once, and where a write has filled the page cache that was the first."""
    with scratch(place) as folder:
        write_file(folder / "f", kit.source, size, MIB)
        place.settle()
        for _ in range(2):
            _copy_mapped(folder / "f", size, kit.sink)
        start = _clock()
        _copy_mapped(folder / "f", size, kit.sink)
        spent = _clock() - start
        last = size - (size - 1) // MIB * MIB
        check(kit.sink[:last], kit.source.next_number - -(-last // STAMP_BYTES))
    return {mapped_name(size): size * 1e9 / spent / GB}


@contextmanager
def _worker(verb: str, path: Path, size: int) -> Iterator[subprocess.Popen[str]]:
    """A second interpreter that runs `_worker_main`, ready to start; gone when the block is left."""
    command = [sys.executable, "-m", "cascadefs.bench.io", verb, str(path), str(size)]
    root = Path(__file__).parents[2]  # the package is found from there, installed or not
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            if process.stdout.readline() != "ready\n":
                raise OSError(errno.EIO, f"the {verb} process did not start")
            yield process
        finally:
            process.kill()


def together(verb: str, paths: Sequence[Path], size: int) -> float:
    """One process for each path, all started at one moment: all bytes from the first start to the last end, GB/s."""
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(verb, path, size)) for path in paths]
        start = time.monotonic_ns() + BARRIER_NS
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write(f"{start}\n")
            worker.stdin.flush()
        try:
            spans = [worker.communicate(timeout=WORKER_S)[0].split() for worker in workers]
        except subprocess.TimeoutExpired as hung:
            raise OSError(errno.ETIMEDOUT, f"a {verb} process did not end in {WORKER_S} s") from hung
    if not all(len(span) == 2 for span in spans):
        raise OSError(errno.EIO, f"a {verb} process failed")
    return len(paths) * size * 1e9 / (max(int(s[1]) for s in spans) - min(int(s[0]) for s in spans)) / GB


def _pair(size: int, place: Place, kit: Kit) -> Figures:
    with scratch(place) as folder:
        paths = [folder / "a", folder / "b"]
        wrote = together(WRITE, paths, size)
        place.settle()
        read = together(READ, paths, size)
    return {pair_name(WRITE, size): wrote, pair_name(READ, size): read}


def _worker_main(verb: str, path: str, size: int) -> None:
    """Say ready, wait for the start time on stdin, do the work, print when it began and ended (monotonic ns).

    The whole file is made before: stamping inside the span would be counted, for here the span is the wall's.
    """
    buffer = Source(size if verb == WRITE else MIB)
    if verb == WRITE:
        buffer.stamp(size)
    print("ready", flush=True)
    start = int(sys.stdin.readline())
    while time.monotonic_ns() < start:
        pass
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY if verb == WRITE else os.O_RDONLY
    began = time.monotonic_ns()
    fd = os.open(path, flags, 0o600)
    for offset in range(0, size, MIB):
        if verb == WRITE:
            write_all(fd, buffer.view[offset : min(offset + MIB, size)])
        else:
            read_all(fd, buffer.view[: min(MIB, size - offset)])
    os.close(fd)
    ended = time.monotonic_ns()
    if verb == READ:  # the writer numbered its stamps from 0
        last = size - (size - 1) // MIB * MIB
        check(buffer.view[:last], (size - last) // STAMP_BYTES)
    print(began, ended, flush=True)


def measures(sizes: Sizes) -> list[Measure]:
    """Everything that is measured, in the order of the report's rows."""
    found = [
        Measure({stream_name(verb, size, call): RATE_GB for verb in (WRITE, READ)}, partial(_stream, size, call))
        for size in sizes.streams
        for call in sizes.calls
    ]
    found += [
        Measure({object_name(verb, size): MICROS for verb in (PUT, GET)}, partial(objects_of, size, count))
        for size, count in sizes.objects
    ]
    found.append(Measure({pair_name(verb, sizes.pair): RATE_GB for verb in (WRITE, READ)}, partial(_pair, sizes.pair)))
    found.append(Measure({OPEN: MICROS}, partial(opens, sizes.opens)))
    found.append(Measure(dict.fromkeys((CREATE, STAT, UNLINK), PER_S), partial(_names, sizes.names)))
    found.append(Measure({mapped_name(sizes.mapped): RATE_GB}, partial(_mapped, sizes.mapped)))
    return found


def units(chosen: Sequence[Measure]) -> dict[str, str]:
    """Row name -> unit, in the order of the rows."""
    return {name: unit for measure in chosen for name, unit in measure.units.items()}


def rotation(keys: Sequence[str], repeat: int) -> list[str]:
    """The order of the targets in one repeat: over as many repeats as there are targets, each has every place once."""
    shift = repeat % len(keys) if keys else 0
    return [*keys[shift:], *keys[:shift]]


def schedule(repeats: int, measure_count: int, keys: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """(repeat, number of the measure, target): the targets of a measure directly after each other: drift hits all."""
    for repeat in range(repeats):
        for number in range(measure_count):
            for key in rotation(keys, repeat):
                yield repeat, number, key


Samples = dict[tuple[str, str], list[float]]


def run(
    chosen: Sequence[Measure],
    places: Sequence[Place],
    repeats: int,
    ballast: Ballast,
    on_step: Callable[[str, str], None],
    on_failure: Callable[[str, OSError], None],
    buffer_bytes: int = 0,
) -> Samples:
    """All samples by (row name, target key). A target that fails is left out from then on; its figures are dropped."""
    kit = make_kit(max(FULL.buffer_bytes, buffer_bytes), ballast)
    by_key = {place.key: place for place in places}
    samples: Samples = {}
    for _, number, key in schedule(repeats, len(chosen), list(by_key)):
        measure, place = chosen[number], by_key.get(key)
        on_step(next(iter(measure.units)), key)
        if place is None:
            continue
        kit.touch()
        try:
            figures = measure.run(place, kit)
        except OSError as failure:
            on_failure(key, failure)
            del by_key[key]
            continue
        for name, figure in figures.items():
            samples.setdefault((name, key), []).append(figure)
    return {(name, key): figures for (name, key), figures in samples.items() if key in by_key}


if __name__ == "__main__":
    _worker_main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
