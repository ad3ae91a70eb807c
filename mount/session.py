"""One FUSE connection from INIT to unmount: pyfuse3 behind our transport.

Owns: the socket pair, the transport and its threads. Does not know what the operations do. Invariants:
(1) The session ends when the kernel ends the connection, and only then; the device is closed last.
(2) pyfuse3 is unmodified: it believes that its end of the socket pair is /dev/fuse (libfuse's "/dev/fd/N").
"""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable

import pyfuse3
import trio

from cascadefs.ext.fuse_transport import Transport
from cascadefs.mount.device import Device

log = logging.getLogger(__name__)
SOCKET_BYTES = 8 << 20  # a request or answer can be 1 MiB
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
# One reader answers control requests fastest: a second one only adds wake-ups across cores. The portable path moves the
# bytes itself, there a second one keeps both cores busy.
READERS_PASSTHROUGH, READERS_PORTABLE = 1, 2


class Session:
    """A mounted connection; `await run()` serves it."""

    def __init__(self, device: Device, passthrough: bool) -> None:
        self.device, self.wanted = device, passthrough and device.privileged
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._ours, theirs):
            for option in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
                with contextlib.suppress(PermissionError):
                    end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)
        self._theirs = theirs.detach()  # libfuse closes it
        self.transport = Transport(device.fd, self._ours.fileno(), passthrough=self.wanted)
        self._threads: list[threading.Thread] = []

    async def run(self, operations: pyfuse3.Operations) -> None:
        """Serve until the mount is gone."""
        pyfuse3.init(operations, f"/dev/fd/{self._theirs}", set(pyfuse3.default_options))
        token = trio.lowlevel.current_trio_token()
        readers = READERS_PASSTHROUGH if self.wanted else READERS_PORTABLE
        for name, work in [("fuse-requests", self.transport.read_requests)] * readers:
            self._start(name, lambda work=work: self._until_gone(work, token))  # type: ignore[misc]
        self._start("fuse-replies", self.transport.write_replies)
        try:
            await pyfuse3.main()
        finally:
            self._close()

    def _start(self, name: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _until_gone(self, work: Callable[[], None], token: trio.lowlevel.TrioToken) -> None:
        try:
            work()
        except OSError as e:
            log.error("the FUSE device failed: %s", e)
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(pyfuse3.terminate)

    def _close(self) -> None:
        self.transport.stop()
        pyfuse3.close(unmount=False)
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(timeout=5)
        self._ours.close()
        os.close(self.device.fd)
