"""A memory tier on a filesystem that is smaller than it, or that others fill: without the right to mount, as in a container."""

import subprocess
import sys

import pytest
from conftest import need_root_and_fuse

# Without CAP_SYS_ADMIN there is no tmpfs of our own.
UNPRIVILEGED = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
PROGRAM = """
import sys
from pathlib import Path
from cascadefs.config import MIB, Settings
from cascadefs.library import Library

base = Path(sys.argv[1])
settings = Settings(store=base / "store", shm_dir=base / "shm", shm_size=64 * MIB)
contents = {f"f{i}": bytes([i]) * (20 * MIB) for i in range(4)}
with Library(settings) as store:
    memory = store.store.residency.memory
    assert not memory.own_mount and memory.capacity_bytes < 32 * MIB, memory.capacity_bytes
    assert "has room for" in memory.claim.notes[-1]
    for name, data in contents.items():
        store.put(name, data)
    with open(base / "shm/of-others", "wb") as file:
        file.write(bytes(20 * MIB))
    store.put("late", b"late" * MIB)
    store.flush()
    for name, data in {**contents, "late": b"late" * MIB}.items():
        found = bytearray(len(data))
        assert store.get_into(name, found) == len(data) and found == data, name
    assert memory.used_bytes() <= 32 * MIB
print("done")
"""
OUTGROWN = """
import sys
from pathlib import Path
from cascadefs.config import MIB, Settings
from cascadefs.library import Library

base, data = Path(sys.argv[1]), bytes(range(256)) * (100 << 12)
settings = Settings(store=base / "store", shm_dir=base / "shm", shm_size=16 * MIB, seal_delay=60.0)
with Library(settings) as store:
    assert store.store.residency.memory.is_roomy
    store.put("new", data)
    store.put("old", b"small")
    store.put("old", data)
with Library(settings) as store:
    for name in ("new", "old"):
        found = bytearray(len(data))
        assert store.get_into(name, found) == len(data) and found == data, name
print("done")
"""


@pytest.fixture
def small(tmp_path):
    """A folder whose `shm` is a tmpfs of 32 MiB."""
    need_root_and_fuse()
    (tmp_path / "shm").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32M", "none", tmp_path / "shm"], check=True)
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path / "shm"], check=True)


def run(base, program=PROGRAM):
    command = [*UNPRIVILEGED, sys.executable, "-c", program, base]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_files_larger_than_memory_are_stored_while_the_disk_has_room(small):
    done = run(small)
    assert done.stdout == "done\n", done.stderr


def test_a_file_that_outgrows_memory_goes_on_on_the_disk(small):
    done = run(small, OUTGROWN)
    assert done.stdout == "done\n", done.stderr


def test_a_full_filesystem_is_refused_in_one_line(small):
    with open(small / "shm/of-others", "wb") as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(1 << 20))
            file.flush()
    done = run(small)
    assert done.returncode == 1 and "give another shm_dir" in done.stderr.splitlines()[-1], done.stderr
