"""What the moves of the random walk are drawn from: names, sizes, contents, flags; and how a move is done and compared.

Owns: the pools. Knows nothing of a store.
"""

import os
import random
import stat
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

from hypothesis import strategies as st

from . import calls
from .sides import JUDGE, Opened, Sides

NAMES = ["a", "b", "c", "d", "d/a", "d/b", "d/e", "d/e/a", "f", "f/a", "f/b", "n" * 255]
ODD_NAMES = ["m" * 256, "d/", "a/x", "f/../b", ".", "d/..", "missing/a", "d/e/", "."]
SIZES = [0, 1, 7, 4095, 4096, 4097, 10_000, 65_536, 70_001, 300_000]
BIG = 5 * 1024 * 1024 + 3  # more than one block, more than the machine's promote limit
OFFSETS = [0, 0, 0, 1, 100, 4096, 8191, 65_536, 200_000, 1 << 20]
MODES = [0o000, 0o400, 0o600, 0o644, 0o755, 0o777, 0o2755, 0o4755, 0o6711, 0o1777]
TIMES = [(0, 0), (1, 1), (1_000_000_007, 123_456_789), (4_294_967_296, 5), (0, calls.UTIME_OMIT), (0, calls.UTIME_NOW), (-7, 0)]
XATTRS = ["user.a", "user.b", "trusted.t", "security.s", "user." + "x" * 250, "user.", "plain"]  # no ACLs: README
ACCESS = [os.O_RDONLY, os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR]
FLAGS = [0, 0, 0, os.O_CREAT, os.O_CREAT, os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_NOFOLLOW, os.O_DIRECTORY, os.O_DIRECT]
Draw: TypeAlias = Callable[[Any], Any]
PICK = st.integers(0, 1 << 16)
CONTENT = st.tuples(st.sampled_from([*SIZES, *SIZES, *SIZES, BIG]), st.integers(0, 2))


@lru_cache(64)
def content(size: int, seed: int) -> bytes:
    """Few different contents, so that files are often equal; seed 0 is zeros."""
    return random.Random(seed).randbytes(size) if seed else bytes(size)


class Choosing:
    """A walk's hands: picks names and handles, does one operation on both sides."""

    sides: Sides

    def name(self, pick: int) -> str:
        """Mostly a name that exists, else one that could, now and then one that cannot."""
        kind, rest = pick % 8, pick // 8
        existing = list(self.sides.walk()) if kind < 5 else []
        pool = existing or (ODD_NAMES if kind == 7 and rest % 4 == 0 else NAMES)
        return pool[rest % len(pool)]

    def file(self, pick: int) -> str:
        """A regular file, if there is one."""
        files = [path for path in self.sides.walk() if stat.S_ISREG(os.lstat(self.sides.at(JUDGE, path)).st_mode)]
        return files[pick % len(files)] if files else NAMES[pick % len(NAMES)]

    def opened(self, pick: int) -> Opened:
        return self.sides.handles[pick % len(self.sides.handles)]

    def did(self, what: str, path: str, call: Callable[[int], Any]) -> tuple[str, Any]:
        """One operation on a name: same result, same attributes afterwards, a sane ctime."""
        with self.sides.change_is_stamped(path):
            result = self.sides.both(f"{what} {path!r}", call)
        self.sides.compare_name(path)
        return result
