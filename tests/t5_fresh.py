"""Files that were just written: the transport opens them and tells of them from their creation on. What must stay true then."""

import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from t5_grants import forwarded, until

FILES = 20


@pytest.fixture
def mounted(mount):
    mount.env = {"CASCADEFS_SEAL_DELAY": "0"}
    return mount.start()


def in_place(path, data):
    path.write_bytes(data)


def by_rename(path, data):
    tmp = path.with_name(f".{path.name}.tmp")
    tmp.write_bytes(data)
    tmp.rename(path)


@pytest.mark.parametrize("write", [in_place, by_rename])
def test_readers_of_fresh_files_do_not_wake_python(mounted, write):
    data = {mounted.path / f"f{i}": os.urandom(10_000) for i in range(FILES)}
    for path, content in data.items():
        write(path, content)
    found = {}

    def read_all():
        for path in data:
            assert path.exists()
            found[path] = path.read_bytes()

    assert forwarded(mounted, read_all) <= 0
    assert found == data


@pytest.mark.parametrize("write", [in_place, by_rename])
def test_removals_of_others_do_not_make_fresh_files_slow(mounted, write):
    paths = [mounted.path / f"f{i}" for i in range(2 * FILES)]
    for path in paths:
        write(path, os.urandom(5000))
    # On a busy machine some were made by Python, whose grants come a moment later.
    until(lambda: mounted.status()["granted_opens"] >= len(paths))

    def remove_and_read():
        for gone, path in zip(paths[::2], paths[1::2], strict=True):
            gone.unlink()
            assert path.stat().st_nlink == 1 and len(path.read_bytes()) == path.stat().st_size == 5000

    assert forwarded(mounted, remove_and_read) <= 1  # what looking costs may be one less the second time


def test_what_is_told_of_a_fresh_file_is_true_at_each_moment(mounted):
    path, other = mounted.path / "f", mounted.path / "g"
    with open(path, "xb", buffering=0) as writer:
        before = path.stat()
        assert before.st_size == 0 and before.st_nlink == 1
        for size in (1, 5000, 100_000):
            writer.write(bytes(size - path.stat().st_size))
            found = path.stat()
            assert found.st_size == size and found.st_mtime_ns >= before.st_mtime_ns
        path.chmod(0o640)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640 and path.stat().st_ctime_ns >= before.st_ctime_ns
        os.link(path, other)
        assert path.stat().st_nlink == 2
        os.truncate(path, 10)
        assert path.stat().st_size == 10
        os.utime(path, ns=(1, 2))
        assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (1, 2)
        changed = path.stat().st_ctime_ns
        os.setxattr(path, "user.a", b"b")
        assert path.stat().st_ctime_ns > changed
        changed = path.stat().st_ctime_ns
        path.rename(mounted.path / "h")
        assert other.stat().st_ctime_ns > changed and (mounted.path / "h").stat().st_mtime_ns == 2
        other.unlink()
        assert os.fstat(writer.fileno()).st_nlink == 1
    mounted.flush()
    found = (mounted.path / "h").stat()
    assert (found.st_size, found.st_mtime_ns, stat.S_IMODE(found.st_mode)) == (10, 2, 0o640)


def test_an_empty_file_and_its_reader_stay_together(mounted):
    path = mounted.path / "f"
    for seen in (b"", b"one"):
        path.touch()
        if seen:
            mounted.flush()
        with open(path, "rb", buffering=0) as reader:
            mounted.flush()
            with open(path, "ab", buffering=0) as writer:
                writer.write(b"one")
            mounted.flush()
            assert reader.read() == b"one"
        path.unlink()


def test_a_fresh_file_that_equals_another_one_keeps_its_reader(mounted):
    first, second = mounted.path / "a", mounted.path / "b"
    first.write_bytes(b"same" * 4096)
    mounted.flush()
    second.write_bytes(b"same" * 4096)
    with open(second, "rb", buffering=0) as reader:
        mounted.flush()
        with open(second, "r+b", buffering=0) as writer:
            writer.write(b"else")
        assert os.pread(reader.fileno(), 8, 0) == b"elsesame"
    assert first.read_bytes() == b"same" * 4096
    third = mounted.path / "c"
    third.write_bytes(b"same" * 4096)
    mounted.flush()
    assert third.read_bytes() == b"same" * 4096


def test_opens_of_fresh_files_outlive_the_worker(mounted):
    readers = {}
    for turn in range(3):
        old = mounted.status()["worker_pid"]
        for i in range(FILES):
            path = mounted.path / f"{turn}.{i}"
            by_rename(path, b"%d.%d " % (turn, i) * 1000)
            readers[path] = os.open(path, os.O_RDONLY)
            if i % 2:
                os.close(os.open(path, os.O_RDONLY))
        mounted.kill_worker()  # what the transport answered last has not been read of
        until(lambda old=old: mounted.status()["worker_pid"] != old)
        with open(mounted.path / f"{turn}.3", "r+b", buffering=0) as writer:
            writer.write(b"new")
        for path, fd in readers.items():
            start = b"new" if path.name.endswith(".3") else path.name.encode()
            assert os.pread(fd, len(start), 0) == start
    for fd in readers.values():
        os.close(fd)
    until(lambda: (told := mounted.status())["requests"]["known_handles"] == told["spare_files"])


def test_a_writer_who_comes_while_a_file_is_sealed_is_seen_by_later_readers(mounted):
    data = os.urandom(8 << 20)
    with ThreadPoolExecutor(1) as pool:
        for i in range(30):
            path = mounted.path / f"{i}"
            path.write_bytes(data[i:])
            sealing = pool.submit(os.getxattr, path, "user.cascade.info")
            time.sleep(i / 5000)
            with open(path, "r+b", buffering=0) as writer:
                writer.write(b"new")
                assert path.read_bytes() == b"new" + data[i + 3 :]
            sealing.result()
            path.unlink()


def rewrite(folder, number):
    """Files of one thread, each read back at once, changed, and read back again, while they are sealed."""
    for i in range(60):
        path, data = folder / f"{number}.{i % 7}", b"%d" % (i % 3) * (1 + 5000 * (i % 5))  # many are equal, some replaced
        (by_rename if i % 2 else in_place)(path, data)
        with open(path, "rb", buffering=0) as reader:
            assert reader.readall() == data
            with open(path, "r+b", buffering=0) as writer:
                writer.write(b"%d" % number)
            assert os.pread(reader.fileno(), 1 << 20, 0) == b"%d" % number + data[1:]
        assert path.stat().st_size == len(data) and path.read_bytes() == b"%d" % number + data[1:]
        if i % 4 == 0:
            path.unlink()


def test_readers_writers_and_sealing_at_once(mounted):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: rewrite(mounted.path, number), range(4)))
    mounted.flush()
    for path in mounted.path.iterdir():
        assert path.read_bytes()[:1] == path.name[:1].encode()


def test_grants_of_many_fresh_files_are_bounded(mounted):
    most = 4096  # delegations.py
    for i in range(most + 600):
        (mounted.path / f"{i}").write_bytes(b"%d" % i)
    worker = Path(f"/proc/{mounted.status()['worker_pid']}/fd")
    until(lambda: mounted.status()["granted_opens"] <= most)
    until(lambda: len(list(worker.iterdir())) < most + 1000)  # what is being sealed has descriptors, too, for a while
    assert all((mounted.path / f"{i}").read_bytes() == b"%d" % i for i in range(0, most + 600, 100))
