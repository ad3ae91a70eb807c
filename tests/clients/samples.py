"""Bytes for the client tests: cheap to make, different for each seed, the same each time.

Owns nothing. Must stay true: two samples of different seeds differ in every 4 KiB page, so that a page that came from
another file, from an older version or from a hole is always noticed.
"""

import functools

import numpy as np

PAGE = 4096
WORDS_PER_PAGE = PAGE // 8


@functools.cache
def _noise(size: int) -> np.ndarray:
    """Random bytes made once per size: a generator gives 1 GB/s, a copy ten times that."""
    return np.frombuffer(np.random.default_rng(size).bytes(size), dtype=np.uint8)


def sample(seed: int, size: int) -> np.ndarray:
    """`size` bytes of their own for this seed: noise with the seed and the page's number stamped on each page."""
    padded = -(-size // PAGE) * PAGE
    data = _noise(padded).copy()
    words = data.view(np.uint64)
    words[::WORDS_PER_PAGE] = (np.uint64(seed) << np.uint64(32)) + np.arange(padded // PAGE, dtype=np.uint64)
    return data[:size]


def same(found: object, expected: np.ndarray) -> bool:
    """True if the buffer `found` holds exactly those bytes; unlike an assert on bytes it never prints megabytes."""
    return np.array_equal(np.frombuffer(found, dtype=np.uint8), expected)  # type: ignore[call-overload]
