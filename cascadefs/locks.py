"""Taking locks. Which there are, and their order: ARCHITECTURE.md. Owns none of them."""

import trio


async def take(lock: trio.Lock) -> None:
    """Acquire a lock; without a turn of the scheduler when it is free, as it nearly always is."""
    try:
        lock.acquire_nowait()
    except trio.WouldBlock:
        await lock.acquire()
