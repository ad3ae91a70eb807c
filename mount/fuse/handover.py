"""What outlives a worker: the memory that the keeper holds and each worker maps. Nothing here outlives the mount.

Owns: the layout of that memory. Knows no store and no FUSE message. Invariants:
(1) A record becomes valid by its last store (an 8-byte key), and invalid by clearing that key: a worker killed in the middle
    of writing one leaves none.
(2) A handle is recorded before the kernel is told of it, and erased after the kernel has given it up: what the kernel uses
    is here. A backing id likewise, except for one that was asked for a moment before the worker died.
(3) An operation is recorded before its transaction begins, and erased when that fails.
A table that is full records nothing more: the mount works on, but a restart would forget what did not fit.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cascadefs.ext.fuse_transport import EVENT_RING_BYTES

VERSION = 3  # of this layout and what it means: an upgrade to another one is refused (2: inodes shared backing files)
INIT_BYTES = 256
INOS_BITS = 32  # no worker makes four billion inodes
HANDLES, BACKINGS, OPERATIONS = 1 << 16, 1 << 16, 1 << 12  # 4096 operations: 99 can wait for an answer at once

_HEAD = struct.Struct("<4sIQQQ")  # magic, version, workers started, length of the INIT request, first inode of the first
_HANDLE = struct.Struct("<QQQiBBBx")  # fh, inode, request, backing id, writable, direct, by us (earlier ones wrote 0)
_OPERATION = struct.Struct("<QQQ")  # request, its number, inode whose row will carry the number
_KEY = struct.Struct("<Q")
_BACKING = struct.Struct("<i")
REFUSALS_AT = _HEAD.size
LEAVING_AT = REFUSALS_AT + _KEY.size
MADE_AT = LEAVING_AT + _KEY.size
INIT_AT = 64
EVENTS_AT = 4096
HANDLES_AT = EVENTS_AT + EVENT_RING_BYTES
BACKINGS_AT = HANDLES_AT + HANDLES * _HANDLE.size
OPERATIONS_AT = BACKINGS_AT + BACKINGS * _BACKING.size
TABLE_BYTES = OPERATIONS_AT + OPERATIONS * _OPERATION.size


@dataclass(frozen=True, slots=True)
class KeptHandle:
    """One open file. `request`: the unique number of the OPEN or CREATE that made it; `backing_id` 0: none; `by_us`: reads and
    writes come to us in spite of it."""

    fh: int
    ino: int
    request: int
    backing_id: int
    writable: bool
    direct: bool
    by_us: bool = False


class Table:
    """A view of the memory behind `fd`. One worker at a time writes to it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, TABLE_BYTES)
        magic, version, _, _, _ = _HEAD.unpack_from(self._memory)
        assert (magic, version) in ((b"CFTB", VERSION), (bytes(4), 0))
        self._free_handles = np.flatnonzero(self._handle_keys() == 0)[::-1].tolist()
        self._free_backings = np.flatnonzero(self._backing_keys() == 0)[::-1].tolist()
        self._slots = {handle.fh: at for at, handle in self._handle_places()}  # fh or backing id (negative) -> place
        self._slots.update({-backing: at for at, backing in self._backing_places()})

    @classmethod
    def make(cls) -> "Table":
        """A new one: anonymous memory that fork() and exec() hand on."""
        fd = os.memfd_create("cascadefs-table", 0)
        os.ftruncate(fd, TABLE_BYTES)
        os.pwrite(fd, _HEAD.pack(b"CFTB", VERSION, 0, 0, 0), 0)
        return cls(fd)

    @property
    def events(self) -> memoryview:
        """The ring of requests that the transport answered and Python has not yet seen."""
        return memoryview(self._memory)[EVENTS_AT : EVENTS_AT + EVENT_RING_BYTES]

    @property
    def generation(self) -> int:
        """How many workers were started for this mount."""
        return int(_HEAD.unpack_from(self._memory)[2])

    @generation.setter
    def generation(self, number: int) -> None:
        _KEY.pack_into(self._memory, 8, number)

    @property
    def first_ino(self) -> int:
        """The lowest inode number that this worker may give: no earlier one gave it, also to an inode that is gone."""
        base = int(_HEAD.unpack_from(self._memory)[4])
        return base + ((self.generation - 1) << INOS_BITS) if base else 0

    @first_ino.setter
    def first_ino(self, number: int) -> None:
        _KEY.pack_into(self._memory, 24, number)

    @property
    def refusals(self) -> int:
        """Upgrades that the keeper has refused; a field that it writes while a worker runs."""
        return int(_KEY.unpack_from(self._memory, REFUSALS_AT)[0])

    @refusals.setter
    def refusals(self, count: int) -> None:
        _KEY.pack_into(self._memory, REFUSALS_AT, count)

    @property
    def is_leaving(self) -> bool:
        """Whether somebody has asked the mount to end: the next worker goes on with that."""
        return bool(_KEY.unpack_from(self._memory, LEAVING_AT)[0])

    @is_leaving.setter
    def is_leaving(self, leaving: bool) -> None:
        _KEY.pack_into(self._memory, LEAVING_AT, leaving)

    @property
    def made_mountpoint(self) -> bool:
        """Whether the folder below the mount was made by us: the keeper takes it away in the end."""
        return bool(_KEY.unpack_from(self._memory, MADE_AT)[0])

    @made_mountpoint.setter
    def made_mountpoint(self, made: bool) -> None:
        _KEY.pack_into(self._memory, MADE_AT, made)

    @property
    def init_request(self) -> bytes:
        """The INIT that the kernel sends once in the life of a mount; empty before."""
        length = _HEAD.unpack_from(self._memory)[3]
        return self._memory[INIT_AT : INIT_AT + length]

    @init_request.setter
    def init_request(self, message: bytes) -> None:
        message = message[:INIT_BYTES]
        self._memory[INIT_AT : INIT_AT + len(message)] = message
        _KEY.pack_into(self._memory, 16, len(message))

    # --- open files

    def _handle_keys(self) -> npt.NDArray[np.uint64]:
        """The file handle of each place, 0: free. A view: a new worker looks through all of them before its first answer."""
        return np.ndarray(HANDLES, np.uint64, self._memory, HANDLES_AT, (_HANDLE.size,))

    def _handle_places(self) -> Iterator[tuple[int, KeptHandle]]:
        for at in np.flatnonzero(self._handle_keys()).tolist():
            row = _HANDLE.unpack_from(self._memory, HANDLES_AT + at * _HANDLE.size)
            kinds = bool(row[4]), bool(row[5]), bool(row[6])
            yield at, KeptHandle(row[0], row[1], row[2], row[3], *kinds)

    def handles(self) -> list[KeptHandle]:
        """Files that the kernel has open, or was about to be told of."""
        return [handle for _, handle in self._handle_places()]

    def add_handle(self, kept: KeptHandle) -> None:
        """Before the kernel is told of it."""
        if not self._free_handles:
            return
        at = self._slots[kept.fh] = self._free_handles.pop()
        place = HANDLES_AT + at * _HANDLE.size
        kinds = kept.writable, kept.direct, kept.by_us
        _HANDLE.pack_into(self._memory, place, 0, kept.ino, kept.request, kept.backing_id, *kinds)
        _KEY.pack_into(self._memory, place, kept.fh)

    def remove_handle(self, fh: int) -> None:
        """The kernel has given it up."""
        at = self._slots.pop(fh, None)
        if at is not None:
            _KEY.pack_into(self._memory, HANDLES_AT + at * _HANDLE.size, 0)
            self._free_handles.append(at)

    # --- backing ids

    def _backing_keys(self) -> npt.NDArray[np.int32]:
        """The backing id of each place, 0: free. A view."""
        return np.ndarray(BACKINGS, np.int32, self._memory, BACKINGS_AT, (_BACKING.size,))

    def _backing_places(self) -> Iterator[tuple[int, int]]:
        keys = self._backing_keys()
        yield from ((at, int(keys[at])) for at in np.flatnonzero(keys).tolist())

    def backings(self) -> list[int]:
        """Backing ids that the kernel holds for this mount."""
        return [backing for _, backing in self._backing_places()]

    def add_backing(self, backing_id: int) -> None:
        """The kernel has just given it."""
        if self._free_backings:
            at = self._slots[-backing_id] = self._free_backings.pop()
            _BACKING.pack_into(self._memory, BACKINGS_AT + at * _BACKING.size, backing_id)

    def remove_backing(self, backing_id: int) -> None:
        """The kernel has closed it."""
        at = self._slots.pop(-backing_id, None)
        if at is not None:
            _BACKING.pack_into(self._memory, BACKINGS_AT + at * _BACKING.size, 0)
            self._free_backings.append(at)

    # --- operations under way

    def operations(self) -> list[tuple[int, int, int]]:
        """(request, number, inode) of the last operations, in no order."""
        return [row for row in _OPERATION.iter_unpack(memoryview(self._memory)[OPERATIONS_AT:TABLE_BYTES]) if row[0]]

    def note_operation(self, request: int, number: int, ino: int) -> None:
        """An operation is about to begin; it takes the place of one that was answered long ago."""
        place = OPERATIONS_AT + number % OPERATIONS * _OPERATION.size
        _KEY.pack_into(self._memory, place, 0)
        _OPERATION.pack_into(self._memory, place, 0, number, ino)
        _KEY.pack_into(self._memory, place, request)

    def drop_operation(self, number: int) -> None:
        """It failed and has changed nothing."""
        _KEY.pack_into(self._memory, OPERATIONS_AT + number % OPERATIONS * _OPERATION.size, 0)
