"""Equal files that are read and written at the same time behave as in a plain folder: locks, watches, mappings, programs; also
over the death of a worker and while memory is short.

Each case is a function of two equal files that were closed and stored as one; a plain folder has to pass it, too.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import select
import shutil
import struct
import subprocess
import sys
import threading
import time

import h5py
import pytest
from conftest import MODES, Mount, need_root_and_fuse
from twin.calls import Area

MIB = 1 << 20
DATA = bytes(range(256)) * 40
F_OFD_SETLK = 37
IN_MODIFY = 2
libc = ctypes.CDLL(None, use_errno=True)
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def equal(folder, *names, data=DATA):
    """Closed files of equal content, each read once."""
    for name in names:
        (folder / name).write_bytes(data)
    stored_once(folder, names)
    for name in names:
        assert (folder / name).read_bytes() == data


def stored_once(folder, names):
    with contextlib.suppress(OSError):  # a plain folder
        assert len({os.getxattr(folder / name, "user.cascade.hash") for name in names}) == 1


@contextlib.contextmanager
def opened(path, flags=os.O_RDONLY):
    fd = os.open(path, flags)
    yield fd
    os.close(fd)


@contextlib.contextmanager
def mapped(path):
    """A mapping whose descriptor is closed."""
    with opened(path) as fd:
        area = Area(fd, os.fstat(fd).st_size, writable=False)
    yield area
    area.close()


def refused(call):
    """Whether somebody else has the lock."""
    try:
        call()
    except OSError:
        return True
    return False


def lock(fd, command=fcntl.F_SETLK, start=0):
    fcntl.fcntl(fd, command, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, 10, 0))


# --- cases


@case
def a_second_exclusive_flock_is_refused(f, copy):
    with opened(f) as reader, opened(copy):
        fcntl.flock(reader, fcntl.LOCK_EX)
        with opened(f, os.O_RDWR) as writer:
            assert refused(lambda: fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB))
            assert os.fstat(reader).st_ino == os.fstat(writer).st_ino == f.stat().st_ino
        with opened(copy, os.O_RDWR) as writer:
            fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)


@case
def a_second_record_lock_is_refused(f, copy):
    with opened(copy), opened(f), opened(f, os.O_RDWR) as first:
        lock(first)
        child = os.fork()
        if child == 0:
            with opened(f, os.O_RDWR) as second, opened(copy, os.O_RDWR) as other:
                lock(other)
                os._exit(0 if refused(lambda: lock(second)) and not refused(lambda: lock(second, start=20)) else 1)
        assert os.waitpid(child, 0)[1] == 0


@case
def a_second_lock_of_an_open_file_description_is_refused(f, copy):
    with opened(f), opened(copy), opened(f, os.O_RDWR) as first, opened(f, os.O_RDWR) as second:
        lock(first, F_OFD_SETLK)
        assert refused(lambda: lock(second, F_OFD_SETLK))


@case
def readers_see_what_a_writer_writes_and_cuts(f, copy):
    for mine, other in ((f, copy), (copy, f)):
        with opened(mine) as reader, opened(other) as stranger, opened(mine, os.O_RDWR) as writer:
            os.pwrite(writer, b"NEW", 5)
            assert os.pread(reader, 10, 4) == DATA[4:5] + b"NEW" + DATA[8:14]
            os.ftruncate(writer, 6)
            assert os.pread(reader, 100, 0) == DATA[:5] + b"N" and os.fstat(reader).st_size == 6
            assert os.pread(stranger, 20_000, 0) == DATA
        mine.write_bytes(DATA)
        stored_once(f.parent, [f.name, copy.name])


@case
def readers_see_that_their_file_is_emptied(f, copy):
    with opened(f) as reader, opened(copy) as stranger:
        with opened(f, os.O_RDWR | os.O_TRUNC) as writer:
            assert os.pread(reader, 10, 0) == b"" and os.fstat(reader).st_size == 0
            os.write(writer, b"again")
            assert os.pread(reader, 10, 0) == b"again"
            assert os.fstat(reader).st_ino == os.fstat(writer).st_ino
        assert os.pread(stranger, 20_000, 0) == DATA


@case
def readers_see_that_their_file_is_cut_by_its_path(f, copy):
    with opened(f) as reader, opened(copy) as stranger:
        os.truncate(f, 7)
        assert os.pread(reader, 20_000, 0) == DATA[:7]
        os.truncate(f, 20)
        assert os.pread(reader, 20_000, 0) == DATA[:7] + bytes(13)
        os.truncate(copy, 0)
        assert os.pread(stranger, 20_000, 0) == b""


@case
def readers_keep_a_file_that_is_renamed_over(f, copy):
    with opened(f) as old, opened(copy) as new:
        os.rename(copy, f)
        with opened(f, os.O_RDWR) as writer:
            os.pwrite(writer, b"NEW", 0)
            assert os.fstat(writer).st_ino == os.fstat(new).st_ino
        assert os.pread(old, 20_000, 0) == DATA and os.pread(new, 3, 0) == b"NEW" and os.fstat(old).st_nlink == 0


@case
def a_mapping_sees_its_own_file_only(f, copy):
    with mapped(f) as of_f, mapped(copy) as of_copy:
        with opened(f, os.O_RDWR) as writer:
            os.pwrite(writer, b"NEW", 0)
        assert of_f.read(0, 3) == b"NEW" and of_copy.read(0, len(DATA)) == DATA
        with opened(copy, os.O_RDWR) as writer:
            os.pwrite(writer, b"other", 0)
        assert of_f.read(0, 5) == b"NEW" + DATA[3:5] and of_copy.read(0, 5) == b"other"
    assert f.read_bytes() == b"NEW" + DATA[3:] and copy.read_bytes() == b"other" + DATA[5:]


@case
def a_mapping_for_writing_writes_its_own_file_only(f, copy):
    with mapped(copy) as of_copy, opened(f) as reader, opened(f, os.O_RDWR) as fd:
        area = Area(fd, len(DATA), writable=True)
        area.write(0, b"NEW")
        area.sync()
        assert os.pread(reader, 3, 0) == b"NEW" and of_copy.read(0, len(DATA)) == DATA
        area.close()


@case
def other_names_of_a_file_stay_the_same_file(f, copy):
    os.link(f, f.with_name("second"))
    with opened(f.with_name("second")) as reader, opened(copy):
        f.write_bytes(b"NEW")
        assert os.pread(reader, 100, 0) == b"NEW" and f.with_name("second").read_bytes() == b"NEW"
        assert os.path.samefile(f, f.with_name("second")) and os.fstat(reader).st_ino == f.stat().st_ino
    assert copy.read_bytes() == DATA


@case
def a_watch_goes_on(f, copy):
    watch = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    with opened(f), opened(copy):
        assert libc.inotify_add_watch(watch, os.fsencode(f), IN_MODIFY) >= 0
        for _ in range(3):
            with opened(f, os.O_WRONLY | os.O_APPEND) as writer:
                os.write(writer, b"more")
            assert select.select([watch], [], [], 10)[0]
            os.read(watch, 4096)
    os.close(watch)


@case
def tail_goes_on(f, copy):
    with opened(copy), subprocess.Popen(["tail", "-c1", "-f", f], stdout=subprocess.PIPE) as tail:
        assert tail.stdout.read(1) == DATA[-1:]
        for text in (b"one", b"two"):
            with opened(f, os.O_WRONLY | os.O_APPEND) as writer:
                os.write(writer, text)
            assert tail.stdout.read(3) == text
        tail.kill()


@case
def an_editor_saves(f, copy):
    if shutil.which("vim") is None:
        pytest.skip("vim is not here")
    with opened(f), opened(copy):
        done = subprocess.run(
            ["vim", "-es", "-u", "NONE", "-c", "normal iX", "-c", "wq", f],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done
    assert f.read_bytes() != DATA and copy.read_bytes() == DATA


@case
def hdf5_lets_no_second_one_in(f, copy):
    with h5py.File(f, "w") as file:
        file["x"] = list(range(1000))
    shutil.copy(f, copy)
    stored_once(f.parent, [f.name, copy.name])
    time.sleep(0.1)
    assert f.read_bytes() == copy.read_bytes()
    program = f"import h5py, sys; h5py.File({str(f)!r}, sys.argv[1])"

    def other(mode):
        return subprocess.run([sys.executable, "-c", program, mode], capture_output=True, check=False).returncode

    with h5py.File(copy, "r"), h5py.File(f, "r"):
        assert other("r+") != 0
    with h5py.File(copy, "r"), h5py.File(f, "r+") as writer:
        assert other("r+") != 0 and other("r") != 0
        writer["y"] = [1]
    with h5py.File(copy, "r") as unchanged:
        assert "y" not in unchanged


# --- each of them in a plain folder and on a mount


@pytest.fixture(scope="module", params=["plain", *MODES])
def folder(request, tmp_path_factory):
    base = tmp_path_factory.mktemp("inodes")
    if request.param == "plain":
        yield base
        return
    need_root_and_fuse()
    mount = Mount(base, "--shm-size", "64MiB", *MODES[request.param]).start()
    if mount.status()["mode"] != request.param:
        mount.clean()
        pytest.skip(f"this kernel cannot mount in {request.param} mode")
    yield mount.path
    mount.clean()


@pytest.mark.parametrize("name", CASES)
def test_equal_files_are_two_files(folder, name):
    place = folder / name
    place.mkdir()
    equal(place, "f", "copy")
    CASES[name](place / "f", place / "copy")


# --- what only a mount goes through


def told(mount):
    return json.loads((mount.path / ".cascade/stats").read_text())


def private(mount):
    return [path for path in (mount.memory / "private").iterdir() if path.stat().st_nlink == 1]


def wait_until(what, check):
    """Background work is not announced; give it a bounded while."""
    end = time.monotonic() + 30
    while not check():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def test_sixteen_readers_of_sixteen_equal_files_at_once(mount):
    mount.start()
    data, names = os.urandom(MIB), [f"f{i}" for i in range(16)]
    equal(mount.path, *names, data=data)
    gate, faults = threading.Barrier(16), []

    def use(name):
        gate.wait()
        with opened(mount.path / name) as reader, opened(mount.path / name) as again:
            if os.pread(reader, MIB, 0) != data or os.pread(again, MIB, 0) != data:
                faults.append(name)
            gate.wait()
            with opened(mount.path / name, os.O_WRONLY) as writer:
                os.pwrite(writer, name.encode(), 0)
            gate.wait()
            if os.pread(reader, MIB, 0) != name.encode() + data[len(name) :]:
                faults.append(f"{name} after the writes")

    threads = [threading.Thread(target=use, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert all((mount.path / name).read_bytes() == name.encode() + data[len(name) :] for name in names)
    wait_until("private files stay", lambda: not private(mount))


@pytest.mark.parametrize("changed", ["a", "b", "c"])
def test_readers_and_mappings_keep_their_files_over_the_death_of_a_worker(mount, changed):
    mount.start()
    equal(mount.path, "a", "b", "c")
    first = os.open(mount.path / "a", os.O_RDONLY)
    with mapped(mount.path / "b") as of_b, opened(mount.path / "c") as third:
        for _ in range(2):
            old = mount.kill_worker()
            wait_until("no other worker comes", lambda old=old: told(mount)["worker_pid"] != old)
        with opened(mount.path / changed, os.O_RDWR) as writer:
            os.pwrite(writer, b"NEW", 0)
            shown = {"a": os.pread(first, 3, 0), "b": of_b.read(0, 3), "c": os.pread(third, 3, 0)}
            assert shown == dict.fromkeys("abc", DATA[:3]) | {changed: b"NEW"}
        mount.flush()
        mount.kill_worker()
        assert {name: (mount.path / name).read_bytes()[:3] for name in "abc"} == shown
        assert os.pread(first, 3, 0) == shown["a"] and os.pread(third, 3, 0) == shown["c"]
    os.close(first)
    wait_until("private files stay", lambda: not private(mount))


def test_what_is_used_stays_when_memory_is_short(mount):
    mount.start()
    data = os.urandom(2 * MIB)
    equal(mount.path, "a", "b", "c", data=data)
    mount.flush()
    with opened(mount.path / "a") as reader, mapped(mount.path / "b") as of_b:
        for i in range(40):
            (mount.path / f"filler{i}").write_bytes(os.urandom(4 * MIB))
        mount.flush()
        assert (mount.path / "c").read_bytes() == data
        for name in "ab":
            with opened(mount.path / name, os.O_RDWR) as writer:
                os.pwrite(writer, name.encode(), 0)
        assert os.pread(reader, 2 * MIB, 0) == b"a" + data[1:] and of_b.read(0, 2 * MIB) == b"b" + data[1:]
    assert (mount.path / "c").read_bytes() == data


def test_a_second_reader_is_served_without_a_copy_where_memory_is_too_small(mount):
    mount.options = (*mount.options[2:], "--shm-size", "16MiB")
    mount.start()
    data = os.urandom(9 * MIB)
    equal(mount.path, "a", "b", data=data)
    mount.flush()
    with opened(mount.path / "a") as first, opened(mount.path / "b") as second:
        assert os.pread(first, 9 * MIB, 0) == data and os.pread(second, 9 * MIB, 0) == data
        for name, fd in (("a", first), ("b", second)):
            with opened(mount.path / name, os.O_RDWR) as writer:
                os.pwrite(writer, name.encode(), 0)
                assert os.pread(fd, 9 * MIB, 0) == name.encode() + data[1:]
    assert [(mount.path / name).read_bytes()[:1] for name in "ab"] == [b"a", b"b"]


def test_the_next_mount_after_a_crash_is_no_place_for_old_private_files(mount):
    mount.start()
    equal(mount.path, "a", "b")
    with mapped(mount.path / "a"), mapped(mount.path / "b"):
        assert len(private(mount)) == 1
        mount.kill()
    mount.start()
    assert not private(mount) and (mount.path / "a").read_bytes() == (mount.path / "b").read_bytes() == DATA
