"""What a check found, in plain words. Owns no check and no repair."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Progress = Callable[[str, int, int], None]  # what is looked at, done, in all


@dataclass(frozen=True)
class Finding:
    """One damage. `paths`: files that it hurts. `heal`: name of a method of repair.Repairer and its arguments, or None."""

    check: str
    what: str
    paths: tuple[str, ...] = ()
    heal: tuple[str, tuple[object, ...]] | None = None


@dataclass
class Report:
    """All findings of a run; `notes` are leftovers that the next mount clears away by itself, no damage."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bytes_read: int = 0

    def add(self, check: str, what: str, paths: tuple[str, ...] = (), heal: str | None = None, *arguments: object) -> None:
        """One more finding."""
        self.findings.append(Finding(check, what, paths, (heal, arguments) if heal else None))


@dataclass(frozen=True)
class Places:
    """Where the parts of a store lie."""

    store: Path
    memory: Path

    @property
    def extents(self) -> Path:
        """The packed records."""
        return self.store / "extents"

    def tiers(self) -> tuple[tuple[str, Path, int], ...]:
        """(what, folder, the number that inodes.home has for it)."""
        return ("the memory tier", self.memory, 1), ("parking", self.store / "parking", 2)
