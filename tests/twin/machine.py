"""The random walk: hypothesis draws operations, and now and then what a store does behind them (seal, evict, restart, die).

Owns: the rules and how they choose names, sizes and contents. Knows the mount only by `Plant`, which can flush, evict,
restart and kill it. Invariant: a rule does one thing to both sides and compares; it never repairs a difference.
"""

import os
import shutil
from typing import Any, ClassVar, Protocol

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from .by_handle import ByHandle
from .by_name import ByName
from .choosing import BIG, PICK, Draw, content
from .sides import JUDGE, MOUNT, Sides

ON_MAPPINGS = ["unmap", "write_mapped", "read_mapped"]
ON_HANDLES = ["close", "write", "read", "ftruncate", "fallocate", "lseek", "seek_content", "fsync", "copy_range", "map"]
ON_NAMES = ["mkdir", "rmdir", "unlink", "link", "rename", "symlink", "mknod", "listdir", "statfs"]
ATTRIBUTES = ["chmod", "chown", "utimens", "setxattr", "removexattr"]
CONTENTS = ["write_file", "write_file", "read_file", "truncate", "copy", "open", "open", "open"]
BEHIND = ["compare", "contents", "seal", "seal", "seal", "settle"]
# One in 700 restarts the mount, one in 90 pushes everything out of memory, one in 30 kills the worker: 2, 0.2 and 0.1 seconds.
# hypothesis likes the first of a list best.
MOVES = [*CONTENTS, *ON_NAMES, *ATTRIBUTES, *ON_HANDLES, *ON_HANDLES, *ON_MAPPINGS, *ON_MAPPINGS, *BEHIND]
MOVES = [*MOVES * 11, *["flush", "evict"] * 8, *["kill_worker"] * 22, "restart"]


class Plant(Protocol):
    """What can be done to the mount behind the operations."""

    def fresh_roots(self) -> tuple[Any, Any]: ...
    def seal(self, path: Any) -> None: ...
    def settle(self) -> None: ...
    def flush(self) -> None: ...
    def evict(self) -> None: ...
    def restart(self, cold: bool) -> None: ...
    def kill_worker(self) -> None: ...
    def replaces_workers(self) -> bool: ...


class Walk(ByName, ByHandle, RuleBasedStateMachine):
    """See the file's head. `plant` is set by whoever runs it; `counts` tells what was done, over all examples."""

    plant: ClassVar[Plant]
    counts: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.sides = Sides(self.plant.fresh_roots())
        for side in (MOUNT, JUDGE):
            self.furnish(side)

    def furnish(self, side: int) -> None:
        """Something to start with: two equal files, one under two names, one of more than a block, a folder."""
        for folder in ("d", "d/e"):
            os.mkdir(self.sides.at(side, folder))
        for path, what in (("a", (70_001, 1)), ("b", (70_001, 1)), ("d/a", (BIG, 2)), ("d/e/a", (0, 0))):
            with open(self.sides.at(side, path), "wb") as file:
                file.write(content(*what))
        os.link(self.sides.at(side, "b"), self.sides.at(side, "d/b"))

    def teardown(self) -> None:
        sides = self.sides
        try:
            sides.compare_all(contents=True)
        finally:
            sides.close_all()
            for root in sides.roots:
                shutil.rmtree(root)

    def count(self, what: str) -> None:
        for key in (what, "steps"):
            self.counts[key] = self.counts.get(key, 0) + 1

    @rule(what=st.sampled_from(MOVES), data=st.data())
    def step(self, what: str, data: Any) -> None:
        """One operation; those on handles and mappings need some."""
        if what in ON_MAPPINGS and not self.sides.mappings:
            what = "map"
        if what in ON_HANDLES and len(self.sides.handles) < 1 + (what == "copy_range"):
            what = "open"
        if what == "kill_worker" and not self.plant.replaces_workers():
            what = "compare"
        self.count(what)
        self.sides.trace.append(what)
        try:
            getattr(self, what)(data.draw)
        except AssertionError as e:
            e.add_note("the last operations:\n  " + "\n  ".join(self.sides.trace[-120:]))
            raise

    # --- what a store does behind the operations

    def compare(self, draw: Draw) -> None:
        self.sides.compare_all(contents=False)

    def contents(self, draw: Draw) -> None:
        self.sides.compare_all(contents=True)

    def seal(self, draw: Draw) -> None:
        self.plant.seal(self.sides.at(MOUNT, self.file(draw(PICK))))

    def settle(self, draw: Draw) -> None:
        self.plant.settle()
        self.sides.compare_all(contents=False)

    def flush(self, draw: Draw) -> None:
        self.plant.flush()
        self.sides.compare_all(contents=False)

    def evict(self, draw: Draw) -> None:
        self.plant.evict()
        self.sides.compare_all(contents=False)

    def restart(self, draw: Draw) -> None:
        """Unmount and mount again, seldom: it costs two seconds."""
        cold = draw(st.booleans())
        self.sides.close_all()
        self.plant.restart(cold)
        self.sides.compare_all(contents=True)

    def kill_worker(self, draw: Draw) -> None:
        """SIGKILL, with everything open. What comes next meets the death: a look at everything, or the next operation."""
        look = draw(st.booleans())
        self.plant.kill_worker()
        if look:
            self.sides.compare_all(contents=False)
