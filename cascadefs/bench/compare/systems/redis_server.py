"""Redis: a real redis-server on loopback without persistence, driven by redis-py over TCP and over a unix socket.

Owns: starting and ending the server. Keys and values of a block are two strings, set and read by one command.
"""

import os
import shutil
import socket
import subprocess
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cascadefs.bench.compare.adapter import Pair, Room, Safety, Service, Shape, StorageAdapter, not_importable, register
from cascadefs.bench.targets import LeftOut

SERVER, START_S = "redis-server", 20


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _client(address: str) -> Any:
    import redis

    return redis.Redis.from_url(address)


def _wait(server: subprocess.Popen[bytes], address: str) -> None:
    import redis

    end = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < end:
        try:
            _client(address).ping()
            return
        except redis.exceptions.ConnectionError:
            time.sleep(0.02)
    raise LeftOut(f"{SERVER} did not start")


class Redis(StorageAdapter):
    """get() returns what redis-py returns: fresh bytes."""

    durable, safety = "server memory", Safety.PROCESS

    @classmethod
    def missing(cls) -> str | None:
        if shutil.which(SERVER) is None:
            return f"not installed: {SERVER} (make bench-deps)"
        return not_importable("redis")

    @classmethod
    def load(cls) -> None:
        import redis  # noqa: F401

    @classmethod
    @abstractmethod
    def endpoint(cls, room: Room) -> tuple[str, list[str]]:
        """(URL for the client, options for the server)"""

    @classmethod
    @contextmanager
    def serve(cls, room: Room, shape: Shape) -> Iterator[Service]:
        address, options = cls.endpoint(room)
        command = [SERVER, *options, "--save", "", "--appendonly", "no", "--dir", str(room.disk)]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as server:
            try:
                _wait(server, address)
                yield Service(address, None, lambda: int(_client(address).info("memory")["used_memory_dataset"]))
            finally:
                server.kill()

    def initialize(self, address: str, rank: int, shape: Shape) -> None:
        self.client, self.mine = _client(address), list[str]()

    def put(self, block_id: str, key: memoryview, value: memoryview) -> None:
        self.client.mset({f"{block_id}:k": key, f"{block_id}:v": value})
        self.mine.append(block_id)

    def get(self, block_id: str, sink: Pair) -> Pair | None:
        key, value = self.client.mget(f"{block_id}:k", f"{block_id}:v")
        return None if key is None or value is None else (memoryview(key), memoryview(value))

    def contains(self, block_id: str) -> bool:
        return bool(self.client.exists(f"{block_id}:v"))

    def clear(self) -> None:
        for block_id in self.mine:
            self.client.delete(f"{block_id}:k", f"{block_id}:v")
        self.mine.clear()

    def close(self) -> None:
        self.client.close()


@register
class RedisTcp(Redis):
    name, title = "redis-tcp", "Redis, TCP"

    @classmethod
    def endpoint(cls, room: Room) -> tuple[str, list[str]]:
        port = _free_port()
        return f"redis://127.0.0.1:{port}", ["--bind", "127.0.0.1", "--port", str(port)]


@register
class RedisUnix(Redis):
    name, title = "redis-unix", "Redis, unix socket"

    @classmethod
    def endpoint(cls, room: Room) -> tuple[str, list[str]]:
        path = os.path.abspath(room.memory / "redis.sock")
        return f"unix://{path}", ["--port", "0", "--unixsocket", path]
