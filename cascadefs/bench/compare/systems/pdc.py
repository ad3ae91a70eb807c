"""PDC: a real pdc_server on loopback, driven through libpdc.so; $PDC_DIR names the installation, else the PATH leads there.

Owns: starting and ending the servers, the few calls of its C interface that whole objects need. PDC is built with MPICH. Each
rank is an MPI singleton and calls itself client 0, so that two at one server are taken for one and die: each has a server and
a folder of its own. An object is one buffer: stage() joins keys and values.
"""

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cascadefs.bench.compare.adapter import Pair, Room, Safety, Service, Shape, StorageAdapter, occupied_bytes, register, split
from cascadefs.bench.targets import LeftOut

SERVER, CLOSER, LIBRARY, MPI = "bin/pdc_server.exe", "bin/close_server", "lib/libpdc.so", "libmpich.so.12"
START_S, END_S = 90, 15
CONTAINER_CREATE = 0  # PDC_CONT_CREATE
OBJECT = ctypes.c_ulonglong
FUNCTIONS = {
    "PDCinit": (OBJECT, [ctypes.c_char_p]),
    "PDCprop_create": (OBJECT, [ctypes.c_int, OBJECT]),
    "PDCcont_create": (OBJECT, [ctypes.c_char_p, OBJECT]),
    "PDCobj_put_data": (OBJECT, [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint64, OBJECT]),
    "PDCobj_get_data": (ctypes.c_int, [OBJECT, ctypes.c_void_p, ctypes.c_uint64]),
    "PDCobj_open": (OBJECT, [ctypes.c_char_p, OBJECT]),
    "PDCobj_close": (ctypes.c_int, [OBJECT]),
    "PDCobj_del": (ctypes.c_int, [OBJECT]),
    "PDCcont_close": (ctypes.c_int, [OBJECT]),
    "PDCclose": (ctypes.c_int, [OBJECT]),
}


def _home() -> Path | None:
    """The folder of the installation."""
    if named := os.environ.get("PDC_DIR"):
        return Path(named)
    found = shutil.which(Path(SERVER).name)
    return Path(found).parent.parent if found else None


def _environment(folder: Path) -> dict[str, str]:
    """For server and ranks alike: TCP on loopback, and MPI that listens nowhere."""
    return {
        "HG_TRANSPORT": "ofi+tcp",
        "FI_TCP_IFACE": "lo",
        "PDC_TMPDIR": str(folder / "tmp"),
        "PDC_DATA_LOC": str(folder / "data"),
        "OMPI_MCA_ess_singleton_isolated": "1",
        "OMPI_MCA_btl": "self",
        "OMPI_MCA_pml": "ob1",
        "OMPI_MCA_oob_tcp_if_include": "lo",
    }


def rank_folder(address: str, rank: int) -> Path:
    """Where the server of a rank runs, and the rank itself: it finds the server by a file in there."""
    return Path(address) / f"rank-{rank}"


@contextmanager
def _server(home: Path, folder: Path) -> Iterator[Callable[[], None]]:
    """One server in a new folder, on its way up; waits until it is ready when what is given is called."""
    for name in ("tmp", "data"):
        (folder / name).mkdir(parents=True)
    environ, log = os.environ | _environment(folder), folder / "server.log"
    with (
        open(log, "wb") as output,
        subprocess.Popen([home / SERVER], cwd=folder, env=environ, stdout=output, stderr=output) as server,
    ):
        try:
            yield partial(_wait, server, log)
            subprocess.run([home / CLOSER], cwd=folder, env=environ, capture_output=True, timeout=END_S, check=False)
        finally:
            server.kill()


def _wait(server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        if "Server ready" in log.read_text(errors="replace"):
            return
        time.sleep(0.1)
    raise LeftOut(f"pdc_server did not start: {log.read_text(errors='replace')[-200:]}")


@register
class Pdc(StorageAdapter):
    """One server and one container a rank, one object a block."""

    name, title, durable, safety = "pdc", "PDC", "server memory", Safety.PROCESS

    @classmethod
    def missing(cls) -> str | None:
        home = _home()
        if home is None or not (home / SERVER).exists() or not (home / LIBRARY).exists():
            return "not installed: PDC ($PDC_DIR with bin/pdc_server.exe and lib/libpdc.so)"
        return None

    @classmethod
    @contextmanager
    def serve(cls, room: Room, shape: Shape) -> Iterator[Service]:
        home, folder = _home(), room.disk / cls.name
        assert home is not None, "missing() was asked"
        folders = [rank_folder(str(folder), rank) for rank in range(shape.ranks)]
        with ExitStack() as stack:
            for wait in [stack.enter_context(_server(home, one)) for one in folders]:
                wait()
            yield Service(str(folder), None, lambda: sum(occupied_bytes(one / "data") for one in folders))

    def initialize(self, address: str, rank: int, shape: Shape) -> None:
        home = _home()
        assert home is not None, "missing() was asked"
        folder = rank_folder(address, rank)
        os.environ |= _environment(folder)  # putenv: the C library reads it there
        os.chdir(folder)
        ctypes.CDLL(MPI, mode=ctypes.RTLD_GLOBAL).MPI_Init(None, None)
        self.calls: Any = ctypes.CDLL(str(home / LIBRARY), mode=ctypes.RTLD_GLOBAL)
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(self.calls, name)
            function.restype, function.argtypes = result, arguments
        self.pdc = self.calls.PDCinit(b"pdc")
        properties = self.calls.PDCprop_create(CONTAINER_CREATE, self.pdc)
        self.container = self.calls.PDCcont_create(f"rank-{rank}".encode(), properties)
        if not self.pdc or not self.container:
            raise OSError("PDC cannot be initialised")
        self.staged: dict[str, Any] = {}
        self.mine: set[str] = set()

    def stage(self, block_id: str, key: memoryview, value: memoryview) -> None:
        self.staged[block_id] = (ctypes.c_char * (len(key) + len(value))).from_buffer_copy(b"".join((key, value)))

    def put(self, block_id: str, key: memoryview, value: memoryview) -> None:
        if block_id not in self.staged:
            self.stage(block_id, key, value)
        whole = self.staged.pop(block_id)
        made = self.calls.PDCobj_put_data(block_id.encode(), whole, len(whole), self.container)
        if not made:
            raise OSError(f"PDC did not take {block_id}")
        self.calls.PDCobj_close(made)
        self.mine.add(block_id)

    def get(self, block_id: str, sink: Pair) -> Pair | None:
        if block_id not in self.mine:  # PDC says on its output when it does not find an object, but cannot be asked
            return None
        found = self.calls.PDCobj_open(block_id.encode(), self.pdc)
        if not found:
            return None
        whole = (ctypes.c_char * (len(sink[0]) + len(sink[1])))()
        result = self.calls.PDCobj_get_data(found, whole, len(whole))
        self.calls.PDCobj_close(found)
        return split(memoryview(whole).cast("B")) if result >= 0 else None

    def contains(self, block_id: str) -> bool:
        return block_id in self.mine

    def clear(self) -> None:
        for block_id in self.mine:
            self.calls.PDCobj_del(self.calls.PDCobj_open(block_id.encode(), self.pdc))
        self.mine.clear()

    def close(self) -> None:
        self.calls.PDCcont_close(self.container)
        self.calls.PDCclose(self.pdc)
