"""What a worker leaves to the keeper, while it lives, for the next worker: descriptors that nothing else would keep.

Owns: the words between the two and both ends. The keeper forks each worker, which has the descriptors of the keeper by that; a
worker sends its own. Knows no store. Invariants: (1) A worker never waits for the keeper: what finds no room is not kept.
(2) A word has one descriptor, or none.
"""

import contextlib
import os
import select
import socket
from dataclasses import dataclass, field

WORD_BYTES = 64
LOCK, ADRIFT, BACK = "lock", "adrift", "back"


@dataclass
class Legacy:
    """The keeper's end. `adrift`: by inode, files of the memory tier that lost their names (adrift.py); `lock_fd`: of the
    tier."""

    lock_fd: int = -1
    adrift: dict[int, int] = field(default_factory=dict)

    def hear(self, door: socket.socket) -> bool:
        """One word of the worker; False: there is none and will be none."""
        word, received, _, _ = socket.recv_fds(door, WORD_BYTES, 1)
        for fd in received:
            os.set_inheritable(fd, False)
        kind, _, number = word.decode().partition(" ")
        if kind == LOCK and received:
            self._close(self.lock_fd)
            self.lock_fd = received[0]
        elif kind == ADRIFT and received:
            self._close(self.adrift.pop(int(number), -1))
            self.adrift[int(number)] = received[0]
        elif kind == BACK:
            self._close(self.adrift.pop(int(number), -1))
        return bool(word)

    def hear_until(self, door: socket.socket, process_fd: int) -> None:
        """All that the worker says until it is dead."""
        watched: list[socket.socket | int] = [door, process_fd]
        while True:
            ready, _, _ = select.select(watched, [], [])
            if door in ready:
                if not self.hear(door):
                    watched.remove(door)
            elif process_fd in ready:
                return

    def _close(self, fd: int) -> None:
        if fd >= 0:
            os.close(fd)


class Will:
    """The worker's end."""

    def __init__(self, door: socket.socket) -> None:
        self._door = door
        door.setblocking(False)

    def locked(self, lock_fd: int) -> None:
        """The lock of the memory tier is another one now."""
        self._say(LOCK, [lock_fd])

    def went(self, ino: int, fd: int) -> None:
        """The staged file of an inode has no name any more."""
        self._say(f"{ADRIFT} {ino}", [fd])

    def came_back(self, ino: int) -> None:
        """It has a name again, or is gone."""
        self._say(f"{BACK} {ino}", [])

    def _say(self, word: str, fds: list[int]) -> None:
        with contextlib.suppress(OSError):  # the keeper is gone, or stopped
            socket.send_fds(self._door, [word.encode()], fds)
