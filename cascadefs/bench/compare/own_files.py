"""What several adapters share: blocks that are files of this rank's, and a folder on a tmpfs instead of the disk."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cascadefs.bench.compare.adapter import Room, Safety, Service, Shape, StorageAdapter, folder_service, sync_files


class OwnFiles(StorageAdapter):
    """A file for each block; `mine` are those that this rank has put."""

    mine: list[Path]

    @abstractmethod
    def path(self, block_id: str) -> Path:
        """Where a block lies."""

    def contains(self, block_id: str) -> bool:
        return self.path(block_id).exists()

    def flush(self) -> None:
        sync_files(self.mine)

    def clear(self) -> None:
        for path in self.mine:
            path.unlink()
        self.mine.clear()


class OnTmpfs(StorageAdapter):
    """Put before the class of the same system on disk."""

    durable, safety = "tmpfs", Safety.KERNEL

    @classmethod
    @contextmanager
    def serve(cls, room: Room, shape: Shape) -> Iterator[Service]:
        yield folder_service(room.memory / cls.name, has_medium=False)
