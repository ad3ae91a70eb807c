"""What staged files hold: opened, found free of writers, fingerprinted block by block; many in one call of a thread.

Owns: the descriptors of one batch while it is sealed. Knows no index. Invariants:
(1) Prints are those of the bytes that were read here; the caller holds the locks of the inodes, so that nobody opens them for
    writing meanwhile, and the lease says that nobody had.
(2) What goes wrong with one file is kept with it; the others are read all the same.
"""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from cascadefs.config import FILE_BYTES_MAX, MIB
from cascadefs.contents.open_files import Live
from cascadefs.crash import point
from cascadefs.ext import hashing
from cascadefs.media import file_io
from cascadefs.media.transfers import Buffers
from cascadefs.tiers.folder import FileTier
from cascadefs.types import Print


@dataclass(eq=False, slots=True)
class Staged:
    """A staged file that is to become an object. `is_busy`: not now, it has or may have writers."""

    live: Live
    tier: FileTier
    domain: int  # of deduplication
    fd: int = -1
    size_bytes: int = 0
    is_busy: bool = False
    prints: list[Print] = field(default_factory=list)
    digest: bytes = b""
    error: OSError | None = None

    @property
    def ino(self) -> int:
        """Of the inode."""
        return self.live.ino

    def close(self) -> None:
        """Let go of the file. May be called twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Examiner:
    """Reads for one store. Every method may be called in a thread, and blocks."""

    def __init__(self, block_bytes: int, secret: bytes, buffers: Buffers) -> None:
        self._block_bytes, self._secret, self._buffers = block_bytes, secret, buffers

    def examine(self, batch: Sequence[Staged]) -> None:
        """Fill in descriptor, size and prints of each, or why not."""
        for one in batch:
            try:
                self.open(one)
                if not one.is_busy:
                    point("leased")
                    one.prints = self.fingerprints(one.fd, one.size_bytes)
            except OSError as e:
                one.error = e

    def open(self, one: Staged) -> None:
        """Descriptor and size; whether it is busy."""
        path = one.tier.staged_path(one.ino)
        one.fd = file_io.open_file(path, os.O_RDONLY)
        one.size_bytes = (state := os.fstat(one.fd)).st_size
        # Nothing is no object: readers of an empty file would be left with one that no writer knows.
        unfit = one.size_bytes > FILE_BYTES_MAX or (one.live.source is not None and not one.size_bytes)
        one.is_busy = unfit or not file_io.lease_is_free(one.fd)
        if not one.is_busy:
            file_io.cut_padding(path, state)

    def fingerprints(self, fd: int, size_bytes: int) -> list[Print]:
        """(fingerprint, length) of each block."""
        data = self._buffers.take(max(MIB, self._block_bytes))  # of a size that is kept: fresh pages cost more than hashing
        try:
            with memoryview(data) as buffer:
                return self._read_prints(fd, size_bytes, buffer)
        finally:
            self._buffers.give(data)

    def _read_prints(self, fd: int, size_bytes: int, buffer: memoryview) -> list[Print]:
        """Whole holes are not read."""
        step, result = self._block_bytes, list[Print]()
        zeros: dict[int, bytes] = {}
        data_from = -1
        for offset in range(0, size_bytes, step):
            length = min(step, size_bytes - offset)
            if data_from < offset:
                data_from = _next_data(fd, offset, size_bytes)
            if data_from >= offset + length:
                if length not in zeros:
                    zeros[length] = hashing.fingerprint(bytes(length), self._secret)
                result.append((zeros[length], length))
            else:
                with buffer[:length] as part:
                    result.append((hashing.read_fingerprint(fd, offset, part, self._secret), length))
        return result


def _next_data(fd: int, offset: int, size_bytes: int) -> int:
    """Where the next data are; the size when only a hole follows."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as e:
        if e.errno == errno.ENXIO:
            return size_bytes
        raise
