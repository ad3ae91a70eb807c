"""Raw reference: all blocks of all ranks in one file, written and read with O_DIRECT: the disk without a filesystem's help."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from cascadefs.bench.compare.adapter import Pair, Room, Safety, Service, Shape, StorageAdapter, occupied_bytes, register


@register
class AggregatedFile(StorageAdapter):
    """Each rank has a region of the file; where a block lies only its rank knows."""

    name, title, reference = "raw-odirect", "raw aggregated O_DIRECT file", True
    durable, safety = "device, O_DIRECT", Safety.DEVICE

    @classmethod
    @contextmanager
    def serve(cls, room: Room, shape: Shape) -> Iterator[Service]:
        folder = room.disk / cls.name
        folder.mkdir()
        with open(folder / "blocks", "xb") as file:
            os.ftruncate(file.fileno(), shape.ranks * (shape.blocks + 1) * shape.block_bytes)
        # O_DIRECT passes by the page cache: there is nothing to cool.
        yield Service(str(folder / "blocks"), lambda: None, lambda: occupied_bytes(folder))

    def initialize(self, address: str, rank: int, shape: Shape) -> None:
        self.fd = os.open(address, os.O_RDWR | os.O_DIRECT)
        self.block_bytes = shape.block_bytes
        first = rank * (shape.blocks + 1)
        self.free = [number * shape.block_bytes for number in range(first + shape.blocks, first - 1, -1)]
        self.offsets: dict[str, int] = {}

    def put(self, block_id: str, key: memoryview, value: memoryview) -> None:
        offset = self.free.pop()
        if os.pwritev(self.fd, [key, value], offset) != self.block_bytes:
            raise OSError("short write")
        self.offsets[block_id] = offset

    def get(self, block_id: str, sink: Pair) -> Pair | None:
        offset = self.offsets.get(block_id)
        if offset is None:
            return None
        return sink if os.preadv(self.fd, list(sink), offset) == self.block_bytes else None

    def contains(self, block_id: str) -> bool:
        return block_id in self.offsets

    def flush(self) -> None:
        os.fdatasync(self.fd)

    def clear(self) -> None:
        self.free += self.offsets.values()
        self.offsets.clear()

    def close(self) -> None:
        os.close(self.fd)
