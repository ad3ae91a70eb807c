"""What a command tells a mount that lives: to drop or keep its memory, to verify. Owns: the names, and how they are sent.

An attribute of .cascade is set. Where the mount is read-only the kernel refuses that without asking the daemon; there an
attribute is read whose name holds the value, too. Does not know: what the daemon does then (operations.py).
"""

import errno
import os
from pathlib import Path

DROP_MEMORY, KEEP_MEMORY, VERIFY = (f"user.cascade.{what}" for what in ("drop-memory", "keep-memory", "verify"))
NAMES = frozenset(os.fsencode(name) for name in (DROP_MEMORY, KEEP_MEMORY, VERIFY))


def tell(mountpoint: Path, name: str, value: bytes) -> None:
    """OSError when it is not heard."""
    try:
        os.setxattr(mountpoint / ".cascade", name, value)
    except OSError as e:
        if e.errno != errno.EROFS:
            raise
        os.getxattr(mountpoint / ".cascade", os.fsencode(name) + b"=" + value)


def split(name: bytes) -> tuple[bytes, bytes]:
    """Name and value of an attribute that was read to tell something."""
    name, _, value = name.partition(b"=")
    return name, value
