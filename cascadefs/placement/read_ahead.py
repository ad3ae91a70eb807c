"""Cold objects that nobody has asked for yet but somebody will: which, and bringing them to memory while the disk would idle.

Owns: the sequences that openers follow, the queue, what came ahead unused. decisions.py decides, residency.py moves the bytes.
Objects are in the order in which they were sealed, which is that of their places in the extents. Invariants:
(1) One object is read ahead at a time, and it begins only when the disk has been asked for all that is on its way: the
    last pieces of the one before are checked and copied meanwhile.
(2) Nothing is evicted for it, and nothing that goes wrong with it is told to anybody: whoever asks for that object finds out.
(3) `unused` holds exactly the copies in memory that came ahead and that nobody has asked for since; digest -> bytes.
"""

import logging
from collections import OrderedDict

import trio

from cascadefs.placement import decisions
from cascadefs.placement.residency import Residency
from cascadefs.tiers.folder import FileTier
from cascadefs.types import Object

log = logging.getLogger(__name__)
READERS = 64  # sequences that are followed at once: one number each
QUEUE = 4  # of these many readers one object each waits to be read ahead; the oldest gives way
NEAR = 4  # objects in memory are passed over up to so many


class ReadAhead:
    """`asked` and `opened` are told by files.py, `run()` acts in a nursery. All of it runs in the trio thread."""

    def __init__(self, residency: Residency, limit_bytes: int) -> None:
        self._residency, self._limit_bytes = residency, limit_bytes
        self._expected: OrderedDict[int, None] = OrderedDict()
        self._queue: OrderedDict[int, None] = OrderedDict()
        self._event = trio.Event()
        self._unmet: dict[bytes, int] = {}  # what is on its way and nobody waits for yet; digest -> bytes
        self.unused: dict[bytes, int] = {}
        self.fetched = self.used = self.wasted = 0
        residency.listen(self)

    def asked(self, found: Object) -> None:
        """An object is being opened that was not in memory, or only because of us."""
        self._unmet.pop(found.digest, None)
        follows = found.oid in self._expected
        self._expected.pop(found.oid, None)
        followers = self._residency.index.durable_after(found.oid, NEAR)
        coming = decisions.next_in_order(followers, self._residency.memory.objects, self._limit_bytes)
        if coming is None:
            return
        _remember(self._expected, coming.oid, READERS)
        if follows:
            _remember(self._queue, coming.oid, QUEUE)
            self._event.set()

    def opened(self, digest: object) -> bool:
        """A copy in memory was opened. True: it had come ahead of that."""
        was_unused = isinstance(digest, bytes) and self.unused.pop(digest, None) is not None
        self.used += was_unused
        return was_unused

    def copy_dropped(self, tier: FileTier, digest: bytes) -> None:
        """See CopyListener. What lies in memory is the only copy that is read ahead."""
        if tier is not self._residency.memory:
            return
        self.wasted += self.unused.pop(digest, None) is not None

    async def run(self) -> None:
        """Read ahead until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._event.wait()
                self._event = trio.Event()
                while self._queue:
                    await self._residency.disk_is_asked()
                    oid, _ = self._queue.popitem(last=False)
                    if (found := self._wanted(oid)) is not None:
                        await nursery.start(self._fetch, found)

    def _wanted(self, oid: int) -> Object | None:
        """The object, if it is to be brought."""
        residency = self._residency
        found = residency.index.find_oid(oid)
        if found is None or not found.durable or found.digest in residency.under_way or residency.holder(found.digest):
            return None
        memory, unused_bytes = residency.memory, sum(self.unused.values()) + sum(self._unmet.values())
        room = decisions.may_read_ahead(memory.capacity_bytes, memory.used_bytes(), unused_bytes, found.size_bytes)
        return found if room else None

    async def _fetch(self, found: Object, task_status: trio.TaskStatus[None]) -> None:
        """Bring it; it is under way when the starter goes on."""
        self._unmet[found.digest] = found.size_bytes
        task_status.started()
        came = False
        try:
            came = await self._residency.bring(found, heal=False)
        except OSError as e:  # whoever asks for it finds out
            log.debug("object %d was not read ahead: %r", found.oid, e)
        except Exception:  # a fault of ours: the mount must not end for it, and it must not stay unseen
            log.exception("object %d was not read ahead", found.oid)
        unmet_bytes = self._unmet.pop(found.digest, None)
        self.fetched += came
        if came and unmet_bytes is None:
            self.used += 1
        elif came:
            self.unused[found.digest] = found.size_bytes


def _remember(keys: OrderedDict[int, None], key: int, limit: int) -> None:
    keys.pop(key, None)
    keys[key] = None
    if len(keys) > limit:
        keys.popitem(last=False)
