"""Raw reference: copying a block within the memory of a process, the least that storing can cost."""

from collections.abc import Iterator
from contextlib import contextmanager

from cascadefs.bench.compare import kv
from cascadefs.bench.compare.adapter import Pair, Room, Safety, Service, Shape, StorageAdapter, register


@register
class Memcpy(StorageAdapter):
    """Puts into memory that was touched before."""

    name, title, durable, safety, reference = "raw-memcpy", "raw memcpy", "process memory", Safety.PROCESS, True

    @classmethod
    @contextmanager
    def serve(cls, room: Room, shape: Shape) -> Iterator[Service]:
        yield Service("")

    def initialize(self, address: str, rank: int, shape: Shape) -> None:
        self.free = kv.blocks(shape, shape.blocks + 1)
        self.found: dict[str, Pair] = {}

    def put(self, block_id: str, key: memoryview, value: memoryview) -> None:
        mine = self.free.pop()
        mine[0][:], mine[1][:] = key, value
        self.found[block_id] = mine

    def get(self, block_id: str, sink: Pair) -> Pair | None:
        mine = self.found.get(block_id)
        if mine is None:
            return None
        sink[0][:], sink[1][:] = mine
        return sink

    def contains(self, block_id: str) -> bool:
        return block_id in self.found

    def clear(self) -> None:
        self.free += self.found.values()
        self.found.clear()
