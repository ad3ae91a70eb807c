"""cascadefs through its mount: the same system calls as for plain files. A second row syncs each file, like raw-disk-fsync.

Owns: mounting, and what "cold" means for a mount: unmounted with its memory given back, mounted again.
"""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cascadefs.bench.compare.adapter import Room, Safety, Service, Shape, occupied_bytes, register
from cascadefs.bench.compare.systems.files import FilePerBlock
from cascadefs.bench.io import MIB
from cascadefs.bench.targets import LeftOut, find_cli, run_command, temporary_mountpoint, unmount

SPARE_BYTES = 256 * MIB  # with twice the data: eviction is not what is measured here


def _mount(cli: tuple[str, ...], path: Path, store: Path, shm_bytes: int) -> None:
    command = [*cli, "mount", str(path), "--store", str(store), "--shm-size", f"{shm_bytes // MIB}MiB"]
    run_command(command, shlex.join(command))
    if not os.path.ismount(path):
        raise LeftOut(f"{shlex.join(command)}: returned, but nothing is mounted")


@register
class CascadeMount(FilePerBlock):
    """A file for each block; flush() makes durable what all ranks closed."""

    name, title, reference = "cascadefs", "cascadefs, mount", False
    durable, safety = "tmpfs, soon disk", Safety.KERNEL

    @classmethod
    def missing(cls) -> str | None:
        if find_cli() is None:
            return "not installed: no command cascadefs"
        return None if os.access("/dev/fuse", os.R_OK | os.W_OK) else "/dev/fuse is missing or closed to this user"

    @classmethod
    @contextmanager
    def serve(cls, room: Room, shape: Shape) -> Iterator[Service]:
        cli, store = room.cli, room.disk / cls.name
        if cli is None:
            raise LeftOut("the cascadefs command is not installed")
        shm_bytes = 2 * shape.total_bytes + SPARE_BYTES
        with temporary_mountpoint(room.note) as path:
            leave = [*cli, "umount", str(path), "--drop-memory"]

            def cool() -> None:
                run_command(leave, f"unmounting {path}")
                _mount(cli, path, store, shm_bytes)

            try:
                _mount(cli, path, store, shm_bytes)
                yield Service(str(path), cool, lambda: occupied_bytes(store / "extents"))
            finally:
                if os.path.ismount(path):
                    unmount(path, leave, room.note)

    def flush(self) -> None:
        fd = os.open(f"{self.folder}/.cascade/flush", os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@register
class CascadeMountSync(CascadeMount):
    name, title = "cascadefs-fsync", "cascadefs, mount, fsync"
    durable, safety = "disk, fsynced", Safety.SYNCED
    sync = True
