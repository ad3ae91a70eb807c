"""Named places at which a test may kill the process, as kill -9 would: between two steps that belong together.

Owns: the names (POINTS) and the plan of this process. In a process without a plan a point costs one comparison. Invariant:
a line of a plan is used by one process only: the next one must not die of it again.
"""

import os
import signal
from pathlib import Path

POINTS = (
    "created",  # the name is committed, the staged file is not there yet
    "entering",  # the kernel was told of new files, the index does not know them yet
    "entered",  # and now it does; nobody has settled them
    "staged",  # an object's bytes have a staged name, the row does not say so yet
    "leased",  # sealing: nobody writes any more
    "hashed",  # sealing: the content is known, nothing has changed yet
    "adopted",  # sealing: the file has its object name, the row does not say so yet
    "sealed",  # sealing: the row says so, the staged name is still there
    "written",  # records are in the extent, not synced
    "appended",  # records are synced, the index does not know them
    "placed",  # the index knows them, the objects are not durable yet
    "extent sealed",  # the extent has its footer, the index does not know it
    "durable",  # objects are durable by the index, which is not synced
    "promoted",  # the bytes are in memory, without a name
    "evicted",  # a clean copy is gone
    "unlinked",  # the name is gone, the inode and its content are not
    "deleted",  # the inode is gone, its file is not
    "forgotten",  # dead records are out of the index, not punched
    "commit",  # a transaction is about to be committed
    "committed",  # and is, nobody knows yet
    "answer",  # a handler is done, the kernel has not heard of it
    "checkpoint",  # the write-ahead log is about to be moved into the database
)

_name, _left, _report = "", 0, ""


def arm(plan: Path) -> None:
    """Take the first line of a plan ("NUMBER POINT": die when POINT is passed for the NUMBERth time)."""
    global _name, _left, _report
    lines = plan.read_text().splitlines() if plan.exists() else []
    if not lines:
        return
    plan.write_text("\n".join(lines[1:]))
    number, _, _name = lines[0].partition(" ")
    if _name not in POINTS:
        raise ValueError(f"{plan}: no point is called {_name!r}")
    _left, _report = int(number), f"{plan}.passed"


def point(name: str) -> None:
    """This is point `name`."""
    if name == _name:
        _count()


def _count() -> None:
    global _left
    _left -= 1
    if _left == 0:
        fd = os.open(_report, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, f"{_name}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)
