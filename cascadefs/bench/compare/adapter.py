"""What a system must offer to be compared, and the list of those that do.

Owns: the contract and the registry. Does not know any system, nor how figures are taken. The contract:
(1) An adapter object belongs to one rank; ranks are processes. What they share (a server, a mount) is made by serve(), in
    the parent, and reaches them as `address`.
(2) When put() has returned, get() finds the block; how safe it is then, `durable` says in words and `safety` in order.
(3) get() returns key and value, in `sink` or in memory of the system's own, valid until recycle(); None if there is none.
(4) stage() and recycle() are outside the clock: in an engine the device copies into the memory that a system insists on.
(5) After cool() of the adapter, then of the service, the next get() reads the medium, not memory. A Service without cool()
    has no medium below memory.
"""

import importlib
import os
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import ClassVar

from cascadefs.bench.targets import Note

LAYERS, HEADS, HEAD_SIZE, VALUE_BYTES = 80, 8, 128, 2  # LLaMA-70B, float16
HALF_TOKEN_BYTES = LAYERS * HEADS * HEAD_SIZE * VALUE_BYTES  # the keys of one token, or its values: 160 KiB
DISK_BLOCK = 512  # unit of st_blocks

Pair = tuple[memoryview, memoryview]


class Safety(IntEnum):
    """What a block survives when put() has returned."""

    PROCESS = 0  # nothing: it lies in the memory of a process
    KERNEL = 1  # the death of every process that took part: tmpfs, page cache
    DEVICE = 2  # handed to the device, not yet told to be durable
    SYNCED = 3  # the loss of power


@dataclass(frozen=True)
class Shape:
    """How much each of `ranks` processes puts: `blocks` blocks of `tokens` tokens. `duplicates`: see kv.py."""

    ranks: int
    tokens: int
    blocks: int
    duplicates: float = 0.25

    @property
    def half_bytes(self) -> int:
        """The keys of a block, or its values."""
        return self.tokens * HALF_TOKEN_BYTES

    @property
    def block_bytes(self) -> int:
        """Keys and values."""
        return 2 * self.half_bytes

    @property
    def rank_bytes(self) -> int:
        """What one rank puts."""
        return self.blocks * self.block_bytes

    @property
    def total_bytes(self) -> int:
        """What all ranks put."""
        return self.ranks * self.rank_bytes


@dataclass(frozen=True)
class Room:
    """Where systems may lie: `disk` the cold medium, `memory` a tmpfs of 4 KiB pages, `huge` one of huge pages."""

    disk: Path
    memory: Path
    huge: Path | None
    cli: tuple[str, ...] | None
    note: Note


@dataclass(frozen=True)
class Service:
    """What all ranks share. `stored_bytes`: what the system occupies once everything is flushed; None: cannot be told."""

    address: str
    cool: Callable[[], None] | None = None
    stored_bytes: Callable[[], int | None] = lambda: None


class StorageAdapter(ABC):
    """One rank's client of one system."""

    name: ClassVar[str]
    title: ClassVar[str]
    durable: ClassVar[str]
    safety: ClassVar[Safety]
    reference: ClassVar[bool] = False  # a raw reference, not a system that anybody would use as it is

    @classmethod
    def missing(cls) -> str | None:
        """Why the system cannot run here; asked in the parent, so it must be cheap."""
        return None

    @classmethod  # noqa: B027 - optional
    def load(cls) -> None:
        """Import what takes long. Called once, before the ranks are forked."""

    @classmethod
    @contextmanager
    def serve(cls, room: Room, shape: Shape) -> Iterator[Service]:
        """Start what the ranks share. The default is a folder on the disk."""
        yield folder_service(room.disk / cls.name)

    @abstractmethod
    def initialize(self, address: str, rank: int, shape: Shape) -> None:
        """Get ready: connect, allocate."""

    def stage(self, block_id: str, key: memoryview, value: memoryview) -> None:  # noqa: B027 - optional
        """The data of a put() that follows: bring it where the system wants it. Not measured."""

    @abstractmethod
    def put(self, block_id: str, key: memoryview, value: memoryview) -> None:
        """Store a block under a name that was never used."""

    @abstractmethod
    def get(self, block_id: str, sink: Pair) -> Pair | None:
        """Keys and values of a block, wherever they lie; None when it is not there."""

    @abstractmethod
    def contains(self, block_id: str) -> bool:
        """Whether get() would find it."""

    def flush(self) -> None:  # noqa: B027 - optional
        """Make what this rank put as durable as the system can."""

    @abstractmethod
    def clear(self) -> None:
        """Remove what this rank put."""

    def cool(self) -> None:  # noqa: B027 - optional
        """Forget what this process caches, after flush()."""

    def recycle(self) -> None:  # noqa: B027 - optional
        """What get() returned is not needed any more. Not measured."""

    def close(self) -> None:  # noqa: B027 - optional
        """Disconnect; nothing is called afterwards."""


_systems: dict[str, type[StorageAdapter]] = {}


def register(system: type[StorageAdapter]) -> type[StorageAdapter]:
    """Class decorator: the system takes part."""
    assert system.name not in _systems, f"two systems are called {system.name}"
    _systems[system.name] = system
    return system


def all_systems() -> dict[str, type[StorageAdapter]]:
    """Every system by name: the modules of systems/ in the order of their names."""
    from cascadefs.bench.compare import systems

    for module in sorted(found.name for found in pkgutil.iter_modules(systems.__path__)):
        importlib.import_module(f"{systems.__name__}.{module}")
    return dict(_systems)


def split(whole: memoryview) -> Pair:
    """A block that is one buffer: keys, then values."""
    half = len(whole) // 2
    return whole[:half], whole[half:]


def not_importable(*modules: str) -> str | None:
    """The reason why not all of these can be imported."""
    for module in modules:
        try:
            found = importlib.util.find_spec(module)
        except ImportError:
            found = None
        if found is None:
            return f"not installed: no module {module} (make bench-deps)"
    return None


def occupied_bytes(folder: Path) -> int:
    """What the files below a folder occupy."""
    return sum(path.stat().st_blocks * DISK_BLOCK for path in folder.rglob("*") if path.is_file())


def sync_files(paths: Iterable[Path]) -> None:
    """fsync of each."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def drop_page_cache(folder: Path) -> None:
    """Nothing below `folder` stays in the page cache. Dirty pages would: they are written first."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def folder_service(folder: Path, has_medium: bool = True) -> Service:
    """A fresh folder; on a tmpfs (`has_medium` false) nothing can be cooled."""
    folder.mkdir()
    return Service(str(folder), (lambda: drop_page_cache(folder)) if has_medium else None, lambda: occupied_bytes(folder))
