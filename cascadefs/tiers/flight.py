"""Transfers that overlap with work on the bytes: buffers on their way to one file, and blocks fetched ahead of their use.

Owns: the buffers and threads of one operation. Knows no records. Everything blocks: call it in a thread. Invariants:
(1) At most DEPTH transfers are under way. A buffer that is being written is not touched before its write has ended.
(2) When a block ends, also by an error, nothing is under way any more: whoever cuts or closes the file comes after that.
(3) Results and errors come in the order in which the transfers were begun.
"""

import contextlib
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

from cascadefs import media
from cascadefs.config import MIB
from cascadefs.record import ALIGN

DEPTH = 2  # one on the disk, one in the queue behind it; a third gained nothing
KEPT_BYTES = 8 * MIB + 16 * ALIGN  # one write of cold.py
KEPT_FROM_BYTES = MIB
KEPT = 4  # 33 MiB: a flush and a promotion at once
T = TypeVar("T")
R = TypeVar("R")


def page_buffer(size_bytes: int) -> mmap.mmap:
    """Zeroed memory that O_DIRECT takes, on huge pages where the kernel has them: fewer page faults."""
    found = mmap.mmap(-1, size_bytes)
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
    """Writes to an open file. A context manager."""

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
        media.write_fully(fd, part, position)


@contextlib.contextmanager
def fetched_ahead(items: Iterable[T], fetch: Callable[[T], R], drop: Callable[[R], None]) -> Iterator[Iterator[R]]:
    """`fetch` of each item, in order, the next ones begun while the caller has the last. What was not taken is dropped."""
    with ThreadPoolExecutor(DEPTH, "cascadefs-read") as threads:
        waiting: deque[Future[R]] = deque()
        try:
            yield _in_order(iter(items), fetch, threads, waiting)
        finally:
            for left in waiting:
                if not left.cancel() and left.exception() is None:
                    drop(left.result())


def _in_order(
    items: Iterator[T], fetch: Callable[[T], R], threads: ThreadPoolExecutor, waiting: "deque[Future[R]]"
) -> Iterator[R]:
    while True:
        while len(waiting) < DEPTH and (item := next(items, None)) is not None:
            waiting.append(threads.submit(fetch, item))
        if not waiting:
            return
        yield waiting.popleft().result()
