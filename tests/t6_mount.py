"""Whole runs over real mounts: dedup, packing, restarts with and without memory, kill -9, pressure, facts, doors."""

import errno
import hashlib
import json
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import cascadefs

from cascadefs.ext.fuse_transport import LARGEST_SPLICED_READ
from cascadefs.mount.leaving import is_running, pause_after

MIB = 1 << 20
NOBODY = 65534


def extent_bytes(mount):
    return sum(f.stat().st_size for f in (mount.store / "extents").iterdir())


def write_many(folder, count, size):
    """{name: SHA-256} of new files with random content."""
    written = {}
    for i in range(count):
        data = os.urandom(size)
        (folder / f"file-{i:05d}").write_bytes(data)
        written[f"file-{i:05d}"] = hashlib.sha256(data).digest()
    return written


def verify(folder, written):
    for name, digest in written.items():
        assert hashlib.sha256((folder / name).read_bytes()).digest() == digest, name


def test_progress_is_asked_for_a_tenth_of_the_time_at_most():
    assert pause_after(0.001) == pytest.approx(0.2)
    assert pause_after(3.0) >= 9 * 3.0


def test_fifty_names_cost_one_copy_and_change_alone(mount):
    mount.start()
    data = os.urandom(5 * MIB + 123)
    for i in range(50):
        (mount.path / f"n{i}").write_bytes(data)
    mount.flush()
    status = mount.status()
    assert status["dedup_ratio"] == 50 and status["logical_bytes"] == 50 * len(data)
    assert extent_bytes(mount) <= 1.02 * len(data)
    with open(mount.path / "n7", "r+b") as file:
        file.seek(100)
        file.write(b"changed")
    assert (mount.path / "n7").read_bytes() == data[:100] + b"changed" + data[107:]
    assert all((mount.path / f"n{i}").read_bytes() == data for i in range(50) if i != 7)


def test_small_files_are_packed(mount):
    mount.start()
    written = write_many(mount.path, 400, 30_000)
    mount.flush()
    assert len(list((mount.store / "extents").iterdir())) == 1
    assert mount.status()["tiers"]["cold"]["objects"] == 400
    verify(mount.path, written)


@pytest.mark.parametrize("wiped", [True, False])
def test_everything_is_back_after_a_restart(mount, wiped):
    mount.start()
    written = write_many(mount.path, 20, 700_001)
    os.link(mount.path / "file-00003", mount.path / "second")
    os.symlink("file-00003", mount.path / "link")
    os.setxattr(mount.path / "file-00001", "user.note", b"kept")
    (mount.path / "folder/sub").mkdir(parents=True)
    (mount.path / "empty").touch()
    os.utime(mount.path / "empty", ns=(1, 2))
    mount.stop()
    if wiped:
        mount.wipe_memory()
    mount.start()
    verify(mount.path, written)
    assert os.stat(mount.path / "second").st_nlink == 2 and os.readlink(mount.path / "link") == "file-00003"
    assert os.getxattr(mount.path / "file-00001", "user.note") == b"kept"
    assert (mount.path / "folder/sub").is_dir() and os.stat(mount.path / "empty").st_mtime_ns == 2
    tier = mount.status()["tiers"]["shm"]
    assert (tier["misses"] > 0) == wiped


def test_closed_files_survive_kill_9(mount):
    mount.start()
    written = write_many(mount.path, 30, 100_000)
    mount.kill()
    mount.start()
    verify(mount.path, written)


def test_fsynced_bytes_of_an_open_file_survive_kill_9_and_the_loss_of_memory(mount):
    mount.start()
    fd = os.open(mount.path / "log", os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"durable\n")
    os.fsync(fd)
    os.write(fd, b"not yet\n")
    mount.kill()
    mount.wipe_memory()
    mount.start()
    assert (mount.path / "log").read_bytes() == b"durable\n"
    os.close(fd)


def test_sync_close_is_durable_at_close(mount):
    mount.start("--sync", "close")
    (mount.path / "f").write_bytes(b"x" * 1000)
    mount.kill()
    mount.wipe_memory()
    mount.start()
    assert (mount.path / "f").read_bytes() == b"x" * 1000


def test_a_writer_of_three_times_the_memory_finishes_and_verifies(mount):
    mount.start()
    written = write_many(mount.path, 48, 4 * MIB)
    verify(mount.path, written)
    mount.flush()
    shm = mount.status()["tiers"]["shm"]
    assert shm["used_bytes"] <= shm["capacity_bytes"]
    verify(mount.path, written)


def test_two_processes_and_many_threads_see_right_bytes(mount):
    mount.start()

    def worker(number):
        folder = mount.path / f"w{number}"
        folder.mkdir()
        for _ in range(5):
            verify(folder, write_many(folder, 6, 50_000 + number))
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(worker, range(8)))


@pytest.mark.parametrize("mount", ["portable"], indirect=True)
def test_large_reads_are_spliced_also_while_the_file_grows_and_shrinks(mount):
    """Each page as the file held it at some time: a writer cuts and extends, readers see what it wrote or zeros."""
    mount.start()
    path, size, stamp = mount.path / "f", 3 * MIB + 123, b"0123456789abcdef"
    data = os.urandom(size)
    path.write_bytes(data)
    assert path.read_bytes() == data
    spliced = mount.status()["requests"]["spliced_bytes"]
    assert spliced >= 3 * LARGEST_SPLICED_READ
    path.write_bytes(stamp * (size // 16))
    over = threading.Event()

    def cut_and_extend():
        with open(path, "r+b", buffering=0) as file:
            while not over.is_set():
                file.truncate(MIB + 16)
                os.pwrite(file.fileno(), stamp * (size // 16), 0)

    with ThreadPoolExecutor(1) as pool, open(path, "rb", buffering=0) as file:
        writer = pool.submit(cut_and_extend)
        try:
            for _ in range(20):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                found = os.pread(file.fileno(), size, 0)
                assert found[: MIB + 16] == stamp * (MIB // 16 + 1)
                assert all(set(found[at::16]) <= {0, stamp[at]} for at in range(16))
        finally:
            over.set()
        writer.result()
    assert mount.status()["requests"]["spliced_bytes"] > spliced


def test_facts_are_told_on_request_and_not_listed(mount):
    mount.start()
    file = mount.path / "f"
    file.write_bytes(b"abc")
    assert os.getxattr(file, "user.cascade.sha256") == b"ba7816bf8f01cfea414140de5dae2223"
    assert os.getxattr(file, "user.cascade.tier") == b"shm" and os.getxattr(file, "user.cascade.blocks") == b"1"
    assert os.listxattr(file) == []
    with pytest.raises(PermissionError):
        os.setxattr(file, "user.cascade.tier", b"gpu")
    told = json.loads(cascadefs("info", file, "--json").stdout)
    assert told["references"] == 1 and len(told["hash"]) == 32
    by_hash = mount.path / ".cascade/by-hash" / told["sha256"]
    assert by_hash.read_bytes() == b"abc" and ".cascade" not in os.listdir(mount.path)
    assert subprocess.run(["cp", "-a", file, mount.path / "copy"], check=True).returncode == 0


def test_the_control_folder_is_readable_and_closed_to_others(mount):
    mount.start()
    folder = mount.path / ".cascade"
    assert sorted(os.listdir(folder)) == ["by-hash", "config", "flush", "metrics", "stats", "tiers"]
    assert json.loads((folder / "tiers").read_text())["cold"]["extents"] == 0
    assert "cascadefs_tier_used_bytes" in (folder / "metrics").read_text()
    assert json.loads((folder / "config").read_text())["shm_size"] == {"value": str(64 * MIB), "origin": "flag"}
    for action in (
        lambda: (folder / "new").touch(),
        lambda: (folder / "stats").unlink(),
        lambda: os.rename(folder, mount.path / "x"),
    ):
        with pytest.raises(OSError):
            action()
    code = f"import os; os.setgid({NOBODY}); os.setuid({NOBODY}); os.listdir({str(folder)!r})"
    done = subprocess.run(["python3", "-c", code], capture_output=True, text=True, check=False)
    assert "PermissionError" in done.stderr


def test_status_for_people_and_flush_of_one_file(mount):
    mount.start()
    (mount.path / "f").write_bytes(b"1" * 100_000)
    assert cascadefs("flush", mount.path, "f").returncode == 0
    assert json.loads(cascadefs("info", mount.path / "f", "--json").stdout)["durable"] is True
    told = cascadefs("status", mount.path)
    assert told.returncode == 0 and "1 files" in told.stdout and "cold" in told.stdout


def test_an_unlinked_open_file_stays_usable_and_leaves_nothing(mount):
    mount.start()
    with open(mount.path / "f", "w+b") as file:
        file.write(b"a" * 200_000)
        file.flush()
        os.unlink(mount.path / "f")
        file.seek(0)
        assert file.read() == b"a" * 200_000
    mount.flush()
    status = mount.status()
    assert status["files"] == 0 and status["unique_bytes"] == 0


def test_a_large_cold_file_is_streamed_and_can_be_changed(mount, tmp_path):
    (tmp_path / "toml").write_text('promote_limit = "1MiB"\n')
    mount.start("--config", str(tmp_path / "toml"))
    data = os.urandom(20 * MIB + 11)
    (mount.path / "big").write_bytes(data)
    mount.stop()
    mount.wipe_memory()
    mount.start("--config", str(tmp_path / "toml"))
    with open(mount.path / "big", "rb") as reader:
        assert reader.read() == data
        with open(mount.path / "big", "r+b") as writer:
            writer.seek(7 * MIB)
            writer.write(b"new")
        reader.seek(7 * MIB)
        assert reader.read(3) == b"new"
    assert (mount.path / "big").read_bytes() == data[: 7 * MIB] + b"new" + data[7 * MIB + 3 :]


def test_cold_files_read_in_the_order_of_writing_are_read_ahead(mount):
    mount.start()
    contents = {f"{i:02d}": os.urandom(1 << 20) for i in range(7)}
    for name, data in contents.items():
        (mount.path / name).write_bytes(data)
    mount.stop("--drop-memory")
    mount.start()
    for name, data in contents.items():
        assert (mount.path / name).read_bytes() == data
        mount.flush()  # long enough for the next one to come
    found = mount.status()["read_ahead"]
    assert found["used"] >= 4 and found["wasted"] == 0  # from the third on, and one less where their order begins elsewhere


def test_a_reader_of_a_stream_seeks_in_what_its_file_becomes(mount, tmp_path):
    (tmp_path / "toml").write_text('promote_limit = "1MiB"\n')
    mount.start("--config", tmp_path / "toml")
    path = mount.path / "large"
    path.write_bytes(b"x" * (5 << 20))
    mount.stop("--drop-memory")
    mount.start("--config", tmp_path / "toml")
    reader = os.open(path, os.O_RDONLY)  # cold, and too large to be brought to memory
    assert os.lseek(reader, 4096, os.SEEK_DATA) == 4096
    path.write_bytes(b"short")
    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
        with pytest.raises(OSError) as caught:
            os.lseek(reader, 4096, whence)
        assert caught.value.errno == errno.ENXIO
    with path.open("r+b") as writer:
        writer.truncate(1 << 20)
        assert os.lseek(reader, 4096, os.SEEK_HOLE) == 4096
    assert os.pread(reader, 100, 0) == b"short" + bytes(95)
    os.close(reader)


def test_umount_of_a_busy_mount_says_so_and_changes_nothing(mount):
    mount.start()
    with open(mount.path / "f", "wb") as file:
        file.write(b"1")
        done = cascadefs("umount", mount.path)
        assert done.returncode == 1 and "cannot unmount" in done.stderr and len(done.stderr.splitlines()) == 1
    assert (mount.path / "f").read_bytes() == b"1"


def test_an_unused_mount_sleeps_and_what_is_written_wakes_it(mount):
    mount.start()
    (mount.path / "f").write_bytes(os.urandom(MIB))
    mount.flush()
    worker, durable = mount.status()["worker_pid"], extent_bytes(mount)

    def times_awake():
        status = Path(f"/proc/{worker}/status").read_text()
        return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    time.sleep(2)  # grants are given, and then nothing is left to do
    before = times_awake()
    time.sleep(3)
    assert times_awake() - before < 3 * 25
    (mount.path / "g").write_bytes(os.urandom(MIB))  # its release is the last that is heard of it
    end = time.monotonic() + 30
    while extent_bytes(mount) < durable + MIB:
        assert time.monotonic() < end, "nothing is sealed while nobody asks"
        time.sleep(0.1)


def test_a_signal_unmounts_and_flushes(mount):
    mount.start()
    (mount.path / "f").write_bytes(b"kept")
    pid = mount.status()["worker_pid"]
    os.kill(pid, 15)
    gone = threading.Event()
    for _ in range(600):
        if not is_running(pid):
            gone.set()
            break
        gone.wait(0.02)
    assert gone.is_set() and not os.path.ismount(mount.path)
    mount.wipe_memory()
    mount.start()
    assert (mount.path / "f").read_bytes() == b"kept"
