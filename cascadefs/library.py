"""A store for programs that know no trio: put, get_into, flush and the like, from any thread.

    with Library(Settings(store=Path("/scratch/kv"))) as store:
        store.put("block", keys, values)
        store.get_into("block", keys, values)

Owns: the trio thread in which the store and its tasks live, and the way into it. Does not know FUSE. Invariants:
(1) The store's thread decides; bytes move in the thread of the caller: what is in memory costs one question and one copy.
(2) A call that has returned is known to every call made after it, of any thread.
(3) No handle outlives the call that opened it, also after an error.
"""

import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import trio

from cascadefs.config import Settings
from cascadefs.contents.open_files import Handle
from cascadefs.media import file_io
from cascadefs.store import Store

T = TypeVar("T")
log = logging.getLogger(__name__)


class Library:
    """The store of one folder, which no mount and no other Library has open meanwhile.

    Paths are those of Store ("folder/name"; the folder must exist). Buffers are anything with contiguous bytes: bytes, numpy
    arrays, memoryviews. Errors are OSErrors (FileNotFoundError, ENOSPC, EIO for damage), trio.RunFinishedError after close().
    As with any file, who reads a path while another thread writes it may see parts of both.
    """

    def __init__(self, settings: Settings) -> None:
        """Raises StoreError when the folder is no store, in use, or of another format."""
        self._opened: Future[tuple[trio.lowlevel.TrioToken, Store, trio.Event]] = Future()
        self._thread = threading.Thread(target=self._live, args=(settings,), name="cascadefs-store", daemon=True)
        self._thread.start()
        self._token, self.store, self._end = self._opened.result()

    def _live(self, settings: Settings) -> None:
        try:
            trio.run(self._main, settings)
        except BaseException as failure:
            if self._opened.done():
                raise
            self._opened.set_exception(failure)

    async def _main(self, settings: Settings) -> None:
        store, end = Store(settings), trio.Event()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.run)
                self._opened.set_result((trio.lowlevel.current_trio_token(), store, end))
                await end.wait()
                nursery.cancel_scope.cancel()
        finally:
            store.close()

    def _ask(self, question: Callable[..., Awaitable[T]], *args: Any) -> T:
        return trio.from_thread.run(self.store.loss.retried, partial(question, *args), trio_token=self._token)

    @contextmanager
    def _handle(self, handle: Handle) -> Iterator[None]:
        """Let go afterwards, without waiting: whatever is asked later comes later."""
        try:
            yield
        finally:
            self._token.run_sync_soon(self._release, handle)

    def _release(self, handle: Handle) -> None:
        try:
            self.store.files.release(handle)
        except Exception:  # it would end the store's thread
            log.exception("a release failed")

    # --- bytes

    def put(self, path: str, *parts: Any) -> None:
        """Write a whole file, these buffers one behind the other. Replaces what was there. Safe from the death of this process
        when it returns; from a loss of power some time later, or after flush()."""
        views = [_bytes_of(part) for part in parts]
        handle, staged = self._ask(self.store.open_empty, path)
        with self._handle(handle):
            try:
                file_io.write_whole(staged, views)
            except OSError as e:
                file_io.write_whole(self._ask(self.store.place_with_room, handle, e), views)

    def get_into(self, path: str, *buffers: Any) -> int:
        """Fill writable buffers, one behind the other, from the beginning of a file; how many bytes there were."""
        views = [_bytes_of(buffer) for buffer in buffers]
        if any(view.readonly for view in views if view.nbytes):
            raise TypeError("a buffer to be filled is read-only")
        handle = self._ask(self.store.open_to_read, path)
        with self._handle(handle):
            if handle.source is not None:
                return file_io.read_whole(handle.source.fd, views)
            return self._ask(self.store.stream_into, handle, *views)

    # --- names

    def contains(self, path: str) -> bool:
        """Whether there is something of that name."""
        try:
            trio.from_thread.run_sync(self.store.find, path, trio_token=self._token)
        except FileNotFoundError:
            return False
        return True

    def remove(self, path: str) -> None:
        """Take a file's name away, and what only it kept."""
        trio.from_thread.run_sync(self.store.remove, path, trio_token=self._token)

    # --- the end

    def flush(self) -> None:
        """Everything that was put before is durable in the cold tier afterwards."""
        self._ask(self.store.flush)

    def close(self, drop_memory: bool = False) -> None:
        """Flush and close. `drop_memory` gives the memory tier back; else the next opening finds it filled. Harmless when it is
        closed already."""
        if not self._thread.is_alive():
            return
        try:
            self.flush()
            if drop_memory:
                trio.from_thread.run_sync(self.store.release_memory, trio_token=self._token)
        finally:
            trio.from_thread.run_sync(self._end.set, trio_token=self._token)
            self._thread.join()

    def __enter__(self) -> "Library":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _bytes_of(buffer: Any) -> memoryview:
    """The bytes of a contiguous buffer of any shape."""
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")
