"""SGLang's HiCacheFile keeps KV pages in a folder: tofile into a temporary name, rename, one read(2) of the page.

Owns how it is driven without a server: SGLang is installed without its dependencies, then only what this one module
imports; nothing of it is patched. Where it cannot be imported the tests are skipped and say why.
Must stay true: every page read is compared with the page that was set.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import same, sample

hicache = pytest.importorskip("sglang.srt.mem_cache.hicache_storage", exc_type=ImportError)

PAGE_BYTES = 1_310_720 + 512
NO_SUCH_PAGE = 99


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of SGLang's own variables, one names a folder that would win over the test's."""
    for name in [name for name in os.environ if name.startswith("SGLANG_HICACHE_FILE_BACKEND_")]:
        monkeypatch.delenv(name)


def open_cache(folder: Path, **extra: Any) -> Any:
    """A HiCacheFile of rank 0 of 2 on that folder."""
    config = hicache.HiCacheStorageConfig(
        tp_rank=0,
        tp_size=2,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=False,
        enable_storage_metrics=False,
        is_page_first_layout=False,
        model_name="meta-llama/Llama-3.1-8B-Instruct",
        extra_config=extra,
    )
    return hicache.HiCacheFile(config, str(folder))


def page(number: int) -> torch.Tensor:
    return torch.from_numpy(sample(number, PAGE_BYTES)).view(torch.bfloat16)


def key(number: int) -> str:
    return f"{number:064x}"


def check(cache: Any, number: int) -> None:
    """The page comes back as it was set."""
    found = cache.get(key(number), torch.zeros(PAGE_BYTES // 2, dtype=torch.bfloat16))
    assert found is not None, f"page {number} is missing"
    assert same(found.view(torch.uint8).numpy(), sample(number, PAGE_BYTES))


def test_pages_come_back(folder: Path) -> None:
    cache = open_cache(folder / "made by hicache")
    assert cache.batch_set([key(number) for number in range(16)], [page(number) for number in range(16)])
    for number in range(16):
        assert cache.exists(key(number))
        check(cache, number)
    assert cache.get(key(NO_SUCH_PAGE), torch.zeros(PAGE_BYTES, dtype=torch.uint8)) is None
    assert not any(name.endswith(".tmp") for name in os.listdir(folder / "made by hicache"))
    targets = [torch.zeros(PAGE_BYTES, dtype=torch.uint8) for _ in range(16)]
    for number, found in enumerate(cache.batch_get([key(number) for number in range(16)], targets)):
        assert same(found.numpy(), sample(number, PAGE_BYTES))


def test_longest_prefix_after_a_restart(folder: Path) -> None:
    for number in (0, 1, 2, 4):
        assert open_cache(folder).set(key(number), page(number))
    cache = open_cache(folder, enable_metadata_cache=True, metadata_ttl=60.0)
    assert len(cache.metadata_cache.cache) == 4
    assert cache.batch_exists_v2([key(number) for number in range(6)]).kv_hit_pages == 3
    check(cache, 4)


def test_least_recently_used_pages_are_evicted(folder: Path) -> None:
    cache = open_cache(folder, max_size=4 * PAGE_BYTES, eviction_ratio=1.0)
    for number in range(4):
        assert cache.set(key(number), page(number))
    check(cache, 0)
    for number in (4, 5):
        assert cache.set(key(number), page(number))
    assert [cache.exists(key(number)) for number in range(6)] == [True, False, False, True, True, True]
    assert sum(entry.stat().st_size for entry in os.scandir(folder)) == 4 * PAGE_BYTES
    for number in (0, 3, 4, 5):
        check(cache, number)
    assert cache.clear()
    assert os.listdir(folder) == []


def test_free_space_is_asked_for_and_believable(folder: Path) -> None:
    """SGLang refuses to write where statvfs says that too little is free."""
    assert open_cache(folder, min_free_space=1).set(key(0), page(0))
    assert not open_cache(folder, min_free_space=2**60).set(key(1), page(1))


def test_eight_threads_on_one_folder(folder: Path) -> None:
    """Two ranks' worth of threads that set and get the same pages: each is found whole or not at all."""
    cache = open_cache(folder)

    def one_round(thread: int) -> None:
        for number in range(12):
            assert cache.set(key(number), page(number))
            check(cache, (number * 5 + thread) % (number + 1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one_round, range(8)))
    assert len(os.listdir(folder)) == 12
