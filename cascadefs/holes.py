"""Where an object has holes that is in no file: from the index (blocks of zeros have a fingerprint that is known), and inside
other blocks from their bytes.

Owns: a small memory of the runs of zeros in blocks. Knows no inode; whoever reads blocks is given to it. Invariants:
(1) Nothing is told to be a hole that does not read as zeros. (2) Data may be told for zeros: after LOOKED_INTO blocks in a
row, and where a block cannot be read.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import lru_cache, partial

import trio

from cascadefs.errors import CorruptRecord
from cascadefs.ext import hashing
from cascadefs.index import Index
from cascadefs.record import ALIGN
from cascadefs.types import Block, Object

LOOKED_INTO = 64  # blocks at one question, for a hole inside: half a second of a slow disk; most files have none there
REMEMBERED = 64  # blocks, with at most 512 runs each
Runs = list[tuple[int, int]]


@lru_cache(maxsize=64)
def print_of_zeros(length: int, secret: bytes) -> bytes:
    """The fingerprint of so many."""
    return hashing.fingerprint(bytes(length), secret)


class Holes:
    """Of the objects of one store. `read` gives the verified bytes of a block."""

    def __init__(self, index: Index, secret: bytes, read: Callable[[Block], Awaitable[bytes]]) -> None:
        self._index, self._secret, self._read = index, secret, read
        self._runs: OrderedDict[int, Runs] = OrderedDict()

    def is_one(self, block: Block) -> bool:
        """Whether a block is zeros altogether."""
        return block.fingerprint == print_of_zeros(block.length, self._secret)

    async def data(self, found: Object, offset: int) -> int | None:
        """The first byte of data at or behind `offset`; None: there is none."""
        step = self._index.step(found.oid)
        seq = self._next(found, offset // step, step, zeros=False)
        while seq is not None and (block := self._index.block_at(found.oid, seq)) is not None:
            first = seq * step
            offset = max(offset, first)
            within = (end for begin, end in await self._runs_in(block) if begin <= offset - first < end)
            offset = first + next(within, offset - first)
            if offset < first + block.length:
                return offset
            seq = self._next(found, seq + 1, step, zeros=False)
        return None

    async def hole(self, found: Object, offset: int) -> int:
        """The first byte of a hole at or behind `offset`; the end of the content is one."""
        step = self._index.step(found.oid)
        looked_into = range(offset // step, offset // step + LOOKED_INTO)
        for seq in looked_into:
            block = self._index.block_at(found.oid, seq)
            if block is None:
                return found.size_bytes
            first = seq * step
            runs = [(0, block.length)] if self.is_one(block) else await self._runs_in(block)
            for begin, end in runs:
                if offset < first + end:
                    return max(offset, first + begin)
        further = self._next(found, looked_into.stop, step, zeros=True)
        return found.size_bytes if further is None else further * step

    def _next(self, found: Object, seq: int, step: int, zeros: bool) -> int | None:
        """The place of the next block from `seq` on that is `zeros` altogether, or is not."""
        lengths = {step, found.size_bytes % step or step}
        return self._index.next_place(found.oid, seq, [print_of_zeros(n, self._secret) for n in lengths], zeros)

    async def _runs_in(self, block: Block) -> Runs:
        runs = self._runs.pop(block.bid, None)
        if runs is None:
            try:
                runs = await trio.to_thread.run_sync(partial(runs_of_zeros, await self._read(block)))
            except CorruptRecord:
                return []  # whoever reads it hears of that
        self._runs[block.bid] = runs
        if len(self._runs) > REMEMBERED:
            self._runs.popitem(last=False)
        return runs


def runs_of_zeros(data: bytes) -> Runs:
    """[(begin, end)] of whole pages of zeros; a page that is cut off by the end is whole."""
    runs, tail = hashing.zero_runs(data, ALIGN), len(data) // ALIGN * ALIGN
    if tail < len(data) and not any(data[tail:]):
        begin = runs.pop()[0] if runs and runs[-1][1] == tail else tail
        runs.append((begin, len(data)))
    return runs
