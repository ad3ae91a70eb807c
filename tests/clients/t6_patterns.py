"""What vLLM and llama.cpp do to files, call by call: both are too large to install for a few system calls.

Owns two imitations. vLLM's secondary file-system tier (`vllm/v1/kv_offload/tiering/fs/io.py`): a block goes out in
one write(2) to a new name made with O_EXCL and is renamed; it comes back in one readv(2), and a short read deletes it.
llama.cpp's model loader (`src/llama-mmap.cpp`): a header by read(2), then the whole file mapped.

Must stay true: a short read or write is a failure here as it is there, never continued with a second call.
"""

import mmap
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from samples import PAGE, same, sample

MIB = 2**20
BLOCK_BYTES = 8 * MIB
THREADS = 8
# 1.25 GiB: more than the memory tier of the mounts (conftest.py).
BLOCKS_BEYOND_MEMORY = 160
MODEL_BYTES = 384 * MIB + 777

both_ways = pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "direct"])


def in_threads(work: Callable[[int], None], numbers: Iterable[int]) -> None:
    """Eight threads share the numbers; the first error is raised here."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, numbers))


def page_aligned(data: bytes | memoryview) -> mmap.mmap:
    """A copy where O_DIRECT can take it, as vLLM's pinned host memory is."""
    buffer = mmap.mmap(-1, len(data))
    buffer[:] = data
    return buffer


def store_block(path: Path, block: mmap.mmap, direct: int) -> None:
    """One block under its final name, whole or not at all."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f"{path.name}_{threading.get_ident()}.tmp")
    fd = os.open(writing, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_TRUNC | direct, 0o644)
    try:
        written = os.write(fd, block)
    finally:
        os.close(fd)
    assert written == len(block), f"short write: {written} of {len(block)} bytes of {path.name}"
    os.replace(writing, path)


def load_block(path: Path, size: int, direct: int) -> mmap.mmap:
    """One block by one readv(2)."""
    buffer = mmap.mmap(-1, size)
    fd = os.open(path, os.O_RDONLY | direct)
    try:
        count = os.readv(fd, [buffer])
    finally:
        os.close(fd)
    assert count == size, f"short read: {count} of {size} bytes of {path.name}"
    return buffer


def check(found: mmap.mmap, number: int) -> None:
    """The block is the one that was stored under that number."""
    assert same(found, sample(number, len(found)))


def path_of(folder: Path, number: int) -> Path:
    """Two levels of folders, as vLLM spreads its block hashes."""
    return folder / f"model_tp1_{number % 4:03x}" / f"{number % 16:02x}" / f"{number:032x}.bin"


def temporary_files(folder: Path) -> list[Path]:
    return list(folder.rglob("*.tmp"))


@both_ways
@pytest.mark.parametrize("size", [PAGE, 256 * 1024, BLOCK_BYTES])
def test_vllm_threads_store_and_load(folder: Path, size: int, direct: int) -> None:
    def one(number: int) -> None:
        store_block(path_of(folder, number), page_aligned(sample(number, size).data), direct)
        check(load_block(path_of(folder, number), size, direct), number)

    in_threads(one, range(32))
    in_threads(lambda number: check(load_block(path_of(folder, number), size, direct), number), range(31, -1, -1))
    assert not temporary_files(folder)


@both_ways
def test_vllm_threads_race_for_the_same_names(folder: Path, direct: int) -> None:
    """All threads store all blocks: whoever renames last wins, and a reader in between sees a whole block."""
    size = MIB

    def one(thread: int) -> None:
        for step in range(16):
            number = (step + thread) % 16
            store_block(path_of(folder, number), page_aligned(sample(number, size).data), direct)
            check(load_block(path_of(folder, number), size, direct), number)

    in_threads(one, range(THREADS))
    assert not temporary_files(folder)


@both_ways
def test_vllm_replaces_a_block_under_its_readers(folder: Path, direct: int) -> None:
    """Readers of a name that is renamed over again and again: an old block or a new one, no error, no mixture."""
    size, path, versions = MIB, folder / "block.bin", 60
    written = threading.Event()
    store_block(path, page_aligned(sample(0, size).data), direct)

    def write(_thread: int) -> None:
        try:
            for version in range(1, versions):
                fresh = folder / f"version-{version}"
                store_block(fresh, page_aligned(sample(version, size).data), direct)
                os.replace(fresh, path)
        finally:
            written.set()

    def read(_thread: int) -> None:
        newest = 0
        while True:
            finished = written.is_set()
            found = load_block(path, size, direct)
            version = int.from_bytes(found[4:8], "little")
            assert version >= newest, f"version {version} after {newest}"
            check(found, version)
            newest = version
            if finished:
                break
        assert newest == versions - 1

    in_threads(lambda thread: (read if thread else write)(thread), range(THREADS))


def test_vllm_sees_that_a_block_was_cut_short(folder: Path) -> None:
    """A truncated block reads short exactly at its end; then its file is removed."""
    path = path_of(folder, 0)
    store_block(path, page_aligned(sample(0, BLOCK_BYTES).data), 0)
    os.truncate(path, BLOCK_BYTES - 100)
    with pytest.raises(AssertionError, match=f"short read: {BLOCK_BYTES - 100} of {BLOCK_BYTES}"):
        load_block(path, BLOCK_BYTES, 0)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        load_block(path, BLOCK_BYTES, 0)


def test_vllm_stores_more_than_the_memory_tier_holds(folder: Path) -> None:
    """No ENOSPC, and each block comes back whole, from whichever tier, the first ones first."""
    numbers = range(BLOCKS_BEYOND_MEMORY)
    in_threads(
        lambda number: store_block(path_of(folder, number), page_aligned(sample(number, BLOCK_BYTES).data), 0), numbers
    )
    in_threads(lambda number: check(load_block(path_of(folder, number), BLOCK_BYTES, 0), number), numbers)


@pytest.fixture
def model(folder: Path) -> Path:
    """A large model file, written from the first byte to the last in buffers of an odd size, as a download is."""
    path = folder / "model.gguf"
    data = memoryview(sample(1, MODEL_BYTES))
    step = MIB + 4321
    with open(path, "wb", buffering=0) as file:
        for start in range(0, MODEL_BYTES, step):
            assert file.write(data[start : start + step]) == min(step, MODEL_BYTES - start)
    return path


@pytest.mark.parametrize(
    "flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE | mmap.MAP_POPULATE], ids=["shared", "private-populate"]
)
def test_llama_maps_a_model(model: Path, flags: int) -> None:
    expected = sample(1, MODEL_BYTES)
    with open(model, "rb") as file:
        assert same(file.read(PAGE), expected[:PAGE])
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        mapped = mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ)
    mapped.madvise(mmap.MADV_WILLNEED)
    assert len(mapped) == MODEL_BYTES
    # From the end: tensors are not read in the order of the file.
    assert same(mapped[-5 * PAGE :], expected[-5 * PAGE :])
    assert same(mapped, expected)
    # Drop the pages and fault them in again.
    mapped.madvise(mmap.MADV_DONTNEED)
    assert same(mapped, expected)
    mapped.close()


@pytest.mark.parametrize(
    "flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE | mmap.MAP_POPULATE], ids=["shared", "private-populate"]
)
def test_llama_keeps_its_model_when_the_file_is_replaced(model: Path, folder: Path, flags: int) -> None:
    """A newer model is renamed over the mapped one, then deleted: the mapping goes on showing the old bytes."""
    with open(model, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ)
    newer = folder / "newer"
    newer.write_bytes(sample(2, 10 * MIB).data)
    newer.replace(model)
    assert same(model.read_bytes(), sample(2, 10 * MIB))
    model.unlink()
    assert same(mapped, sample(1, MODEL_BYTES))
    mapped.close()


def test_llama_reads_without_a_map(model: Path) -> None:
    """`--no-mmap`: seek to each tensor and read it whole, from several threads with a descriptor each."""
    expected, tensor_bytes = sample(1, MODEL_BYTES), 24 * MIB + 64

    def one(number: int) -> None:
        offset = number * tensor_bytes
        with open(model, "rb", buffering=0) as file:
            file.seek(offset)
            assert same(file.read(tensor_bytes), expected[offset : offset + tensor_bytes])

    in_threads(one, range(-(-MODEL_BYTES // tensor_bytes)))
