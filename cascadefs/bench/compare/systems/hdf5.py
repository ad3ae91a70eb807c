"""HDF5 by h5py: one file for each rank (HDF5 has one writer a file), one group for each block; plain and gzip."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

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
    sync_files,
)


@register
class Hdf5(StorageAdapter):
    """Datasets of shape (layers, tokens, heads, head size), float16, read into the caller's arrays."""

    name, title = "hdf5", "HDF5 (h5py)"
    durable, safety = "page cache", Safety.KERNEL
    options: ClassVar[dict[str, object]] = {}

    @classmethod
    def missing(cls) -> str | None:
        return not_importable("h5py")

    @classmethod
    def load(cls) -> None:
        import h5py  # noqa: F401

    def initialize(self, address: str, rank: int, shape: Shape) -> None:
        self.path = Path(address) / f"rank-{rank}.h5"
        self.shape = (LAYERS, shape.tokens, HEADS, HEAD_SIZE)
        self._open("w")

    def _open(self, mode: str) -> None:
        import h5py

        # No chunk cache: a block is read once, and a chunk may be larger than the cache anyway.
        self.file: Any = h5py.File(self.path, mode, rdcc_nbytes=0)

    def _array(self, view: memoryview) -> Any:
        return np.frombuffer(view, np.float16).reshape(self.shape)

    def put(self, block_id: str, key: memoryview, value: memoryview) -> None:
        group = self.file.create_group(block_id)
        group.create_dataset("key", data=self._array(key), **self.options)
        group.create_dataset("value", data=self._array(value), **self.options)
        self.file.flush()  # to the kernel: before it, the data is in the memory of this process

    def get(self, block_id: str, sink: Pair) -> Pair | None:
        group = self.file.get(block_id)
        if group is None:
            return None
        group["key"].read_direct(self._array(sink[0]))
        group["value"].read_direct(self._array(sink[1]))
        return sink

    def contains(self, block_id: str) -> bool:
        return block_id in self.file

    def flush(self) -> None:
        self.file.flush()
        sync_files([self.path])

    def cool(self) -> None:
        self.file.close()
        self._open("r+")

    def clear(self) -> None:
        for block_id in list(self.file):
            del self.file[block_id]

    def close(self) -> None:
        self.file.close()


@register
class Hdf5Gzip(Hdf5):
    """One chunk a layer: the unit in which an engine would load it."""

    name, title = "hdf5-gzip", "HDF5 (h5py), gzip"

    def initialize(self, address: str, rank: int, shape: Shape) -> None:
        self.options = {"compression": "gzip", "chunks": (1, shape.tokens, HEADS, HEAD_SIZE)}  # type: ignore[misc]
        super().initialize(address, rank, shape)
