"""Transfers that overlap with work on the bytes: buffers on their way to one file, and lanes that read, check and copy.

Owns: the threads of one operation, memory that is used again. Knows no records. Everything blocks: call it in a thread.
Invariants: (1) At most DEPTH writes or LANES pieces are under way. A buffer that is being written is not touched meanwhile.
(2) When a block ends, also by an error, nothing is under way any more: whoever cuts or closes the file comes after that.
Writing has one thread that packs and others that write, because a file that grows takes one write at a time, and lanes would
wait for each other's. Reading has lanes: nobody hands a piece on, so that each wake-up is one of the disk's.
"""

import contextlib
import mmap
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from types import TracebackType
from typing import TypeVar

from cascadefs.config import MIB
from cascadefs.media import file_io

DEPTH = 2  # one on the disk, one in the queue behind it; a third gained nothing
AT_DISK = 2  # more pieces at once come from the disk together, and then it waits until they are copied
LANES = 3  # two pieces in the disk's queue while the third is checked and copied
KEPT_BYTES = 10 * MIB  # one write of extents.py, and whole huge pages: else the kernel lets it begin on small ones
KEPT_FROM_BYTES = MIB
KEPT = 6  # 60 MiB: what a promotion and the one behind it need
T = TypeVar("T")
R = TypeVar("R")


def page_buffer(size_bytes: int) -> mmap.mmap:
    """Zeroed memory that O_DIRECT takes, on huge pages where the kernel has them: fewer page faults, and fewer pieces for the
    disk, which is handed each page by itself (a virtual one reads 3.3 GB/s into huge pages and 1.3 into scattered ones).
    Private: whether shared memory may be huge is another setting, mostly off."""
    found = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):
        found.madvise(mmap.MADV_HUGEPAGE)
    return found


class Buffers:
    """Memory for transfers that is used again: fresh pages cost as much as the bytes that go through them, and munmap() holds
    up every thread of the interpreter. What is small is not kept. Threads may share one."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def take(self, size_bytes: int) -> mmap.mmap:
        """A buffer of at least that size, with any bytes in it."""
        if KEPT_FROM_BYTES <= size_bytes <= KEPT_BYTES:
            with contextlib.suppress(IndexError):
                return self._free.pop()
            return page_buffer(KEPT_BYTES)
        return page_buffer(size_bytes)

    def give(self, data: mmap.mmap) -> None:
        """The reverse of take(); no view of it may be left."""
        if len(data) == KEPT_BYTES and len(self._free) < KEPT:
            self._free.append(data)
        else:
            data.close()


class Writes:
    """Writes of whole pages behind the end of an open file; long zeros become holes. A context manager."""

    def __init__(self, fd: int, buffers: Buffers) -> None:
        self._fd, self._buffers = fd, buffers
        self._under_way: deque[tuple[Future[None], mmap.mmap]] = deque()
        self._threads = ThreadPoolExecutor(DEPTH, "cascadefs-write")

    def __enter__(self) -> "Writes":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait for what is under way. Its errors are those of finish(), or come after the one that ends the block."""
        self._threads.shutdown(wait=True)

    def buffer(self, size_bytes: int) -> mmap.mmap:
        """A buffer of at least that size, with any bytes in it. OSError of an earlier write."""
        while self._under_way and (self._under_way[0][0].done() or len(self._under_way) >= DEPTH):
            self._take_back()
        return self._buffers.take(size_bytes)

    def put(self, data: mmap.mmap, size_bytes: int, position: int) -> None:
        """Begin to write the first bytes of a buffer; it is not the caller's any more."""
        self._under_way.append((self._threads.submit(_write, self._fd, data, size_bytes, position), data))

    def finish(self) -> None:
        """Return when everything is written; OSError of the first that failed."""
        while self._under_way:
            self._take_back()

    def _take_back(self) -> None:
        done, data = self._under_way.popleft()
        done.result()
        self._buffers.give(data)


def _write(fd: int, data: mmap.mmap, size_bytes: int, position: int) -> None:
    with memoryview(data) as view, view[:size_bytes] as part:
        file_io.write_with_holes(fd, part, position)


def in_lanes(items: Sequence[T], work: Callable[[T], R], all_begun: Callable[[], None] | None) -> list[R]:
    """`work` of each item, LANES of them at once, begun in order; the results in order. The thread of the caller is a lane, so
    that one item needs no other. After an error nothing is begun any more; that of the earliest item is raised. Each lane that
    finds nothing left to begin calls `all_begun`."""
    results, failed = dict[int, R](), dict[int, BaseException]()
    left, lock = iter(enumerate(items)), Lock()

    def lane() -> None:
        while not failed:
            with lock:
                taken = next(left, None)
            if taken is None:
                if all_begun is not None:
                    all_begun()
                return
            try:
                results[taken[0]] = work(taken[1])
            except BaseException as e:
                failed[taken[0]] = e

    others = min(LANES, len(items)) - 1
    if others > 0:
        with ThreadPoolExecutor(others, "cascadefs-lane") as threads:
            for _ in range(others):
                threads.submit(lane)
            lane()
    else:
        lane()
    if failed:
        raise failed[min(failed)]
    return [results[number] for number in range(len(items))]
