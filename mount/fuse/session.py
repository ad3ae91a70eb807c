"""One FUSE connection from INIT to unmount: pyfuse3 behind our transport.

Owns: the socket pair, the transport and its threads. Does not know what the operations do. Invariants:
(1) The session ends when the kernel ends the connection, or by end(); the device is closed last.
(2) pyfuse3 is unmodified: it believes that its end of the socket pair is /dev/fuse (libfuse's "/dev/fd/N").
(3) Answers are taken out of the socket pair after each handler (guard.py) and before trio waits: it is never full, so
    pyfuse3, which writes to it in the trio thread, never blocks.
"""

import contextlib
import logging
import mmap
import os
import socket
import threading

import pyfuse3
import trio

from cascadefs.ext.fuse_transport import Transport
from cascadefs.mount.fuse.device import Device
from cascadefs.mount.fuse.handover import Table

log = logging.getLogger(__name__)
SOCKET_BYTES = 8 << 20  # a request or answer can be 1 MiB
WHOLE_WRITE_BYTES = 3 << 20  # one of 1 MiB fits, as the kernel counts
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
# One reader answers control requests fastest: a second one only adds wake-ups across cores. The portable path moves the
# bytes itself, there a second one keeps both cores busy.
READERS_PASSTHROUGH, READERS_PORTABLE = 1, 2


class Replies(trio.abc.Instrument):
    """Delivers what the handlers have answered before trio goes to sleep: no other thread has to be woken for it."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def before_io_wait(self, timeout: float) -> None:
        """Called by trio in each of its rounds."""
        self._transport.take_replies()


class Session:
    """A mounted connection; `await run()` serves it."""

    def __init__(self, device: Device, passthrough: bool, table: Table, ring: mmap.mmap) -> None:
        self.table = table
        self.device, self.wanted = device, passthrough and device.privileged
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._ours, theirs):
            for option in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
                with contextlib.suppress(PermissionError):
                    end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)
        self._theirs = theirs.detach()  # libfuse closes it
        self.transport = Transport(
            device.fd,
            self._ours.fileno(),
            passthrough=self.wanted,
            splicing=True,
            events=table.events,
            ring=ring,
            whole_writes=self._ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) > WHOLE_WRITE_BYTES,
        )
        self._threads: list[threading.Thread] = []
        self._closed = False

    async def run(self, operations: pyfuse3.Operations) -> None:
        """Serve until the mount is gone."""
        pyfuse3.init(operations, f"/dev/fd/{self._theirs}", set(pyfuse3.default_options))
        replies = Replies(self.transport)
        trio.lowlevel.add_instrument(replies)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._take_late_replies)
                nursery.start_soon(self._start_reading)
                await pyfuse3.main()
                nursery.cancel_scope.cancel()
        finally:
            trio.lowlevel.remove_instrument(replies)
            self._close()

    async def _start_reading(self) -> None:
        if self.table.init_request:
            self.transport.replay_init(self.table.init_request)
            while not self.transport.is_ready:  # one answer of pyfuse3 away
                await trio.sleep(0.001)
        token = trio.lowlevel.current_trio_token()
        for _ in range(READERS_PASSTHROUGH if self.wanted else READERS_PORTABLE):
            thread = threading.Thread(target=self._read_until_gone, args=(token,), name="fuse-requests", daemon=True)
            thread.start()
            self._threads.append(thread)
        thread = threading.Thread(target=self.transport.watch_writers, name="writers", daemon=True)
        thread.start()
        self._threads.append(thread)

    async def _take_late_replies(self) -> None:
        """What pyfuse3 writes in a thread of its own: invalidations."""
        while self.transport.take_replies():
            await trio.lowlevel.wait_readable(self._ours)

    def _read_until_gone(self, token: trio.lowlevel.TrioToken) -> None:
        try:
            self.transport.read_requests()
        except OSError as e:
            log.error("the FUSE device failed: %s", e)
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(self._terminate)

    def end(self) -> None:
        """As if the mount were gone, though others hold it: what they ask from now on is answered when the device is closed."""
        self._terminate()

    def _terminate(self) -> None:
        """Each reader says that the mount is gone; the second one may come when libfuse's session is no more."""
        if not self._closed:
            pyfuse3.terminate()

    def _close(self) -> None:
        self._closed = True
        self.transport.stop()
        pyfuse3.close(unmount=False)
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(timeout=5)
        self._ours.close()
        os.close(self.device.fd)
