"""Steers the injection of shim.c through the file that both map: which calls are counted, which of them fails and how."""

import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

KINDS = ("OPEN", "CREATE", "READ", "WRITE", "TRUNCATE", "SYNC", "RENAME", "UNLINK", "LINK", "MKDIR", "PUNCH", "SEND")
TIERS = ("NONE", "EXTENTS", "PARKING", "INDEX", "IDENTITY", "MEMORY", "FOLDER")
DISK = ("EXTENTS", "PARKING", "INDEX", "IDENTITY", "FOLDER")
OFF, FAIL, SHORT, DELAY = range(4)
FOREVER = 1 << 40
DELAY_US = 2000
TRACE_MAX = 65536
_CONTROL = struct.Struct("<QQqqiiQQQ")  # struct control of shim.c, without its trace


@dataclass(frozen=True)
class Fault:
    """What happens at a call: mode, errno, and to which kinds of call in which tiers it can happen."""

    name: str
    mode: int
    error: int
    kinds: tuple[str, ...]
    tiers: tuple[str, ...]
    lasts: bool = False


class Control:
    """One mapped file. Created when missing."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(_CONTROL.size + TRACE_MAX))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _CONTROL.size + TRACE_MAX)

    def arm(self, fault: Fault, at: int | None, delay_us: int = DELAY_US) -> None:
        """Count the calls that the fault can meet, from 0; it happens at call `at` (None: only count). `delay_us`: of DELAY."""
        first = FOREVER if at is None else at
        count = FOREVER if fault.lasts else 1
        masks = _mask(KINDS, fault.kinds), _mask(TIERS, fault.tiers)
        self._map[: _CONTROL.size] = _CONTROL.pack(*masks, first, count, fault.mode, fault.error, delay_us, 0, 0)

    def off(self) -> None:
        """Nothing fails and nothing is counted any more; the counts stay."""
        seen, fired = self.seen, self.fired
        self._map[: _CONTROL.size] = _CONTROL.pack(0, 0, 0, 0, OFF, 0, 0, seen, fired)

    @property
    def seen(self) -> int:
        """Calls counted since arm()."""
        return int(_CONTROL.unpack_from(self._map)[7])

    @property
    def fired(self) -> int:
        """Calls that met the fault."""
        return int(_CONTROL.unpack_from(self._map)[8])

    def sites(self) -> list[str]:
        """Kind and tier of each counted call, such as "WRITE EXTENTS"."""
        trace = self._map[_CONTROL.size : _CONTROL.size + min(self.seen, TRACE_MAX)]
        return [f"{KINDS[code >> 3]} {TIERS[code & 7]}" for code in trace]


def _mask(names: Iterable[str], chosen: Iterable[str]) -> int:
    return sum(1 << at for at, name in enumerate(names) if name in chosen)
