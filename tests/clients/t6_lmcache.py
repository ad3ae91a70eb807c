"""LMCache 0.5 keeps its KV chunks in a folder: its local disk backend and its fs:// connector, as released.

Owns how the two are driven without an inference engine; nothing of LMCache is patched. What that takes:
- Installed without its dependencies, then only what these two import (requirements.txt): the rest is CUDA and cloud.
- Without a GPU `lmcache.v1.platform` chooses its CPU device by itself, in place of the CUDA extension.
- An engine would bring a metadata record, a CPU backend as the allocator and an event loop in a thread: made here.

Must stay true: every read is compared with the bytes that were put, and the O_DIRECT tests see the flag at open(2),
because LMCache falls back without a word when a size or f_bsize does not suit it.
"""

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat, MemoryObj
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.connector import CreateConnector
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend
from samples import same, sample

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
LAYERS, TOKENS, HEADS, HEAD_SIZE = 12, 256, 3, 40
TOKEN_BYTES = 2 * LAYERS * HEADS * HEAD_SIZE * torch.bfloat16.itemsize
# A whole chunk is 360 pages, which O_DIRECT takes; 37 tokens end within a page.
CHUNK_BYTES = TOKENS * TOKEN_BYTES
PART_TOKENS = 37
WAIT_SECONDS_MAX = 30


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """The event loop that an engine would run in a thread of its own."""
    running = asyncio.new_event_loop()
    thread = threading.Thread(target=running.run_forever)
    thread.start()
    yield running
    running.call_soon_threadsafe(running.stop)
    thread.join(WAIT_SECONDS_MAX)
    running.close()


@pytest.fixture
def directly_opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files opened with O_DIRECT since the test began."""
    names: list[str] = []
    real_open = os.open

    def watching_open(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            names.append(os.path.basename(path))
        return real_open(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", watching_open)
    return names


@contextmanager
def cpu_backend(config: LMCacheEngineConfig) -> Iterator[LocalCPUBackend]:
    """The allocator of all memory objects."""
    metadata = LMCacheMetadata(
        model_name=MODEL,
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=torch.bfloat16,
        kv_shape=(LAYERS, 2, TOKENS, HEADS, HEAD_SIZE),
        chunk_size=TOKENS,
    )
    backend = LocalCPUBackend(config, metadata, dst_device="cpu")
    yield backend
    backend.close()


@contextmanager
def disk_backend(
    folder: Path, loop: asyncio.AbstractEventLoop, direct: bool, chunks_max: int = 64
) -> Iterator[LocalDiskBackend]:
    """LMCache's local disk backend on that folder, as an engine would configure it."""
    config = LMCacheEngineConfig.from_defaults(
        chunk_size=TOKENS,
        local_cpu=False,
        max_local_cpu_size=0.125,
        local_disk=str(folder),
        max_local_disk_size=chunks_max * CHUNK_BYTES / 1024**3,
        extra_config={"use_odirect": direct},
    )
    with cpu_backend(config) as cpu:
        backend = LocalDiskBackend(config, loop, cpu, dst_device="cpu")
        yield backend
        backend.close()


def key(number: int) -> CacheEngineKey:
    return CacheEngineKey(MODEL, 1, 0, 0x5EED_0000_0000 + number, torch.bfloat16)


def chunk(cpu: LocalCPUBackend, seed: int, tokens: int = TOKENS) -> MemoryObj:
    """A memory object with the KV data of that many tokens."""
    shape = torch.Size([2, LAYERS, tokens, HEADS * HEAD_SIZE])
    memory = cpu.allocate(shape, torch.bfloat16, MemoryFormat.KV_2LTD)
    assert memory is not None and memory.tensor is not None
    data = torch.from_numpy(sample(seed, tokens * TOKEN_BYTES))
    memory.tensor.copy_(data.view(torch.bfloat16).view(shape))
    return memory


def put(backend: LocalDiskBackend, number: int, seed: int, tokens: int = TOKENS) -> None:
    """Store one chunk and wait until LMCache says that it is on disk."""
    done = threading.Event()
    memory = chunk(backend.local_cpu_backend, seed, tokens)
    backend.submit_put_task(key(number), memory, on_complete_callback=lambda _key: done.set())
    assert done.wait(WAIT_SECONDS_MAX), "LMCache never finished the write; its log has the reason"
    memory.ref_count_down()


def check(memory: MemoryObj | None, seed: int, tokens: int = TOKENS) -> None:
    """The memory object holds the chunk of that seed; it is given back."""
    assert memory is not None
    assert same(memory.byte_array, sample(seed, tokens * TOKEN_BYTES))
    memory.ref_count_down()


def file_of(folder: Path, number: int) -> Path:
    return folder / (key(number).to_string().replace("/", "-") + ".pt")


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_disk_put_and_get(
    folder: Path, loop: asyncio.AbstractEventLoop, directly_opened: list[str], direct: bool
) -> None:
    with disk_backend(folder, loop, direct) as backend:
        for number in range(6):
            put(backend, number, seed=number)
        put(backend, 6, seed=6, tokens=PART_TOKENS)
        assert len(directly_opened) == (6 if direct else 0)
        for number in range(6):
            assert same(file_of(folder, number).read_bytes(), sample(number, CHUNK_BYTES))
            check(backend.get_blocking(key(number)), number)
        check(backend.get_blocking(key(6)), 6, PART_TOKENS)
        assert len(directly_opened) == (12 if direct else 0)
        assert backend.get_blocking(key(7)) is None


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_disk_reads_a_batch_in_threads(folder: Path, loop: asyncio.AbstractEventLoop, direct: bool) -> None:
    with disk_backend(folder, loop, direct) as backend:
        for number in range(24):
            put(backend, number, seed=number)
        order = [*range(23, -1, -1), 99]
        *found, missing = backend.batched_get_blocking([key(number) for number in order])
        assert missing is None
        for number, memory in zip(order, found, strict=False):
            check(memory, number)


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_disk_evicts_what_was_used_least_recently(folder: Path, loop: asyncio.AbstractEventLoop, direct: bool) -> None:
    with disk_backend(folder, loop, direct, chunks_max=4) as backend:
        for number in range(4):
            put(backend, number, seed=number)
        check(backend.get_blocking(key(0)), 0)
        for number in range(4, 7):
            put(backend, number, seed=number)
        kept = [0, 4, 5, 6]
        assert sorted(folder.iterdir()) == sorted(file_of(folder, number) for number in kept)
        for number in kept:
            check(backend.get_blocking(key(number)), number)
        assert [backend.contains(key(number)) for number in range(1, 4)] == [False] * 3
        assert backend.remove(key(0))
        assert not file_of(folder, 0).exists()


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_disk_after_a_restart_writes_over_old_files(
    folder: Path, loop: asyncio.AbstractEventLoop, directly_opened: list[str], direct: bool
) -> None:
    """A new backend knows nothing of its predecessor's files: it writes in place, without O_TRUNC when direct."""
    with disk_backend(folder, loop, direct) as backend:
        for number in range(4):
            put(backend, number, seed=number)
    with disk_backend(folder, loop, direct) as backend:
        assert not backend.contains(key(0))
        for number in range(4):
            put(backend, number, seed=100 + number)
            assert same(file_of(folder, number).read_bytes(), sample(100 + number, CHUNK_BYTES))
        for number in range(4):
            check(backend.get_blocking(key(number)), 100 + number)
    assert len(directly_opened) == (12 if direct else 0)


CONNECTORS = {
    "with header": {},
    "temporary folder": {"fs_connector_relative_tmp_dir": "writing"},
    "bare": {"save_chunk_meta": False},
    "read ahead": {"save_chunk_meta": False, "fs_connector_read_ahead_size": 4096},
    "direct": {"save_chunk_meta": False, "fs_connector_use_odirect": True},
}


class Store:
    """The fs:// connector, called from outside its event loop."""

    def __init__(self, connector: Any, cpu: LocalCPUBackend, loop: asyncio.AbstractEventLoop) -> None:
        self.connector = connector
        self.cpu = cpu
        self.loop = loop

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_SECONDS_MAX)

    def put(self, number: int, seed: int, tokens: int = TOKENS) -> None:
        # The connector gives the memory object back itself.
        self.run(self.connector.put(key(number), chunk(self.cpu, seed, tokens)))

    def get(self, number: int) -> MemoryObj | None:
        found: MemoryObj | None = self.run(self.connector.get(key(number)))
        return found

    def put_all(self, seeds: dict[int, int]) -> list[MemoryObj | None]:
        """Put all keys at once and get each of them at the same time; what the gets found."""

        async def together() -> list[MemoryObj | None]:
            puts = [self.connector.put(key(number), chunk(self.cpu, seed)) for number, seed in seeds.items()]
            gets = [self.connector.get(key(number)) for number in seeds]
            return (await asyncio.gather(*puts, *gets))[len(puts) :]

        found: list[MemoryObj | None] = self.run(together())
        return found


@pytest.fixture(params=CONNECTORS.values(), ids=CONNECTORS.keys())
def store(
    request: pytest.FixtureRequest, folder: Path, loop: asyncio.AbstractEventLoop, directly_opened: list[str]
) -> Iterator[Store]:
    url = f"fs://localhost:0{folder}"
    config = LMCacheEngineConfig.from_defaults(
        chunk_size=TOKENS, local_cpu=False, max_local_cpu_size=0.125, remote_url=url, extra_config=request.param
    )
    with cpu_backend(config) as cpu:
        opened = Store(CreateConnector(url, loop, cpu, config, cpu.metadata), cpu, loop)
        yield opened
        opened.run(opened.connector.close())
    assert bool(directly_opened) == ("fs_connector_use_odirect" in request.param)


def names(folder: Path) -> set[str]:
    """Every file below the folder: what is left there, temporary files too."""
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_connector_put_and_get(store: Store, folder: Path) -> None:
    for number in range(6):
        store.put(number, seed=number)
    # Without a header LMCache tells the number of tokens from the number of bytes that read(2) returned.
    store.put(6, seed=6, tokens=PART_TOKENS)
    for number in range(6):
        assert store.connector.exists_sync(key(number))
        check(store.get(number), number)
    check(store.get(6), 6, PART_TOKENS)
    assert store.get(7) is None and not store.connector.exists_sync(key(7))
    assert len(names(folder)) == 7 and not any(name.endswith(".tmp") for name in names(folder))


def test_connector_replaces_and_removes(store: Store, folder: Path) -> None:
    for seed in (1, 2, 3):
        store.put(0, seed)
        check(store.get(0), seed)
    store.put(1, seed=4)
    assert store.connector.remove_sync(key(0))
    assert store.get(0) is None
    check(store.get(1), 4)
    assert len(names(folder)) == 1


def test_connector_does_many_at_once(store: Store) -> None:
    numbers = range(24)
    for memory in store.put_all({number: number for number in numbers}):
        if memory is not None:
            memory.ref_count_down()
    # The same keys again while they are read: each read finds the one version or the other, whole.
    for number, memory in zip(numbers, store.put_all({number: 100 + number for number in numbers}), strict=True):
        assert memory is not None
        first_version = same(memory.byte_array, sample(number, CHUNK_BYTES))
        check(memory, number if first_version else 100 + number)
    found = store.run(store.connector.batched_get_non_blocking("lookup", [key(number) for number in numbers]))
    assert len(found) == len(numbers)
    for number, memory in zip(numbers, found, strict=True):
        check(memory, 100 + number)
