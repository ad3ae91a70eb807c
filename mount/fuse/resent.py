"""Requests that change names happen once, although the kernel sends them again when a worker dies before it has answered.

Owns: the numbers of operations (Namespace invariant 6) and the set of those that an earlier worker committed. Invariants:
(1) A request that was sent again and is in that set is answered from what the namespace shows now, not carried out.
(2) The set is made before the first change by this worker: afterwards a row's number no longer tells of earlier ones.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pyfuse3

from cascadefs.ext.fuse_transport import Transport
from cascadefs.metadata.namespace import Namespace
from cascadefs.mount.fuse.handover import Table

RESENT = 1 << 63  # FUSE_UNIQUE_RESEND


class Once:
    """The operations of one mount, over all its workers."""

    def __init__(self, table: Table, transport: Transport, names: Namespace) -> None:
        self._table, self._transport = table, transport
        self._done = set[int]()
        self._number = time.time_ns()
        for request, number, ino in table.operations():
            self._number = max(self._number, number)
            if names.is_done(ino, number):
                self._done.add(request)
            else:
                table.drop_operation(number)

    def request(self, ctx: pyfuse3.RequestContext) -> int:
        """The unique number of the request that a handler is called for, whether sent again or not."""
        return self._transport.request_of(ctx.pid) & ~RESENT

    def is_done(self, ctx: pyfuse3.RequestContext) -> bool:
        """Whether an earlier worker has carried out this very request."""
        return bool(self._transport.request_of(ctx.pid) & RESENT) and self.request(ctx) in self._done

    @contextmanager
    def operation(self, ctx: pyfuse3.RequestContext, ino: int) -> Iterator[int]:
        """The number for a change that touches row `ino`. No await inside: numbers grow in the order of commits."""
        number = self.number(self.request(ctx), ino)
        try:
            yield number
        except BaseException:
            self._table.drop_operation(number)
            raise

    def number(self, request: int, ino: int) -> int:
        """The same for a request that nobody waits for; the caller calls drop() when it fails."""
        self._number += 1
        self._table.note_operation(request, self._number, ino)
        return self._number

    def drop(self, numbers: Iterable[int]) -> None:
        """These have changed nothing."""
        for number in numbers:
            self._table.drop_operation(number)

    def add_done(self, requests: Iterable[int]) -> None:
        """An earlier worker answered these, or was about to, and they are carried out."""
        self._done.update(requests)
