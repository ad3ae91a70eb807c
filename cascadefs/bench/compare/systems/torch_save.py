"""torch.save and torch.load: what swapping KV blocks to files comes to when one writes it down in PyTorch."""

from pathlib import Path
from typing import Any

from cascadefs.bench.compare.adapter import HEAD_SIZE, HEADS, LAYERS, Pair, Safety, Shape, not_importable, register
from cascadefs.bench.compare.own_files import OnTmpfs, OwnFiles


def _bytes(tensor: Any) -> memoryview:
    return memoryview(tensor.numpy()).cast("B")


@register
class TorchSave(OwnFiles):
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


@register
class TorchSaveTmpfs(OnTmpfs, TorchSave):
    """A file for each block, on a tmpfs."""

    name, title = "torch-save-tmpfs", "torch.save, tmpfs"
