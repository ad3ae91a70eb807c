"""What a write promises beyond its bytes, over real mounts: to be durable (O_SYNC and its kin), and files without a name."""

import errno
import os

import pytest

FLAGS = {"sync": os.O_SYNC, "dsync": os.O_DSYNC}
ACCESS = {"write": os.O_WRONLY, "both": os.O_RDWR}
NAMES = [f"{flag}-{access}" for flag in FLAGS for access in ACCESS]


def flags_of(name):
    flag, access = name.split("-")
    return os.O_CREAT | FLAGS[flag] | ACCESS[access]


def lose_memory(mount):
    mount.kill()
    mount.wipe_memory()
    mount.start()


def named(fd, folder, name):
    at = os.open(folder, os.O_RDONLY)
    os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=at, dst_dir_fd=at, follow_symlinks=True)
    os.close(at)


def close_all(fds):
    for fd in fds:
        os.close(fd)


def test_a_synchronous_write_survives_the_loss_of_memory(mount):
    """New files, and those that were there; and after each write, not only after the first."""
    mount.start()
    old = mount.path / "old"
    old.write_bytes(b"before" * 1000)
    fds = [os.open(mount.path / name, flags_of(name)) for name in NAMES]
    fds.append(os.open(old, os.O_WRONLY | os.O_DSYNC | os.O_APPEND))
    for data in (b"one", b"two" * 5000):
        for fd in fds:
            assert os.write(fd, data) == len(data)
    lose_memory(mount)
    close_all(fds)
    for name in NAMES:
        assert (mount.path / name).read_bytes() == b"one" + b"two" * 5000
    assert old.read_bytes() == b"before" * 1000 + b"one" + b"two" * 5000


def test_a_synchronous_handle_stays_one_when_the_worker_dies(mount):
    mount.start()
    fds = [os.open(mount.path / name, flags_of(name)) for name in NAMES]
    for fd in fds:
        os.write(fd, b"first ")
    mount.kill_worker()
    for fd in fds:
        os.write(fd, b"second")
    for name in NAMES:
        assert (mount.path / name).read_bytes() == b"first second"
    lose_memory(mount)
    close_all(fds)
    for name in NAMES:
        assert (mount.path / name).read_bytes() == b"first second"


def test_one_synchronous_write_of_a_plain_handle(mount):
    """pwritev2 with RWF_DSYNC and RWF_SYNC. In passthrough nobody tells us of it (Limitations)."""
    mount.start()
    if mount.status()["mode"] == "passthrough":
        pytest.skip("the kernel writes by itself")
    for flag in ("RWF_DSYNC", "RWF_SYNC"):
        for access in (os.O_WRONLY, os.O_RDWR):
            fd = os.open(mount.path / f"{flag}{access}", os.O_CREAT | access)
            os.pwritev(fd, [b"durable"], 0, getattr(os, flag))
            os.close(os.dup(fd))
    lose_memory(mount)
    for name in os.listdir(mount.path):
        if name.startswith("RWF"):
            assert (mount.path / name).read_bytes() == b"durable"


def test_large_synchronous_writes_are_exact(mount, tmp_path):
    mount.start()
    data = os.urandom(5_000_001)
    fd = os.open(mount.path / "large", os.O_CREAT | os.O_RDWR | os.O_SYNC)
    assert os.write(fd, data) == len(data)
    assert os.pwrite(fd, b"x", 3_000_000) == 1
    assert os.pread(fd, len(data), 0) == data[:3_000_000] + b"x" + data[3_000_001:]
    other = os.open(mount.path / "large", os.O_RDWR)  # a plain one beside it
    os.pwrite(other, b"y", 0)
    assert os.pread(fd, 1, 0) == b"y"
    close_all((fd, other))
    assert (mount.path / "large").read_bytes() == b"y" + data[1:3_000_000] + b"x" + data[3_000_001:]


def test_a_nameless_file_outlives_the_worker_and_not_its_last_close(mount):
    mount.start()
    kept, dropped = (os.open(mount.path, os.O_TMPFILE | os.O_RDWR, 0o600) for _ in range(2))
    os.write(kept, b"before ")
    os.write(dropped, b"x" * 100_000)
    mount.kill_worker()
    os.write(kept, b"after")
    assert os.pread(kept, 100, 0) == b"before after" and os.fstat(kept).st_nlink == 0
    os.close(dropped)
    assert [name for name in os.listdir(mount.path) if name != ".cascade"] == []
    named(kept, mount.path, "named")
    os.close(kept)
    mount.kill()
    mount.start()
    assert (mount.path / "named").read_bytes() == b"before after"
    assert (mount.path / "named").stat().st_nlink == 1


def test_fsync_then_a_name_is_durable(mount):
    """The order of those who replace a file whole: write, fsync, linkat, fsync of the folder."""
    mount.start()
    fd = os.open(mount.path, os.O_TMPFILE | os.O_WRONLY, 0o644)
    os.write(fd, b"whole" * 10_000)
    os.fsync(fd)
    named(fd, mount.path, "file")
    folder = os.open(mount.path, os.O_RDONLY)
    os.fsync(folder)
    close_all((fd, folder))
    lose_memory(mount)
    assert (mount.path / "file").read_bytes() == b"whole" * 10_000


def test_a_nameless_file_is_gone_after_a_crash(mount):
    mount.start()
    fd = os.open(mount.path, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(fd, b"x" * 1_000_000)
    mount.kill()
    os.close(fd)
    mount.start()
    assert mount.status()["files"] == 0
    with pytest.raises(OSError) as refusal:
        os.open(mount.path / ".cascade", os.O_TMPFILE | os.O_RDWR, 0o600)
    assert refusal.value.errno == errno.EPERM


def test_root_allocates_without_taking_set_id_bits_whoever_serves_its_descriptor(mount):
    """Made in advance, opened, and of a worker that died."""
    mount.start()
    fds = [os.open(mount.path / name, os.O_RDWR | os.O_CREAT, 0o600) for name in ("made", "before")]
    (mount.path / "there").write_bytes(b"there")
    fds.append(os.open(mount.path / "there", os.O_RDWR))
    os.fchmod(fds[1], 0o6711)
    mount.kill_worker()
    for fd in fds:
        os.fchmod(fd, 0o6711)
        os.posix_fallocate(fd, 0, 70_000)
        assert os.fstat(fd).st_mode & 0o7777 == 0o6711
    close_all(fds)
