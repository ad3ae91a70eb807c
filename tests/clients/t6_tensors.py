"""Tensor files as the libraries read and write them: safetensors, NumPy, PyTorch and GGUF, mostly through mmap.

Owns nothing but its samples. Must stay true: each test reads what it wrote by another way than it wrote it (another
mapping, read(2), another library), so that bytes that exist in one mapping only do not count.
"""

from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from gguf import GGUFReader, GGUFWriter
from samples import PAGE, same, sample

MIB = 2**20
# An odd tail: the last page of a mapping is only partly in the file.
SIZE = 24 * MIB + 1234


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """A small model: sizes and types that put the tensors at odd offsets."""
    floats = torch.from_numpy(sample(seed, 16 * MIB)).view(torch.bfloat16).view(2048, 4096)
    odd = torch.from_numpy(sample(seed + 1, 12345))
    return {"layers.0.kv": floats, "layers.1.odd": odd, "scale": torch.tensor(float(seed)), "none": torch.empty(0, 8)}


def check_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal in name, type, shape and bits; bits, because noise read as bfloat16 has NaNs."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert same(found[name].reshape(-1).view(torch.uint8).numpy(), tensor.reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_safetensors_file(folder: Path, backend: str) -> None:
    path = folder / "model.safetensors"
    for seed in (1, 10):
        safetensors.torch.save_file(tensors(seed), path, metadata={"format": "pt"})
        check_tensors(safetensors.torch.load_file(path, backend=backend), tensors(seed))
        check_tensors(safetensors.torch.load(path.read_bytes()), tensors(seed))


def test_safetensors_slices(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(safetensors.torch.save(tensors(3)))
    with safetensors.safe_open(path, framework="pt") as opened:
        assert set(opened.keys()) == tensors(3).keys()
        rows = opened.get_slice("layers.0.kv")[1000:1003]
    assert torch.equal(rows.view(torch.int16), tensors(3)["layers.0.kv"][1000:1003].view(torch.int16))


def test_safetensors_stay_readable_when_the_name_is_replaced(folder: Path) -> None:
    path, newer = folder / "model.safetensors", folder / "newer"
    safetensors.torch.save_file(tensors(1), path)
    safetensors.torch.save_file(tensors(2), newer)
    old = safetensors.torch.load_file(path)
    newer.replace(path)
    check_tensors(old, tensors(1))
    check_tensors(safetensors.torch.load_file(path), tensors(2))


def test_numpy_tofile_and_fromfile(folder: Path) -> None:
    path = folder / "array"
    sample(1, SIZE).tofile(path)
    assert same(np.fromfile(path, dtype=np.uint8), sample(1, SIZE))
    assert same(np.fromfile(path, dtype=np.uint8, count=PAGE, offset=SIZE - PAGE), sample(1, SIZE)[-PAGE:])


def test_numpy_maps_for_reading(folder: Path) -> None:
    path = folder / "array"
    path.write_bytes(sample(2, SIZE))
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    assert same(mapped, sample(2, SIZE))
    path.unlink()
    assert same(mapped[::-1][: 8 * PAGE].copy(), sample(2, SIZE)[::-1][: 8 * PAGE].copy())


def test_numpy_writes_through_a_map(folder: Path) -> None:
    path = folder / "array"
    made = np.memmap(path, dtype=np.uint8, mode="w+", shape=SIZE)
    assert not made.any()
    made[:] = sample(3, SIZE)
    made.flush()
    assert same(path.read_bytes(), sample(3, SIZE))
    del made
    assert same(np.memmap(path, dtype=np.uint8, mode="r"), sample(3, SIZE))


def test_numpy_writes_through_a_map_that_outlives_the_descriptor(folder: Path) -> None:
    """np.memmap closes its descriptor at once: what is stored later is written with no file open."""
    path, final = folder / "writing", folder / "final"
    made = np.memmap(path, dtype=np.uint8, mode="w+", shape=SIZE)
    path.rename(final)
    made[:] = sample(4, SIZE)
    assert same(final.read_bytes(), sample(4, SIZE))
    made[PAGE : 2 * PAGE] = 7
    made.flush()
    del made
    expected = sample(4, SIZE)
    expected[PAGE : 2 * PAGE] = 7
    assert same(np.fromfile(final, dtype=np.uint8), expected)


def test_numpy_changes_a_file_through_a_map(folder: Path) -> None:
    path = folder / "array"
    expected = sample(5, SIZE)
    expected.tofile(path)
    mapped = np.memmap(path, dtype=np.uint8, mode="r+")
    for offset in (0, 5 * PAGE - 3, SIZE - 10):
        mapped[offset : offset + 10] = expected[offset : offset + 10] = 255
    mapped.flush()
    assert same(path.read_bytes(), expected)
    private = np.memmap(path, dtype=np.uint8, mode="c")
    private[:] = 0
    assert same(path.read_bytes(), expected)


def test_numpy_array_files(folder: Path) -> None:
    array = sample(6, 8 * MIB).view(np.float16).reshape(2048, -1)
    np.save(folder / "kv.npy", array)
    mapped = np.load(folder / "kv.npy", mmap_mode="r")
    assert mapped.shape == array.shape and same(mapped.reshape(-1).view(np.uint8), array.reshape(-1).view(np.uint8))
    np.savez(folder / "kv.npz", layer=array)
    with np.load(folder / "kv.npz") as archive:
        assert same(archive["layer"].reshape(-1).view(np.uint8), array.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("mapped", [False, True], ids=["read", "mmap"])
def test_torch_save_and_load(folder: Path, mapped: bool) -> None:
    path = folder / "model.pt"
    for seed in (1, 10):
        torch.save(tensors(seed), path)
        check_tensors(torch.load(path, mmap=mapped, weights_only=True), tensors(seed))


def test_torch_tensor_on_a_shared_file(folder: Path) -> None:
    """A storage pool: a file of the whole size that the process writes as one tensor."""
    path = folder / "pool"
    pool = torch.from_file(str(path), shared=True, size=SIZE, dtype=torch.uint8)
    pool.copy_(torch.from_numpy(sample(8, SIZE)))
    assert same(path.read_bytes(), sample(8, SIZE))
    again = torch.from_file(str(path), shared=False, size=SIZE, dtype=torch.uint8)
    assert same(again.numpy(), sample(8, SIZE))


def test_gguf_file(folder: Path) -> None:
    """The file format of llama.cpp, by its own Python package: written in order, read through np.memmap."""
    path = folder / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    for number in range(4):
        writer.add_tensor(f"blk.{number}.attn_k.weight", sample(number, 4 * MIB).view(np.int8).reshape(1024, -1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = GGUFReader(path)
    assert [tensor.name for tensor in reader.tensors] == [f"blk.{number}.attn_k.weight" for number in range(4)]
    for number, tensor in enumerate(reader.tensors):
        assert same(tensor.data.reshape(-1).view(np.uint8), sample(number, 4 * MIB))
