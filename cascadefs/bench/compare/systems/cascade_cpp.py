"""Cascade C++: the ancestor's own module `cascade_cpp`, where it was built. Its store keeps blocks in the memory of a process
and appends them to files of its own; a store belongs to one rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cascadefs.bench.compare.adapter import Pair, Room, Safety, Service, Shape, StorageAdapter, not_importable, register, split


@register
class CascadeCpp(StorageAdapter):
    """put() and get() take one array of bytes: stage() joins keys and values."""

    name, title, durable, safety = "cascade-cpp", "Cascade C++", "process memory", Safety.PROCESS

    @classmethod
    def missing(cls) -> str | None:
        missing = not_importable("cascade_cpp")
        return missing and "not installed: no module cascade_cpp (the ancestor, to be built)"

    @classmethod
    @contextmanager
    def serve(cls, room: Room, shape: Shape) -> Iterator[Service]:
        """No cool(): its memory cannot be dropped without dropping the blocks."""
        folder = room.disk / cls.name
        folder.mkdir()
        yield Service(str(folder))

    def initialize(self, address: str, rank: int, shape: Shape) -> None:
        import cascade_cpp

        folder, config = Path(address) / f"rank-{rank}", cascade_cpp.CascadeConfig()
        folder.mkdir()
        config.use_gpu, config.dedup_enabled, config.compression_enabled = False, True, False
        config.shm_capacity_bytes = 2 * shape.rank_bytes + shape.block_bytes
        config.shm_path, config.lustre_path = str(folder / "shm"), str(folder / "lustre")
        self.store: Any = cascade_cpp.CascadeStore(config)
        self.staged: dict[str, Any] = {}

    def stage(self, block_id: str, key: memoryview, value: memoryview) -> None:
        self.staged[block_id] = np.concatenate([np.frombuffer(key, np.uint8), np.frombuffer(value, np.uint8)])

    def put(self, block_id: str, key: memoryview, value: memoryview) -> None:
        if block_id not in self.staged:
            self.stage(block_id, key, value)
        if not self.store.put(block_id, self.staged.pop(block_id)):
            raise OSError(f"cascade_cpp did not take {block_id}")

    def get(self, block_id: str, sink: Pair) -> Pair | None:
        if not self.store.contains(block_id):
            return None
        whole: Any = np.empty(len(sink[0]) + len(sink[1]), np.uint8)
        found, size = self.store.get(block_id, whole)
        return split(memoryview(whole)) if found and size == len(whole) else None

    def contains(self, block_id: str) -> bool:
        return bool(self.store.contains(block_id))

    def flush(self) -> None:
        self.store.flush()

    def clear(self) -> None:
        self.store.clear()
