"""Decisions about the memory tier, as pure functions: state in, actions out. No await, no file, no clock of its own.

Watermarks, as shares of the capacity: above HIGH clean objects are evicted down to LOW (write headroom: a burst of new
files finds room without waiting); above FULL new files are staged in the cold tier.
"""

from collections.abc import Container, Hashable, Iterable, Mapping
from dataclasses import dataclass

from cascadefs.types import Object

HIGH, LOW, FULL = 0.80, 0.70, 0.90
AHEAD = 1 / 8  # of the capacity may hold what was read ahead and nobody has asked for yet
# Background work competes with the applications for two things they feel: the control thread and memory bandwidth. It waits
# for a pause in opens, closes and growth, but not for ever.
QUIET_S, PATIENCE_S = 0.03, 5.0
STRAIGHT_BYTES = 4 << 20  # a block: 2 ms of a fast disk, which the sync does not lengthen much


@dataclass(frozen=True, slots=True)
class MemoryState:
    """Bytes of the memory tier; its clean copies (key -> bytes), those of them that are in use, the bytes of the rest."""

    capacity_bytes: int
    used_bytes: int
    clean: Mapping[bytes, int]
    in_use: Container[bytes]
    evictable_bytes: int


def plan_eviction(state: MemoryState, order: Iterable[Hashable], wanted_bytes: int = 0) -> list[bytes]:
    """Keys to evict, in `order`, so that `wanted_bytes` more fit below the high watermark."""
    if state.used_bytes + wanted_bytes <= state.capacity_bytes * HIGH:
        return []
    excess = state.used_bytes + wanted_bytes - state.capacity_bytes * LOW
    chosen: list[bytes] = []
    for key in order:
        if excess <= 0:
            break
        if isinstance(key, bytes) and key in state.clean and key not in state.in_use:
            chosen.append(key)
            excess -= state.clean[key]
    return chosen


def stage_in_memory(capacity_bytes: int, used_bytes: int) -> bool:
    """Whether a new file starts in memory; otherwise in the cold tier's staging folder."""
    return used_bytes < capacity_bytes * FULL


def background_may_run(quiet_s: float, waited_s: float, pressed: bool) -> bool:
    """Whether sealing and flushing may run: `quiet_s` since the last open or close, `waited_s` since there is work."""
    return pressed or quiet_s >= QUIET_S or waited_s >= PATIENCE_S


def may_seal(pressed: bool, unasked: bool, due_s: float, quiet_s: float) -> bool:
    """Whether a closed file is hashed in the background: `due_s` since its time has come, `quiet_s` as above. Not `unasked`:
    only short memory is a reason."""
    return pressed or (unasked and due_s >= 0 and background_may_run(quiet_s, due_s, False))


def goes_straight(size_bytes: int) -> bool:
    """Whether so much, closed and due together, is hashed on its way to the disk. Less is hashed first and written with
    what comes later: each write to an extent is followed by a sync."""
    return size_bytes >= STRAIGHT_BYTES


def may_promote(state: MemoryState, size_bytes: int) -> bool:
    """Whether an object of that size is brought to memory at all: it must not push out more than half of the tier."""
    unmovable = state.used_bytes - state.evictable_bytes
    return size_bytes <= state.capacity_bytes // 2 and unmovable + size_bytes <= state.capacity_bytes


def may_read_ahead(capacity_bytes: int, used_bytes: int, unused_bytes: int, size_bytes: int) -> bool:
    """Whether an object that nobody has asked for may come to memory, beside `unused_bytes` of such: never so much that
    anything is evicted for it, and only a small share of the tier."""
    return used_bytes + size_bytes <= capacity_bytes * HIGH and unused_bytes + size_bytes <= capacity_bytes * AHEAD


def next_in_order(followers: Iterable[Object], here: Container[bytes], limit_bytes: int) -> Object | None:
    """Which of the objects that were written after one is the next to be missed: the first that is not in memory. None: it is
    too large to be brought there, or not near."""
    found = next((each for each in followers if each.digest not in here), None)
    return found if found is not None and found.size_bytes <= limit_bytes else None
