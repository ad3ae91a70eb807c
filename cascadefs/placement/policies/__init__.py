"""What to evict, decided by one interchangeable policy.

A policy sees opens and the end of residency, by opaque key, and ranks. It owns no bytes, no clock and never awaits.
"""

from collections.abc import Hashable, Iterable
from typing import Protocol


class EvictionPolicy(Protocol):
    """The contract; every policy runs the same test suite."""

    def touched(self, key: Hashable) -> None:
        """`key` was opened, created or promoted."""

    def found(self, keys: Iterable[Hashable]) -> None:
        """`keys` are resident since an earlier process, in no order."""

    def forgotten(self, key: Hashable) -> None:
        """`key` is no longer resident. Unknown keys are fine."""

    def victims(self) -> Iterable[Hashable]:
        """Resident keys, the one to evict first first. The caller stops when it has enough."""
