# Sending: answers to the kernel, requests to pyfuse3.
#
# Owns: counters. Borrows both descriptors. A .pxd of inline functions, compiled into fuse_transport. Knows no table. Invariant: no
# lock is held while it waits.

from cython_ext.transport.event_queue cimport EventQueue, events_put
from cython_ext.fuse_abi cimport *
from cython_ext.transport.message_io cimport Counters, MSG_NOSIGNAL, POLLOUT, REPLY_HEAD, await_ready, count, has_answer, send
from libc.errno cimport EAGAIN, EINTR, ENOBUFS, ENODEV, ENOENT, ENOMEM, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.unistd cimport write

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int microseconds)

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t writev(int fd, const iovec *parts, int count)

cdef enum:
    ANSWER_MAX = 16 + 144  # the longest answer made here but READ: a CREATE
    SEND_ATTEMPTS = 100  # 1 ms apart, when the kernel has no memory for a message

ctypedef struct Wire:
    int device_fd
    int socket_fd
    Counters counters


cdef inline dict told(Wire *wire, names):
    """Requests by the name of their opcode (those that came), bytes served here, what became of the messages."""
    cdef Counters *counters = &wire.counters
    found = {names[opcode]: counters.requests[opcode] for opcode in range(OPCODE_SLOTS) if counters.requests[opcode]}
    return found | dict(
        read_bytes=counters.read_bytes, spliced_bytes=counters.spliced_bytes, write_bytes=counters.write_bytes,
        served=counters.served, forwarded=counters.forwarded, failed_replies=counters.failed_replies,
        malformed=counters.malformed, lost_handles=counters.lost_handles)


cdef inline int send_request(Wire *wire, const uint8_t *message, size_t size) noexcept nogil:
    """To pyfuse3. 0 or an errno. A large datagram needs contiguous kernel memory, which may take a moment to be found."""
    cdef int attempts = 0
    while send(wire.socket_fd, message, size, MSG_NOSIGNAL) < 0:
        if errno == EAGAIN:
            await_ready(wire.socket_fd, <short>POLLOUT)
        elif errno in (ENOBUFS, ENOMEM) and attempts < SEND_ATTEMPTS:
            attempts += 1
            usleep(1000)
        elif errno != EINTR:
            return errno
    return 0


cdef inline int device_refused(Wire *wire) noexcept nogil:
    """After a write to the kernel that failed: 0 to try again, else an errno. ENOENT (nobody waits for it any more) and ENODEV
    (unmounted) are not counted as failures."""
    cdef int code = errno
    if code == EAGAIN:
        await_ready(wire.device_fd, <short>POLLOUT)
    if code in (EAGAIN, EINTR):
        return 0
    if code not in (ENOENT, ENODEV):
        count(&wire.counters.failed_replies, 1)
    return code


cdef inline int to_device(Wire *wire, const uint8_t *message, size_t size) noexcept nogil:
    """To the kernel. 0 or an errno."""
    cdef int code = 0
    while not code and write(wire.device_fd, message, size) < 0:
        code = device_refused(wire)
    return code


cdef inline int send_body(Wire *wire, uint64_t unique, const void *body, size_t size) noexcept nogil:
    """An answer whose body lies elsewhere than its head. 0 or an errno."""
    cdef fuse_out_header head
    cdef iovec parts[2]
    cdef int code = 0
    head.len, head.error, head.unique = <uint32_t>(REPLY_HEAD + size), 0, unique
    parts[0].iov_base, parts[0].iov_len = &head, REPLY_HEAD
    parts[1].iov_base, parts[1].iov_len = <void *>body, size
    count(&wire.counters.served, 1)
    while not code and writev(wire.device_fd, parts, 2) < 0:
        code = device_refused(wire)
    return code


cdef inline int send_answer(Wire *wire, uint8_t *message, size_t size, uint64_t unique, int code) noexcept nogil:
    cdef fuse_out_header *head = <fuse_out_header *>message
    head.len, head.error, head.unique = <uint32_t>size, -code, unique
    return to_device(wire, message, size)


cdef inline int answer(Wire *wire, uint64_t unique, int code, const void *body, size_t body_size) noexcept nogil:
    """A small answer; an error has no body. Always 0: the loop goes on."""
    cdef uint8_t message[ANSWER_MAX]
    if code:
        body_size = 0
    if body_size:
        memcpy(message + REPLY_HEAD, body, body_size)
    count(&wire.counters.served, 1)
    send_answer(wire, message, REPLY_HEAD + body_size, unique, code)
    return 0


cdef inline int refuse(Wire *wire, const fuse_in_header *head, int code) noexcept nogil:
    if has_answer(head.opcode):
        answer(wire, head.unique, code, NULL, 0)
    return 0


cdef inline void make_release(Wire *wire, EventQueue *events, uint64_t fh) noexcept nogil:
    """An open that the kernel no longer wants (interrupted) has no RELEASE: make one."""
    if not events_put(events, FUSE_RELEASE, fh, 0, 0, 0):
        count(&wire.counters.lost_handles, 1)


cdef inline int answer_open(
        Wire *wire, EventQueue *events, uint64_t unique, const void *body, size_t body_size, uint64_t fh) noexcept nogil:
    """As answer(), to OPEN or CREATE."""
    cdef uint8_t message[ANSWER_MAX]
    memcpy(message + REPLY_HEAD, body, body_size)
    count(&wire.counters.served, 1)
    if send_answer(wire, message, REPLY_HEAD + body_size, unique, 0):
        make_release(wire, events, fh)
    return 0
