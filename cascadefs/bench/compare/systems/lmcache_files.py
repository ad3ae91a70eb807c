"""LMCache 0.5: its LocalDiskBackend and its fs:// connector, as released, each on a tmpfs and on the disk.

Owns: what an engine would bring: configuration, metadata, an allocator of memory objects, an event loop in a thread.
stage() copies into a memory object, as the engine's device would; get() returns the memory object that LMCache fills.
"""

import asyncio
import os
import threading
from abc import abstractmethod
from pathlib import Path
from typing import Any

from cascadefs.bench.compare.adapter import (
    HEAD_SIZE,
    HEADS,
    LAYERS,
    Pair,
    Safety,
    Shape,
    StorageAdapter,
    not_importable,
    register,
    split,
    sync_files,
)
from cascadefs.bench.compare.own_files import OnTmpfs

MODEL, WAIT_S, GIB = "meta-llama/Llama-3.1-70B-Instruct", 120, 1 << 30


class LmCache(StorageAdapter):
    """What both ways of LMCache have in common."""

    durable, safety = "page cache", Safety.KERNEL

    @classmethod
    def missing(cls) -> str | None:
        return not_importable("lmcache", "torch")

    @classmethod
    def load(cls) -> None:
        os.environ["LMCACHE_TRACK_USAGE"] = "false"
        os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")
        import torch
        from lmcache.v1.storage_backend import connector, local_cpu_backend, local_disk_backend  # noqa: F401

        torch.set_num_threads(1)

    def initialize(self, address: str, rank: int, shape: Shape) -> None:
        import torch
        from lmcache.v1.memory_management import MemoryFormat

        self.folder, self.rank, self.shape = Path(address) / f"rank-{rank}", rank, shape
        self.folder.mkdir()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.layout = (torch.Size([2, LAYERS, shape.tokens, HEADS * HEAD_SIZE]), torch.float16, MemoryFormat.KV_2LTD)
        self.cpu = self._allocator()
        self.staged: dict[str, Any] = {}
        self.lent: list[Any] = []
        self.mine: list[str] = []
        self._touch_pool()
        self.connect()

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What the way of storing adds to the configuration."""

    @abstractmethod
    def connect(self) -> None:
        """Make the backend."""

    def _allocator(self) -> Any:
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

        pool_bytes = (2 * self.shape.blocks + 2) * self.shape.block_bytes
        self.config = LMCacheEngineConfig.from_defaults(
            chunk_size=self.shape.tokens, local_cpu=False, max_local_cpu_size=pool_bytes / GIB, **self.options()
        )
        metadata = LMCacheMetadata(
            model_name=MODEL,
            world_size=self.shape.ranks,
            local_world_size=self.shape.ranks,
            worker_id=self.rank,
            local_worker_id=self.rank,
            kv_dtype=self.layout[1],
            kv_shape=(LAYERS, 2, self.shape.tokens, HEADS, HEAD_SIZE),
            chunk_size=self.shape.tokens,
        )
        return LocalCPUBackend(self.config, metadata, dst_device="cpu")

    def _touch_pool(self) -> None:
        """Every page of the pool is there before the clock runs, as an engine's pinned memory is."""
        taken = [self.cpu.allocate(*self.layout) for _ in range(2 * self.shape.blocks + 1)]
        for memory in taken:
            memory.tensor.zero_()
        for memory in taken:
            memory.ref_count_down()

    def key(self, block_id: str) -> Any:
        """A block id is hexadecimal: it is the chunk's hash."""
        from lmcache.utils import CacheEngineKey

        return CacheEngineKey(MODEL, self.shape.ranks, self.rank, int(block_id, 16), self.layout[1])

    def stage(self, block_id: str, key: memoryview, value: memoryview) -> None:
        memory = self.cpu.allocate(*self.layout)
        own_key, own_value = split(memoryview(memory.byte_array).cast("B"))
        own_key[:], own_value[:] = key, value
        self.staged[block_id] = memory

    def take(self, block_id: str, key: memoryview, value: memoryview) -> Any:
        """The memory object of a block."""
        if block_id not in self.staged:
            self.stage(block_id, key, value)
        self.mine.append(block_id)
        return self.staged.pop(block_id)

    def lend(self, memory: Any) -> Pair | None:
        """What a get() of LMCache returned, kept until recycle()."""
        if memory is None:
            return None
        self.lent.append(memory)
        return split(memoryview(memory.byte_array).cast("B"))

    def recycle(self) -> None:
        for memory in self.lent:
            memory.ref_count_down()
        self.lent.clear()

    def flush(self) -> None:
        sync_files(path for path in self.folder.rglob("*") if path.is_file())

    @abstractmethod
    def disconnect(self) -> None:
        """Close the backend."""

    def close(self) -> None:
        self.disconnect()
        self.cpu.close()
        self.loop.call_soon_threadsafe(self.loop.stop)


class LmCacheDisk(LmCache):
    """put() waits for LMCache's own word that the chunk is written."""

    def options(self) -> dict[str, Any]:
        return {"local_disk": str(self.folder), "max_local_disk_size": 2 * self.shape.rank_bytes / GIB + 1}

    def connect(self) -> None:
        from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend

        self.backend: Any = LocalDiskBackend(self.config, self.loop, self.cpu, dst_device="cpu")

    def put(self, block_id: str, key: memoryview, value: memoryview) -> None:
        done, memory = threading.Event(), self.take(block_id, key, value)
        self.backend.submit_put_task(self.key(block_id), memory, on_complete_callback=lambda _key: done.set())
        if not done.wait(WAIT_S):
            raise OSError("LMCache never finished the write")
        memory.ref_count_down()

    def get(self, block_id: str, sink: Pair) -> Pair | None:
        return self.lend(self.backend.get_blocking(self.key(block_id)))

    def contains(self, block_id: str) -> bool:
        return bool(self.backend.contains(self.key(block_id)))

    def clear(self) -> None:
        for block_id in self.mine:
            self.backend.remove(self.key(block_id))
        self.mine.clear()

    def disconnect(self) -> None:
        self.backend.close()


class LmCacheConnector(LmCache):
    """The fs:// connector in its default form, with a header before each chunk."""

    @property
    def url(self) -> str:
        """The folder as LMCache writes it."""
        return f"fs://localhost:0{self.folder}"

    def options(self) -> dict[str, Any]:
        return {"remote_url": self.url}

    def connect(self) -> None:
        from lmcache.v1.storage_backend.connector import CreateConnector

        self.connector: Any = CreateConnector(self.url, self.loop, self.cpu, self.config, self.cpu.metadata)

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_S)

    def put(self, block_id: str, key: memoryview, value: memoryview) -> None:
        # The connector gives the memory object back itself.
        self._run(self.connector.put(self.key(block_id), self.take(block_id, key, value)))

    def get(self, block_id: str, sink: Pair) -> Pair | None:
        return self.lend(self._run(self.connector.get(self.key(block_id))))

    def contains(self, block_id: str) -> bool:
        return bool(self._run(self.connector.exists(self.key(block_id))))

    def clear(self) -> None:
        for block_id in self.mine:
            self.connector.remove_sync(self.key(block_id))
        self.mine.clear()

    def disconnect(self) -> None:
        self._run(self.connector.close())


@register
class LmCacheDiskOnDisk(LmCacheDisk):
    name, title = "lmcache-disk", "LMCache disk backend, disk"


@register
class LmCacheDiskOnTmpfs(OnTmpfs, LmCacheDisk):
    name, title = "lmcache-disk-tmpfs", "LMCache disk backend, tmpfs"


@register
class LmCacheConnectorOnDisk(LmCacheConnector):
    name, title = "lmcache-fs", "LMCache fs connector, disk"


@register
class LmCacheConnectorOnTmpfs(OnTmpfs, LmCacheConnector):
    name, title = "lmcache-fs-tmpfs", "LMCache fs connector, tmpfs"
