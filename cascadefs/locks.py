"""Taking locks and waking tasks. Which locks there are, and their order: ARCHITECTURE.md. Owns none of them."""

import trio


async def take(lock: trio.Lock) -> None:
    """Acquire a lock; without a turn of the scheduler when it is free, as it nearly always is."""
    try:
        lock.acquire_nowait()
    except trio.WouldBlock:
        await lock.acquire()


class Bell:
    """Wakes the tasks that wait for it; rung while none does, the next one to wait."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def ring(self) -> None:
        """In the trio thread; never waits."""
        self._event.set()

    async def wait(self) -> None:
        """Until it is rung, or has been since somebody was woken. All that wait are woken."""
        event = self._event
        await event.wait()
        if self._event is event:
            self._event = trio.Event()
