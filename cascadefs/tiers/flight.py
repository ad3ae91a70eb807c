"""Transfers that overlap with work on the bytes: several threads that each do all that one piece needs, and their buffers.

Owns: the threads of one operation, memory that is used again. Knows no records. Everything blocks: call it in a thread.
Invariants: (1) At most LANES pieces are under way. Nobody hands a piece to another thread: each wake-up is one of the disk's.
(2) When in_lanes() ends, also by an error, nothing is under way any more: whoever cuts or closes the file comes after that.
"""

import contextlib
import mmap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

from cascadefs.config import MIB
from cascadefs.record import ALIGN

LANES = 3  # one piece on the processor, one on the disk, one in the queue behind it
KEPT_BYTES = 8 * MIB + 16 * ALIGN  # one write of cold.py
KEPT_FROM_BYTES = MIB
KEPT = 4  # 33 MiB: more than a flush or a promotion needs, less than both
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


def in_lanes(items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """`work` of each item, LANES of them at once, begun in order; the results in order. The thread of the caller is a lane, so
    that one item needs no other. After an error nothing is begun any more; that of the earliest item is raised."""
    results, failed = dict[int, R](), dict[int, BaseException]()
    left, lock = iter(enumerate(items)), Lock()

    def lane() -> None:
        while not failed:
            with lock:
                taken = next(left, None)
            if taken is None:
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
