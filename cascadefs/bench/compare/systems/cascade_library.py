"""cascadefs as a library: Store.put and Store.get_into without FUSE. A store belongs to one process, so each rank has its own.

Owns: the trio thread in which a store lives, and the way into it. Equal contents are found within a rank only.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import trio

from cascadefs.bench.compare.adapter import Pair, Room, Safety, Service, Shape, StorageAdapter, occupied_bytes, register
from cascadefs.bench.compare.systems.cascade_mount import SPARE_BYTES
from cascadefs.bench.targets import unmount
from cascadefs.config import Settings
from cascadefs.namespace import ROOT
from cascadefs.store import Store

START_S = 60


class StoreThread:
    """An open store with its tasks, in a trio thread of its own."""

    def __init__(self, settings: Settings) -> None:
        self._started: Future[tuple[trio.lowlevel.TrioToken, Store]] = Future()
        self._end: trio.Event
        self._thread = threading.Thread(target=self._live, args=(settings,), daemon=True)
        self._thread.start()
        self.token, self.store = self._started.result(START_S)

    def _live(self, settings: Settings) -> None:
        try:
            trio.run(self._main, settings)
        except BaseException as failure:
            if self._started.done():
                raise
            self._started.set_exception(failure)

    async def _main(self, settings: Settings) -> None:
        store = Store(settings)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.run)
                self._end = trio.Event()
                self._started.set_result((trio.lowlevel.current_trio_token(), store))
                await self._end.wait()
                nursery.cancel_scope.cancel()
        finally:
            store.close()

    def close(self, drop_memory: bool) -> None:
        """After flush()."""
        if drop_memory:
            trio.from_thread.run_sync(self.store.release_memory, trio_token=self.token)
        trio.from_thread.run_sync(self._end.set, trio_token=self.token)
        self._thread.join()


@register
class CascadeLibrary(StorageAdapter):
    """put() wants one buffer: stage() joins keys and values."""

    name, title = "cascadefs-library", "cascadefs, library"
    durable, safety = "tmpfs, soon disk", Safety.KERNEL

    @classmethod
    @contextmanager
    def serve(cls, room: Room, shape: Shape) -> Iterator[Service]:
        folder, memory = room.disk / cls.name, room.memory / cls.name
        folder.mkdir()
        memory.mkdir()
        try:
            yield Service(
                os.pathsep.join((str(folder), str(memory))),
                lambda: None,
                lambda: sum(occupied_bytes(store / "extents") for store in folder.iterdir()),
            )
        finally:
            for tier in memory.iterdir():  # of a rank that was killed
                if tier.is_mount():
                    unmount(tier, ["umount", str(tier)], room.note)

    def initialize(self, address: str, rank: int, shape: Shape) -> None:
        folder, memory = map(Path, address.split(os.pathsep))
        shm_size = 2 * shape.rank_bytes + SPARE_BYTES
        self.settings = Settings(store=folder / f"rank-{rank}", shm_dir=memory, shm_size=shm_size)
        self.thread = StoreThread(self.settings)
        self.staged: dict[str, bytes] = {}
        self.mine: list[str] = []

    def stage(self, block_id: str, key: memoryview, value: memoryview) -> None:
        self.staged[block_id] = b"".join((key, value))

    def put(self, block_id: str, key: memoryview, value: memoryview) -> None:
        data = self.staged.pop(block_id, None) or b"".join((key, value))
        trio.from_thread.run(self.thread.store.put, block_id, data, trio_token=self.thread.token)
        self.mine.append(block_id)

    def get(self, block_id: str, sink: Pair) -> Pair | None:
        try:
            done = trio.from_thread.run(self.thread.store.get_into, block_id, *sink, trio_token=self.thread.token)
        except FileNotFoundError:
            return None
        return sink if done == sum(map(len, sink)) else None

    def contains(self, block_id: str) -> bool:
        try:
            trio.from_thread.run_sync(self.thread.store.find, block_id, trio_token=self.thread.token)
        except FileNotFoundError:
            return False
        return True

    def flush(self) -> None:
        trio.from_thread.run(self.thread.store.flush, trio_token=self.thread.token)

    def cool(self) -> None:
        self.flush()
        self.thread.close(drop_memory=True)
        self.thread = StoreThread(self.settings)

    def _unlink(self, block_id: str) -> None:
        gone = self.thread.store.namespace.unlink(ROOT, block_id.encode())
        self.thread.store.files.forget_if_gone(gone.ino)

    def clear(self) -> None:
        for block_id in self.mine:
            trio.from_thread.run_sync(partial(self._unlink, block_id), trio_token=self.thread.token)
        self.mine.clear()

    def close(self) -> None:
        self.flush()
        self.thread.close(drop_memory=True)
