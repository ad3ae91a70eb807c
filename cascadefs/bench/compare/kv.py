"""Data that looks like a KV cache: float16 values of a normal distribution, some blocks with the same content.

Owns: what a block contains. Does not know who stores it. Invariants:
(1) A content is a function of its number and the seed alone: every process makes the same one.
(2) Contents of two numbers or two seeds differ in each STAMP_BYTES, so deduplication finds only what it should.
"""

import struct

import numpy as np

from cascadefs.bench.compare.adapter import Pair, Shape, split
from cascadefs.bench.io import KIB, MIB, STAMP_BYTES
from cascadefs.media.transfers import page_buffer

POOL_BYTES = 4 * MIB  # far more than any compressor's window that is used here
STEP = 2 * KIB  # a piece begins at a multiple of this in the pool: finding the same piece twice is rare
SHARED_COPIES = 4  # a content that is not unique occurs about so often
_STAMP = struct.Struct("<QII")
_SPREAD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: neighbouring numbers land far apart
_MASK = (1 << 64) - 1


class KvData:
    """Makes contents. The pool is made once, before the ranks are forked."""

    def __init__(self) -> None:
        values = np.random.default_rng(70).standard_normal((POOL_BYTES + STAMP_BYTES) // 2, dtype=np.float32)
        self._pool = memoryview(values.astype(np.float16).view(np.uint8))  # type: ignore[arg-type]
        self._starts = POOL_BYTES // STEP

    def fill(self, view: memoryview, content: int, seed: int) -> None:
        """Write content number `content` into `view`."""
        for number, offset in enumerate(range(0, len(view), STAMP_BYTES)):
            mixed = ((content << 20) + number + seed) * _SPREAD & _MASK
            start = (mixed >> 32) % self._starts * STEP
            length = min(STAMP_BYTES, len(view) - offset)
            view[offset : offset + length] = self._pool[start : start + length]
            _STAMP.pack_into(view, offset, seed & _MASK, content, number)


def contents(shape: Shape) -> list[list[int]]:
    """The content numbers of each rank's blocks: `duplicates` is the share of blocks that are not unique."""
    total, share = shape.ranks * shape.blocks, shape.duplicates
    repeated = [place for place in range(total) if int((place + 1) * share) > int(place * share)]
    distinct = max(1, -(-len(repeated) // SHARED_COPIES))
    numbers = list(range(total))
    for order, place in enumerate(repeated):
        numbers[place] = total + order % distinct
    return [numbers[rank * shape.blocks : (rank + 1) * shape.blocks] for rank in range(shape.ranks)]


def unique_bytes(shape: Shape) -> int:
    """What perfect deduplication would store."""
    return len({number for numbers in contents(shape) for number in numbers}) * shape.block_bytes


def buffer(size_bytes: int) -> memoryview:
    """Page-aligned memory that is there: every page was touched. Huge pages where the kernel gives them, as an engine's."""
    view = memoryview(page_buffer(size_bytes))
    zero(view)
    return view


def zero(view: memoryview) -> None:
    """Nothing of an earlier read stays."""
    np.frombuffer(view, np.uint8).fill(0)


def wholes(shape: Shape, count: int) -> list[memoryview]:
    """Buffers for `count` blocks."""
    memory, size = buffer(count * shape.block_bytes), shape.block_bytes
    return [memory[number * size : (number + 1) * size] for number in range(count)]


def blocks(shape: Shape, count: int) -> list[Pair]:
    """The same as keys and values, those of a block behind each other."""
    return [split(whole) for whole in wholes(shape, count)]


def same(left: Pair, right: Pair) -> bool:
    """Byte for byte."""
    return all(
        len(one) == len(other) and np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8))
        for one, other in zip(left, right, strict=True)
    )
