"""Where an object has holes that is in no file: from the index (blocks of zeros have a fingerprint that is known), and inside
other blocks from their bytes; and blocks kept in memory without their zeros.

Owns: a small memory of the runs of zeros in blocks. Knows no inode; whoever reads blocks is given to it. Invariants:
(1) Nothing is told to be a hole that does not read as zeros. (2) Data may be told for zeros: after LOOKED_INTO blocks in a
row, and where a block cannot be read.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache

from cascadefs.errors import CorruptRecord
from cascadefs.ext import hashing
from cascadefs.media.file_io import ALIGN
from cascadefs.metadata.objects import Index
from cascadefs.types import Block, Object

LOOKED_INTO = 64  # blocks at one question, for a hole inside: half a second of a slow disk; most files have none there
MOST = 3 / 4  # of a block in zeros: then only the rest is kept
REMEMBERED = 64  # blocks, with at most 512 runs each
Runs = list[tuple[int, int]]


@lru_cache(maxsize=64)
def print_of_zeros(length: int, secret: bytes) -> bytes:
    """The fingerprint of so many."""
    return hashing.fingerprint(bytes(length), secret)


def prints_of_zeros(found: Object, step: int, secret: bytes) -> list[bytes]:
    """Fingerprints that blocks of zeros have in an object whose blocks are `step` long."""
    return [print_of_zeros(length, secret) for length in {step, found.size_bytes % step or step}]


def runs_of_zeros(data: memoryview) -> Runs:
    """[(begin, end)] of whole pages of zeros; a page that is cut off by the end is whole."""
    runs, tail = hashing.zero_runs(data, ALIGN), len(data) // ALIGN * ALIGN
    if tail < len(data) and not any(data[tail:]):
        begin = runs.pop()[0] if runs and runs[-1][1] == tail else tail
        runs.append((begin, len(data)))
    return runs


@dataclass(frozen=True, slots=True)
class Content:
    """The bytes of a block: its length, its runs of zeros, and (begin, bytes) of what is kept; between them are zeros."""

    length: int
    zeros: Runs
    parts: list[tuple[int, bytes]]
    kept_bytes: int

    @classmethod
    def of(cls, data: memoryview) -> "Content":
        """A copy; in one piece unless most is zeros."""
        zeros, length = runs_of_zeros(data), len(data)
        data_bytes = length - sum(end - begin for begin, end in zeros)
        if data_bytes > length * (1 - MOST):
            return cls(length, zeros, [(0, bytes(data))], length)
        edges = [0, *(edge for run in zeros for edge in run), length]
        parts = [(begin, bytes(data[begin:end])) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end]
        return cls(length, zeros, parts, data_bytes)

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on, fewer at the end."""
        end = min(start + size, self.length)
        if len(self.parts) == 1 and self.parts[0][0] <= start and end <= self.parts[0][0] + len(self.parts[0][1]):
            begin, part = self.parts[0]
            return part[start - begin : end - begin]
        out = bytearray(max(0, end - start))
        for begin, part in self.parts:
            first, last = max(start, begin), min(end, begin + len(part))
            if first < last:
                out[first - start : last - start] = memoryview(part)[first - begin : last - begin]
        return bytes(out)


class Holes:
    """Of the objects of one store. `read` gives the verified content of a block."""

    def __init__(self, index: Index, secret: bytes, read: Callable[[Block], Awaitable[Content]]) -> None:
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
        return self._index.next_place(found.oid, seq, prints_of_zeros(found, step, self._secret), zeros)

    async def _runs_in(self, block: Block) -> Runs:
        runs = self._runs.pop(block.bid, None)
        if runs is None:
            try:
                runs = (await self._read(block)).zeros
            except CorruptRecord:
                return []  # whoever reads it hears of that
        self._runs[block.bid] = runs
        if len(self._runs) > REMEMBERED:
            self._runs.popitem(last=False)
        return runs
