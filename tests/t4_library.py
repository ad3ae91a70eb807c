"""The library's door for threads: bytes come back whole, from memory and from extents, for bytes and for numpy arrays."""

import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import trio

from cascadefs.errors import StoreError
from cascadefs.library import Library
from tests.stores import wipe_memory

MIB = 1 << 20


def filled(library, path, size):
    sink = bytearray(size)
    assert library.get_into(path, sink) == size
    return bytes(sink)


def handles(library):
    library.contains("anything")  # what was asked before has been done
    return sum(live.handles for live in library.store.files.live.values())


def test_what_is_put_in_parts_comes_back_in_other_parts(settings):
    keys, values = np.random.default_rng(1).standard_normal((2, 3, 70_000), dtype=np.float32)
    whole = keys.tobytes() + values.tobytes()
    with Library(settings) as store:
        store.put("block", keys, b"", values)
        store.put("empty")
        sink, rest = np.empty((7, 1000), np.int64), bytearray(2 * MIB)  # more room than there are bytes
        assert store.get_into("block", sink, rest) == len(whole)
        assert sink.tobytes() + bytes(rest[: len(whole) - sink.nbytes]) == whole
        assert store.get_into("empty", rest) == 0 and store.get_into("block") == 0
        store.put("block", b"shorter")
        assert store.get_into("block", rest) == 7 and rest[:7] == b"shorter"
        assert handles(store) == 0


@pytest.mark.parametrize("limit", [0, 64 * MIB], ids=["streamed", "promoted"])
@pytest.mark.parametrize("drop", [True, False], ids=["cold", "kept"])
def test_the_next_opening_finds_everything(settings, limit, drop):
    settings, data = replace(settings, promote_limit=limit), os.urandom(9 * MIB + 17)
    with Library(settings) as store:
        store.put("block", data)
        store.close(drop_memory=drop)
    with Library(settings) as store:
        assert store.contains("block") and not store.contains("other")
        assert filled(store, "block", len(data)) == data
        store.remove("block")
        assert not store.contains("block")
        with pytest.raises(FileNotFoundError):
            store.get_into("block", bytearray(1))
        with pytest.raises(FileNotFoundError):
            store.remove("block")


def test_flush_makes_durable(settings):
    store = Library(settings)
    store.put("block", data := os.urandom(3 * MIB))
    store.flush()
    store.put("later", b"in memory only")
    store._token.run_sync_soon(store._end.set)  # closed as a process that dies: nothing is flushed
    store._thread.join()
    wipe_memory(settings)
    with Library(settings) as store:
        assert filled(store, "block", len(data)) == data
        assert not store.contains("later")


def test_threads_share_a_library(settings):
    contents, failures = {f"f{number}": os.urandom(200_000 + number) for number in range(40)}, []

    def work(names):
        try:
            for name in names:
                store.put(name, contents[name])
                assert filled(store, name, len(contents[name])) == contents[name]  # invariant (2): at once
        except BaseException as e:
            failures.append(e)

    with Library(settings) as store:
        threads = [threading.Thread(target=work, args=(list(contents)[at::8],)) for at in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures and handles(store) == 0
        assert all(filled(store, name, len(data)) == data for name, data in contents.items())


def test_a_call_that_fails_leaves_no_handle(settings):
    with Library(settings) as store:
        store.put("block", b"bytes")
        with pytest.raises(TypeError):
            store.put("other", "no buffer")
        assert not store.contains("other")
        with pytest.raises(TypeError):
            store.get_into("block", b"cannot be written")
        with pytest.raises(FileNotFoundError):
            store.put("no folder/block", b"")
        assert filled(store, "block", 5) == b"bytes" and handles(store) == 0


def test_one_at_a_time_and_none_after_the_end(settings):
    with Library(settings) as store:
        with pytest.raises(StoreError):
            Library(settings)
        store.put("block", b"bytes")
    store.close()
    with pytest.raises(trio.RunFinishedError):
        store.put("block", b"bytes")
