"""The transport between a fake kernel (one socket pair) and a fake pyfuse3 (another): exact messages in, exact messages out."""

import errno
import fcntl
import os
import select
import socket
import struct
import termios
import threading
import time
from pathlib import Path

import pytest

from cascadefs.ext.fuse_transport import (
    FOPEN_DIRECT_IO,
    FOPEN_KEEP_CACHE,
    FOPEN_NOFLUSH,
    FOPEN_PASSTHROUGH,
    LARGEST_SPLICED_READ,
    WRITE_IS_DONE,
    WRITE_IS_KEPT,
    WRITE_IS_SYNCED,
    WRITE_TAKES_PRIVILEGES,
    WRITER_MAY_NOT_KEEP_SETID,
    Transport,
)

INIT, OPEN, READ, WRITE, CREATE, FALLOCATE, LSEEK, LOOKUP, READDIR = 26, 14, 15, 16, 35, 43, 46, 1, 28
INIT_EXT, KILLPRIV_V2, PASSTHROUGH2, MMAP2 = 1 << 30, 1 << 28, 1 << 5, 1 << 4
TIMEOUT_S = 5


class Wire:
    """`kernel` is where the kernel would be, `fuse` where pyfuse3 would be."""

    def __init__(self, kind=socket.SOCK_SEQPACKET, **options):
        self.kernel, device = socket.socketpair(socket.AF_UNIX, kind)
        self.fuse, relay = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.kernel, self.fuse):
            end.settimeout(TIMEOUT_S)
        self.held = (device, relay)
        self.transport = Transport(device.fileno(), relay.fileno(), passthrough=True, **options)
        self.relay = relay
        self.threads = [threading.Thread(target=f) for f in (self.transport.read_requests, self.relay_replies)]
        for thread in self.threads:
            thread.start()

    def relay_replies(self):
        while self.transport.take_replies():
            select.select([self.relay], [], [], TIMEOUT_S)

    def close(self):
        self.kernel.close()
        self.fuse.close()
        for thread in self.threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()
        for end in self.held:
            end.close()

    def ask(self, opcode, body=b"", unique=7):
        self.kernel.send(struct.pack("<IIQQIIIHH", 40 + len(body), opcode, unique, 1, 0, 0, 0, 0, 0) + body)

    def rest(self):
        """Wait until the reader has done all there is to do for what was asked, and sleeps in read(2) again."""
        stat = Path(f"/proc/self/task/{self.threads[0].native_id}/stat")
        end = time.monotonic() + TIMEOUT_S
        while unread(self.kernel) or stat.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < end
            time.sleep(0.001)

    def answered(self):
        """(error, unique, body) that the kernel got."""
        message = self.kernel.recv(1 << 21)
        length, error, unique = struct.unpack_from("<IiQ", message)
        assert length == len(message)
        return error, unique, message[16:]

    def forwarded(self):
        """(opcode, body) that pyfuse3 got."""
        message = self.fuse.recv(1 << 21)
        return struct.unpack_from("<II", message)[1], message[40:]

    def reply(self, body=b"", error=0, unique=7):
        self.fuse.send(struct.pack("<IiQ", 16 + len(body), error, unique) + body)


def unread(end):
    """Bytes sent to a socket that the other side has not read yet (SIOCOUTQ)."""
    return struct.unpack("i", fcntl.ioctl(end, termios.TIOCOUTQ, bytes(4)))[0]


@pytest.fixture
def wire():
    found = Wire()
    yield found
    found.close()


def io_body(fh, offset, size):
    return struct.pack("<QQIIQII", fh, offset, size, 0, 0, 0, 0)


def test_other_requests_and_replies_pass_unchanged(wire):
    wire.ask(LOOKUP, b"name\0", unique=5)
    assert wire.forwarded() == (LOOKUP, b"name\0")
    wire.reply(b"entry", unique=5)
    assert wire.answered() == (0, 5, b"entry")
    wire.reply(error=-errno.ENOENT, unique=9)
    assert wire.answered() == (-errno.ENOENT, 9, b"")


def rings(bell, seconds):
    return bool(select.select([bell], [], [], seconds)[0])


def test_the_bell_rings_once_for_what_comes_after_it_was_armed(wire):
    before = wire.transport.came
    wire.ask(LOOKUP, b"name\0")
    wire.forwarded()
    bell = wire.transport.arm()
    assert wire.transport.came == before + 1  # whoever sees that does not sleep
    wire.rest()
    wire.transport.arm()  # what rang in between is forgotten
    assert not rings(bell, 0.05)
    for unique in (8, 9):
        wire.ask(LOOKUP, b"name\0", unique)
        wire.forwarded()
    assert rings(bell, TIMEOUT_S)
    wire.rest()
    wire.transport.arm()
    assert not rings(bell, 0.05)
    wire.transport.ring()
    assert rings(bell, 0)
    wire.transport.arm()
    assert not rings(bell, 0)


def test_init_is_told_of_passthrough_only_when_the_kernel_offers_it(wire):
    for offered, expected in (((INIT_EXT | KILLPRIV_V2, PASSTHROUGH2 | MMAP2), True), ((INIT_EXT, 0), False), ((0, 0), False)):
        flags, flags2 = offered
        wire.ask(INIT, struct.pack("<IIIII", 7, 41, 131072, flags, flags2) + bytes(44))
        assert wire.forwarded()[0] == INIT
        wire.reply(struct.pack("<IIIIHHIIHHII", 7, 31, 131072, 1, 12, 9, 1 << 24, 1, 256, 0, 0, 0) + bytes(24))
        body = wire.answered()[2]
        out = struct.unpack_from("<IIIIHHIIHHII", body)
        assert bool(out[10] & PASSTHROUGH2) == expected and out[11] == int(expected)
        assert bool(out[3] & INIT_EXT) == bool(flags) and out[3] & 1
        assert bool(out[3] & KILLPRIV_V2) == bool(flags & KILLPRIV_V2)
        assert out[6] <= (1 << 20) + (1 << 16)  # max_write fits the buffer
    assert wire.transport.negotiated_passthrough


@pytest.mark.parametrize("opcode", [OPEN, CREATE])
def test_open_replies_get_the_backing_id_and_lose_what_the_kernel_refuses(wire, opcode):
    entry = bytes(128) if opcode == CREATE else b""
    wire.transport.set_handle(3, backing_id=42, open_flags=FOPEN_NOFLUSH)
    wire.ask(opcode, bytes(16))
    wire.forwarded()
    wire.reply(entry + struct.pack("<QIi", 3, FOPEN_KEEP_CACHE, 0))
    fh, flags, backing_id = struct.unpack("<QIi", wire.answered()[2][len(entry) :])
    assert (fh, flags, backing_id) == (3, FOPEN_PASSTHROUGH | FOPEN_NOFLUSH, 42)
    wire.transport.set_handle(4, open_flags=FOPEN_NOFLUSH)
    wire.ask(opcode, bytes(16))
    wire.forwarded()
    wire.reply(entry + struct.pack("<QIi", 4, FOPEN_KEEP_CACHE, 0))
    assert wire.answered()[2][len(entry) :] == struct.pack("<QIi", 4, FOPEN_KEEP_CACHE | FOPEN_NOFLUSH, 0)


def test_served_reads_and_writes_are_exact(wire, tmp_path):
    data = os.urandom(200_000)
    (tmp_path / "f").write_bytes(data)
    with open(tmp_path / "f", "r+b", buffering=0) as file:
        wire.transport.set_handle(1, fd=file.fileno(), served=True, writable=True)
        for offset, size in ((0, 100_000), (100_000, 131_072), (199_999, 10), (200_000, 10), (1 << 40, 10)):
            wire.ask(READ, io_body(1, offset, size), unique=offset + 1)
            assert wire.answered() == (0, offset + 1, data[offset : offset + size])
        wire.ask(WRITE, io_body(1, 5, 5000) + b"w" * 5000)
        assert wire.answered() == (0, 7, struct.pack("<II", 5000, 0))
        wire.transport.drop_handle(1)
    assert (tmp_path / "f").read_bytes() == data[:5] + b"w" * 5000 + data[5005:]
    counts = wire.transport.counts()
    assert counts["read"] == 5 and counts["write_bytes"] == 5000 and counts["forwarded"] == 0


def test_large_reads_through_the_pipe_are_exact(tmp_path):
    """A stream takes what is spliced into it as it comes; the true device, as one message."""
    data = os.urandom(3_000_000)
    (tmp_path / "f").write_bytes(data)
    wire = Wire(socket.SOCK_STREAM, splicing=True)
    whole = LARGEST_SPLICED_READ
    piped = ((0, 1 << 16), (4096, whole), (5, 300_000), (5, whole - 5), (2_900_000, 1 << 20))
    copied = ((0, whole + 1), (5, whole), (7, 65_535), (2_999_990, 1 << 20), (1 << 40, 1 << 20))
    with open(tmp_path / "f", "rb") as file, wire.kernel.makefile("rb") as answers:
        wire.transport.set_handle(1, fd=file.fileno(), served=True)
        for offset, size in (*piped, *copied, piped[1]):
            wire.ask(READ, io_body(1, offset, size), unique=offset + 1)
            expected = data[offset : offset + size]
            assert answers.read(16) == struct.pack("<IiQ", 16 + len(expected), 0, offset + 1)
            assert answers.read(len(expected)) == expected
        wire.transport.drop_handle(1)
    spliced = sum(len(data[offset : offset + size]) for offset, size in (*piped, piped[1]))
    wire.close()
    counts = wire.transport.counts()
    assert (counts["spliced_bytes"], counts["failed_replies"]) == (spliced, 0)


def test_a_read_only_handle_is_not_written_by_the_transport(wire, tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    with open(tmp_path / "f", "rb") as file:
        wire.transport.set_handle(1, fd=file.fileno(), served=True)
        wire.ask(WRITE, io_body(1, 0, 1) + b"x")
        assert wire.forwarded()[0] == WRITE
        wire.transport.drop_handle(1)
    wire.ask(READ, io_body(1, 0, 1))
    assert wire.forwarded()[0] == READ


def test_a_write_without_space_goes_to_python(wire):
    with open("/dev/full", "r+b", buffering=0) as full:
        wire.transport.set_handle(1, fd=full.fileno(), served=True, writable=True)
        wire.ask(WRITE, io_body(1, 0, 3) + b"abc")
        assert wire.forwarded() == (WRITE, io_body(1, 0, 3) + b"abc")
        wire.transport.drop_handle(1)


def test_fallocate_and_lseek_are_answered_here(wire, tmp_path):
    (tmp_path / "f").touch()
    fd = os.open(tmp_path / "f", os.O_RDONLY)  # as sources are: it is opened again for writing
    wire.transport.set_handle(1, fd=fd)
    wire.ask(FALLOCATE, struct.pack("<QQQII", 1, 0, 8192, 0, 0))
    assert wire.answered() == (0, 7, b"") and os.fstat(fd).st_size == 8192 and os.fstat(fd).st_blocks >= 16
    with open(tmp_path / "f", "r+b") as file:
        file.write(b"d" * 8192)
        file.truncate(1 << 20)
    wire.ask(LSEEK, struct.pack("<QQII", 1, 0, os.SEEK_HOLE, 0))
    assert wire.answered()[2] == struct.pack("<Q", 8192)
    wire.ask(FALLOCATE, struct.pack("<QQQII", 99, 0, 8192, 0, 0))
    assert wire.answered()[0] == -errno.EBADF  # never ENOSYS: the kernel would not ask again
    os.close(fd)


def test_where_there_is_no_descriptor_python_seeks(wire):
    wire.transport.set_handle(2)
    for offset, whence, name in (
        (0, os.SEEK_DATA, b"/lseek 0 3"),
        ((1 << 64) - 1, os.SEEK_HOLE, b"/lseek ffffffffffffffff 4"),
        (5, (1 << 32) - 1, b"/lseek 5 ffffffff"),
    ):
        wire.ask(LSEEK, struct.pack("<QQII", 2, offset, whence, 0))
        assert wire.forwarded() == (GETXATTR, struct.pack("<II", 8, 0) + name + b"\0")


def test_malformed_requests_are_refused_and_do_not_end_the_mount(wire):
    wire.kernel.send(b"short")
    wire.kernel.send(struct.pack("<IIQQIIIHH", 4000, READ, 3, 1, 0, 0, 0, 0, 0))
    assert wire.answered()[:2] == (-errno.EINVAL, 3)
    wire.ask(WRITE, io_body(1, 0, 100) + b"x")
    assert wire.answered()[0] == -errno.EINVAL
    wire.ask(LOOKUP, b"n\0")
    assert wire.forwarded() == (LOOKUP, b"n\0")
    assert wire.transport.counts()["malformed"] == 3


def test_listings_are_asked_for_in_pieces_that_fit_a_small_socket(wire):
    wire.ask(READDIR, io_body(1, 0, 1 << 20))
    assert struct.unpack_from("<QQI", wire.forwarded()[1])[2] == 128 << 10


def test_stop_lets_readers_leave_while_they_wait(wire):
    wire.transport.stop()
    wire.threads[0].join(TIMEOUT_S)
    assert not wire.threads[0].is_alive()


def test_many_handles_come_and_go_while_they_are_read(wire, tmp_path):
    (tmp_path / "f").write_bytes(b"z" * 4096)
    with open(tmp_path / "f", "rb") as file:
        for fh in range(3000):
            wire.transport.set_handle(fh, fd=file.fileno(), served=True)
        for fh in range(0, 3000, 2):
            wire.transport.drop_handle(fh)
        for fh in (1, 1501, 2999):
            wire.ask(READ, io_body(fh, 0, 4096), unique=fh)
            assert wire.answered() == (0, fh, b"z" * 4096)
        wire.ask(READ, io_body(1500, 0, 4096))
        assert wire.forwarded()[0] == READ
        for fh in range(1, 3000, 2):
            wire.transport.drop_handle(fh)


def test_releases_and_forgets_are_put_aside_in_order(wire, tmp_path):
    wire.transport.set_handle(5)
    wire.ask(18, struct.pack("<QIIQ", 5, 0, 0, 0))
    assert wire.answered() == (0, 7, b"")
    wire.ask(2, struct.pack("<Q", 3))
    wire.ask(42, struct.pack("<II", 2, 0) + struct.pack("<QQQQ", 10, 1, 11, 4))
    wire.ask(18, struct.pack("<QIIQ", 6, 0, 0, 0))
    assert wire.forwarded()[0] == 18  # a handle that nobody announced
    assert wire.transport.take_events(0) == ([], [], [])
    limit = wire.transport.events_put()
    assert wire.transport.take_events(limit) == ([], [5], [(1, 3), (10, 1), (11, 4)])
    assert wire.transport.take_events(limit) == ([], [], [])


def test_only_names_that_are_surely_absent_are_answered_here(wire):
    wire.transport.add_name(1, b"here")
    wire.ask(LOOKUP, b"gone\0")
    assert wire.forwarded() == (LOOKUP, b"gone\0")  # the table is not complete yet
    wire.transport.names_are_complete()
    wire.ask(LOOKUP, b"gone\0")
    assert wire.answered() == (-errno.ENOENT, 7, b"")
    for name in (b".hidden", b"...", b".cascadf", b".cascade2"):
        wire.ask(LOOKUP, name + b"\0")
        assert wire.answered()[0] == -errno.ENOENT
    for name in (b"here", b".", b"..", b".cascade", b"n" * 256):
        wire.ask(LOOKUP, name + b"\0")
        assert wire.forwarded() == (LOOKUP, name + b"\0")
    wire.kernel.send(struct.pack("<IIQQIIIHH", 46, LOOKUP, 7, 1 << 60, 0, 0, 0, 0, 0) + b"stats\0")
    assert wire.forwarded()[0] == LOOKUP  # the folders of .cascade are not in the table
    wire.transport.add_name(1, b"here")
    wire.transport.remove_name(1, b"here")
    wire.ask(LOOKUP, b"here\0")
    assert wire.forwarded()[0] == LOOKUP
    wire.transport.remove_name(1, b"here")
    wire.ask(LOOKUP, b"here\0")
    assert wire.answered()[0] == -errno.ENOENT


def test_the_kernel_is_told_how_long_it_may_keep_that_a_name_is_absent(wire):
    wire.transport.add_name(1, b"here")
    wire.transport.names_are_complete(600)
    wire.ask(LOOKUP, b"gone\0")
    assert wire.answered() == (0, 7, struct.pack("<4Q2I", 0, 0, 600, 0, 0, 0) + bytes(88))  # fuse_entry_out without an inode
    wire.ask(LOOKUP, b"here\0")
    assert wire.forwarded()[0] == LOOKUP


def test_the_name_table_agrees_with_a_plain_counter(wire):
    counts = {}
    wire.transport.names_are_complete()
    for i in range(20_000):
        key = (i * 7919 % 97, b"%d" % (i * 104_729 % 1000))
        if i % 3 and counts.get(key):
            counts[key] -= 1
            wire.transport.remove_name(*key)
        else:
            counts[key] = counts.get(key, 0) + 1
            wire.transport.add_name(*key)
    for (folder, name), count in list(counts.items())[:500]:
        wire.kernel.send(struct.pack("<IIQQIIIHH", 41 + len(name), LOOKUP, 7, folder, 0, 0, 0, 0, 0) + name + b"\0")
        assert wire.forwarded()[0] == LOOKUP if count else wire.answered()[0] == -errno.ENOENT


def test_capabilities_are_denied_only_when_told(wire):
    question = struct.pack("<II", 0, 0) + b"security.capability\0"
    wire.ask(22, question)
    assert wire.forwarded() == (22, question)
    wire.transport.set_capabilities(False)
    wire.ask(22, question)
    assert wire.answered() == (-errno.ENODATA, 7, b"")
    wire.ask(22, question.replace(b"capability", b"capabilitx"))
    assert wire.forwarded()[0] == 22


def test_attributes_given_in_advance_are_answered_until_dropped(wire):
    answer = os.urandom(104)
    wire.ask(3, bytes(16))
    assert wire.forwarded()[0] == 3
    wire.transport.set_attributes(1, answer)
    wire.ask(3, bytes(16))
    assert wire.answered() == (0, 7, answer)
    wire.transport.drop_attributes(1)
    wire.transport.drop_attributes(1)
    wire.ask(3, bytes(16))
    assert wire.forwarded()[0] == 3
    for ino in range(20_000):  # bounded: what is too much is left to Python
        wire.transport.set_attributes(ino, answer)
    with pytest.raises(ValueError, match="fuse_attr_out"):
        wire.transport.set_attributes(1, b"short")


SETXATTR, GETXATTR, TMPFILE, STATX = 21, 22, 51, 52
DSYNC_FLAG, KILL_FLAG = os.O_DSYNC, 1 << 2


def write_body(fh, data, flags=0, open_flags=0, offset=0):
    return struct.pack("<QQIIQII", fh, offset, len(data), flags, 0, open_flags, 0) + data


def test_a_write_that_must_be_durable_is_written_here_and_told_to_python(wire, tmp_path):
    with open(tmp_path / "f", "w+b", buffering=0) as file:
        wire.transport.set_handle(1, fd=file.fileno(), served=True, writable=True, open_flags=FOPEN_DIRECT_IO)
        wire.transport.set_handle(2, fd=file.fileno(), served=True, writable=True, open_flags=FOPEN_KEEP_CACHE)
        wire.ask(WRITE, write_body(1, b"durable", open_flags=DSYNC_FLAG))
        marked = 1 | WRITE_IS_SYNCED | WRITE_IS_DONE
        assert wire.forwarded() == (WRITE, write_body(marked, struct.pack("<I", 7), open_flags=DSYNC_FLAG))
        assert os.pread(file.fileno(), 10, 0) == b"durable"
        for fh, flags in ((1, 0), (2, DSYNC_FLAG)):  # after the latter the kernel sends an FSYNC
            wire.ask(WRITE, write_body(fh, b"cached", open_flags=flags))
            assert wire.answered() == (0, 7, struct.pack("<II", 6, 0))
        for fh in (1, 2):
            wire.transport.drop_handle(fh)


def test_a_write_that_takes_privileges_comes_to_python_first(wire, tmp_path):
    with open(tmp_path / "f", "w+b", buffering=0) as file:
        wire.transport.set_handle(1, fd=file.fileno(), served=True, writable=True, guarded=True)
        for flags, mark in ((KILL_FLAG, WRITER_MAY_NOT_KEEP_SETID), (0, 0)):
            file.truncate(0)
            wire.ask(WRITE, write_body(1, b"bytes", flags))
            assert wire.forwarded() == (WRITE, write_body(1 | WRITE_TAKES_PRIVILEGES | mark, b"bytes", flags))
            assert os.fstat(file.fileno()).st_size == 0
        asked = struct.pack("<QQQII", 1, 0, 8192, 0, 0)
        wire.ask(FALLOCATE, asked)
        assert wire.forwarded() == (SETXATTR, struct.pack("<II", len(asked), 0) + b"/fallocate\0" + asked)
        wire.transport.set_handle(1, fd=file.fileno(), served=True, writable=True)
        wire.ask(FALLOCATE, asked)
        assert wire.answered()[0] == 0
        wire.transport.drop_handle(1)


def test_the_bytes_of_a_write_that_does_not_fit_the_socket_are_kept(tmp_path):
    wire = Wire(whole_writes=False)
    small, large = os.urandom(64 << 10), os.urandom(150_000)
    with open(tmp_path / "f", "w+b", buffering=0) as file:
        wire.transport.set_handle(1, fd=file.fileno(), served=True, writable=True, guarded=True)
        wire.ask(WRITE, write_body(1, small))
        assert wire.forwarded() == (WRITE, write_body(1 | WRITE_TAKES_PRIVILEGES, small))
        wire.ask(WRITE, write_body(1, large, offset=5))
        opcode, told = wire.forwarded()
        number = told[-8:]
        assert (opcode, told) == (WRITE, write_body(1 | WRITE_TAKES_PRIVILEGES | WRITE_IS_KEPT, number, offset=5))
        assert wire.transport.take_write(int.from_bytes(number, "little")) == large
        with pytest.raises(KeyError):
            wire.transport.take_write(int.from_bytes(number, "little"))
        wire.transport.drop_handle(1)
    with open("/dev/full", "r+b", buffering=0) as full:
        wire.transport.set_handle(2, fd=full.fileno(), served=True, writable=True)
        for _ in range(64):
            wire.ask(WRITE, write_body(2, large))
            assert wire.forwarded()[1][:8] == struct.pack("<Q", 2 | WRITE_IS_KEPT)
        wire.ask(WRITE, write_body(2, large))
        assert wire.forwarded() == (WRITE, write_body(2, large))  # which the kernel gets as ENOSPC, where it is too long
        wire.transport.drop_handle(2)
    wire.close()


def test_what_pyfuse3_lacks_comes_in_the_form_of_others(wire):
    made = struct.pack("<IIII", os.O_RDWR, 0o600, 0, 0) + b"/\0"
    wire.ask(TMPFILE, made)
    assert wire.forwarded() == (CREATE, made)
    wire.ask(STATX, struct.pack("<IIQII", 1, 0, 5, 0, 0xFFF))
    assert wire.forwarded() == (GETXATTR, struct.pack("<II", 288, 0) + b"/statx\0")
    wire.ask(TMPFILE, b"")
    assert wire.answered()[0] == -errno.EINVAL


def test_a_range_is_zeroed_also_where_the_filesystem_cannot(wire):
    zero, keep = 16, 1
    with open("/dev/shm/cascadefs-test-zero", "w+b", buffering=0) as file:
        os.unlink(file.name)
        file.write(b"d" * 10_000)
        wire.transport.set_handle(1, fd=file.fileno())
        for mode, offset, length, size in (
            (zero, 4000, 3000, 10_000),
            (zero | keep, 9000, 5000, 10_000),
            (zero, 9500, 5000, 14_500),
        ):
            wire.ask(FALLOCATE, struct.pack("<QQQII", 1, offset, length, mode, 0))
            assert wire.answered() == (0, 7, b"")
            assert os.fstat(file.fileno()).st_size == size
        expected = b"d" * 4000 + bytes(3000) + b"d" * 2000 + bytes(5500)
        assert os.pread(file.fileno(), 20_000, 0) == expected
        wire.transport.drop_handle(1)
