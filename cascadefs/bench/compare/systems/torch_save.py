"""torch.save and torch.load: what swapping KV blocks to files comes to when one writes it down in PyTorch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cascadefs.bench.compare.adapter import (
    HEAD_SIZE,
    HEADS,
    LAYERS,
    Pair,
    Room,
    Safety,
    Service,
    Shape,
    StorageAdapter,
    folder_service,
    not_importable,
    register,
    sync_files,
)


def _bytes(tensor: Any) -> memoryview:
    return memoryview(tensor.numpy()).cast("B")


@register
class TorchSave(StorageAdapter):
    """A file for each block, on disk."""

    name, title = "torch-save", "torch.save, disk"
    durable, safety = "page cache", Safety.KERNEL

    @classmethod
    def missing(cls) -> str | None:
        return not_importable("torch")

    @classmethod
    def load(cls) -> None:
        import torch

        torch.set_num_threads(1)  # the ranks are the parallelism; and a pool of threads does not survive a fork

    def initialize(self, address: str, rank: int, shape: Shape) -> None:
        self.folder, self.mine = Path(address), list[Path]()
        self.shape = (LAYERS, shape.tokens, HEADS, HEAD_SIZE)

    def _tensor(self, view: memoryview) -> Any:
        import torch

        return torch.frombuffer(view, dtype=torch.float16).reshape(self.shape)

    def path(self, block_id: str) -> Path:
        """Where a block lies."""
        return self.folder / f"{block_id}.pt"

    def put(self, block_id: str, key: memoryview, value: memoryview) -> None:
        import torch

        torch.save({"key": self._tensor(key), "value": self._tensor(value)}, self.path(block_id))
        self.mine.append(self.path(block_id))

    def get(self, block_id: str, sink: Pair) -> Pair | None:
        import torch

        try:
            found = torch.load(self.path(block_id), weights_only=True)
        except FileNotFoundError:
            return None
        return _bytes(found["key"]), _bytes(found["value"])

    def contains(self, block_id: str) -> bool:
        return self.path(block_id).exists()

    def flush(self) -> None:
        sync_files(self.mine)

    def clear(self) -> None:
        for path in self.mine:
            path.unlink()
        self.mine.clear()


@register
class TorchSaveTmpfs(TorchSave):
    """A file for each block, on a tmpfs."""

    name, title, durable = "torch-save-tmpfs", "torch.save, tmpfs", "tmpfs"

    @classmethod
    @contextmanager
    def serve(cls, room: Room, shape: Shape) -> Iterator[Service]:
        yield folder_service(room.memory / cls.name, has_medium=False)
