"""Least recently used: the plain baseline. Invariant: the order of the dict is the order of the last touch."""

from collections.abc import Hashable, Iterable


class Lru:
    """An EvictionPolicy; O(1) per event."""

    def __init__(self) -> None:
        self._order: dict[Hashable, None] = {}

    def touched(self, key: Hashable) -> None:
        """Move to the young end."""
        self._order.pop(key, None)
        self._order[key] = None

    def found(self, keys: Iterable[Hashable]) -> None:
        """In the order given."""
        self._order.update(dict.fromkeys(keys))

    def forgotten(self, key: Hashable) -> None:
        """Take out of the order."""
        self._order.pop(key, None)

    def victims(self) -> Iterable[Hashable]:
        """Oldest first. A view: do not touch while iterating."""
        return iter(self._order)
