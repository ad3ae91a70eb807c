"""cascadefs as a library (cascadefs/library.py), without FUSE. A store belongs to one process, so each rank has its own; equal
contents are found within a rank only."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cascadefs.bench.compare.adapter import Pair, Room, Safety, Service, Shape, StorageAdapter, occupied_bytes, register
from cascadefs.bench.compare.systems.cascade_mount import SPARE_BYTES
from cascadefs.bench.targets import unmount
from cascadefs.config import Settings
from cascadefs.library import Library


@register
class CascadeLibrary(StorageAdapter):
    """A store for each rank."""

    name, title = "cascadefs-library", "cascadefs, library"
    durable, safety = "tmpfs, soon disk", Safety.KERNEL

    @classmethod
    @contextmanager
    def serve(cls, room: Room, shape: Shape) -> Iterator[Service]:
        folder, memory = room.disk / cls.name, room.memory / cls.name
        folder.mkdir()
        memory.mkdir()
        try:
            yield Service(
                os.pathsep.join((str(folder), str(memory))),
                lambda: None,
                lambda: sum(occupied_bytes(store / "extents") for store in folder.iterdir()),
            )
        finally:
            for tier in memory.iterdir():  # of a rank that was killed
                if tier.is_mount():
                    unmount(tier, ["umount", str(tier)], room.note)

    def initialize(self, address: str, rank: int, shape: Shape) -> None:
        folder, memory = map(Path, address.split(os.pathsep))
        shm_size = 2 * shape.rank_bytes + SPARE_BYTES
        self.settings = Settings(store=folder / f"rank-{rank}", shm_dir=memory, shm_size=shm_size)
        self.library = Library(self.settings)
        self.mine: list[str] = []

    def put(self, block_id: str, key: memoryview, value: memoryview) -> None:
        self.library.put(block_id, key, value)
        self.mine.append(block_id)

    def get(self, block_id: str, sink: Pair) -> Pair | None:
        try:
            done = self.library.get_into(block_id, *sink)
        except FileNotFoundError:
            return None
        return sink if done == sum(map(len, sink)) else None

    def contains(self, block_id: str) -> bool:
        return self.library.contains(block_id)

    def flush(self) -> None:
        self.library.flush()

    def cool(self) -> None:
        self.library.close(drop_memory=True)
        self.library = Library(self.settings)

    def clear(self) -> None:
        for block_id in self.mine:
            self.library.remove(block_id)
        self.mine.clear()

    def close(self) -> None:
        self.library.close(drop_memory=True)
