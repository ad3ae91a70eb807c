"""Decisions about the memory tier, as pure functions: state in, actions out. No await, no file, no clock of its own.

Watermarks, as shares of the capacity: above HIGH clean objects are evicted down to LOW (write headroom: a burst of new
files finds room without waiting); above FULL new files are staged in the cold tier.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

HIGH, LOW, FULL = 0.80, 0.70, 0.90


@dataclass(frozen=True, slots=True)
class MemoryState:
    """Bytes of the memory tier, and of the copies that may go (`evictable`: key -> bytes)."""

    capacity_bytes: int
    used_bytes: int
    evictable: Mapping[Hashable, int]


def plan_eviction(state: MemoryState, order: Iterable[Hashable], wanted_bytes: int = 0) -> list[Hashable]:
    """Keys to evict, in `order`, so that `wanted_bytes` more fit below the high watermark."""
    if state.used_bytes + wanted_bytes <= state.capacity_bytes * HIGH:
        return []
    excess = state.used_bytes + wanted_bytes - state.capacity_bytes * LOW
    chosen: list[Hashable] = []
    for key in order:
        if excess <= 0:
            break
        if key in state.evictable:
            chosen.append(key)
            excess -= state.evictable[key]
    return chosen


def stage_in_memory(state: MemoryState) -> bool:
    """Whether a new file starts in memory; otherwise in the cold tier's staging folder."""
    return state.used_bytes < state.capacity_bytes * FULL


def may_promote(state: MemoryState, size_bytes: int) -> bool:
    """Whether an object of that size is brought to memory at all: it must not push out more than half of the tier."""
    freeable = sum(state.evictable.values())
    return size_bytes <= state.capacity_bytes // 2 and state.used_bytes - freeable + size_bytes <= state.capacity_bytes
