# What goes to pyfuse3 and what comes back from it.
#
# Owns: the requests whose answers are edited, INIT and what was agreed. A .pxd of inline functions, compiled into fuse_transport.
# Borrows both descriptors (wire.pxd). Invariants: (1) A request is remembered before it is forwarded, so its answer finds it.
# (2) What does not fit the socket is answered here.

from cython_ext.fuse_abi cimport *
from cython_ext.transport.handle_table cimport edit_open
from cython_ext.transport.init_reply cimport edit_init
from cython_ext.transport.message_io cimport MSG_DONTWAIT, MSG_TRUNC, REPLY_HEAD, answer_is_edited, count, is_told_once, recv
from cython_ext.transport.own_answers cimport Known
from cython_ext.transport.request_memory cimport RequestMemory, note_request, recall, remember
from cython_ext.transport.wire cimport Wire, answer, make_release, refuse, send_answer, send_request, to_device
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, EIO, EMSGSIZE, ENOBUFS, ENOMEM, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef enum:
    INIT_MAX = 256
    REPLAY_BIT = 62

ctypedef struct Relay:
    RequestMemory requests
    size_t message_max
    bint passthrough_wanted, passthrough_agreed
    bint ready  # INIT was answered: to the kernel, or, when it was said again for a new worker, here
    uint8_t init_message[INIT_MAX]
    size_t init_size


cdef inline uint64_t replay_unique() noexcept nogil:
    """The number of our own INIT: the kernel's are even."""
    return (<uint64_t>1 << REPLAY_BIT) | 1


cdef inline int forward(Relay *relay, Wire *wire, uint8_t *message, size_t size, int refusal) noexcept nogil:
    """Hand a request to pyfuse3: 0 or the errno that ends the loop. When it does not fit the socket it is answered with `refusal`."""
    cdef fuse_in_header *head = <fuse_in_header *>message
    cdef bint remembered = answer_is_edited(head.opcode)
    cdef int code
    if is_told_once(head.opcode):
        note_request(&relay.requests, head)
    if head.opcode == FUSE_INIT:
        relay.init_size = min(size, <size_t>INIT_MAX)
        memcpy(relay.init_message, message, relay.init_size)
    if remembered and not remember(&relay.requests, head.unique, head.opcode):
        return refuse(wire, head, ENOMEM)
    code = send_request(wire, message, size)
    if not code:
        count(&wire.counters.forwarded, 1)
        return 0
    if remembered:
        recall(&relay.requests, head.unique)
    return refuse(wire, head, refusal) if code in (EMSGSIZE, ENOBUFS, ENOMEM) else code


cdef inline int drain_replies(Relay *relay, Wire *wire, Known *known, uint8_t *message) noexcept nogil:
    """Hand on what pyfuse3 has answered: 0 when there is none left, ECONNRESET at the end, else an errno."""
    cdef ssize_t got
    while True:
        got = recv(wire.socket_fd, message, relay.message_max, MSG_TRUNC | MSG_DONTWAIT)  # the full length, even if cut
        if got > 0:
            take_reply(relay, wire, known, message, <size_t>got)
        elif got == 0:
            return ECONNRESET
        elif errno == EAGAIN:
            return 0
        elif errno != EINTR:
            return errno


cdef inline void take_reply(Relay *relay, Wire *wire, Known *known, uint8_t *message, size_t size) noexcept nogil:
    cdef fuse_out_header *head = <fuse_out_header *>message
    cdef fuse_open_out *opened = NULL
    cdef uint32_t opcode
    cdef int code
    if size < REPLY_HEAD:
        count(&wire.counters.malformed, 1)
        return
    opcode = recall(&relay.requests, head.unique)
    if size > relay.message_max or head.len != size:
        count(&wire.counters.malformed, 1)
        answer(wire, head.unique, EIO, NULL, 0)
        return
    if opcode == FUSE_INIT and not head.error:
        take_init(relay, wire, message, size)
        return
    if opcode in (FUSE_OPEN, FUSE_CREATE) and size >= REPLY_HEAD + sizeof(fuse_open_out) and not head.error:
        opened = <fuse_open_out *>(message + size - sizeof(fuse_open_out))
        edit_open(&known.handles, opened)
    code = to_device(wire, message, size)
    if code and opened != NULL:  # as in answer_open()
        make_release(wire, &known.events, opened.fh)


cdef inline void take_init(Relay *relay, Wire *wire, uint8_t *message, size_t size) noexcept nogil:
    """The kernel hears what may be; of an INIT that was ours, that it is to send again what nobody has answered."""
    cdef const fuse_init_in *offered = <const fuse_init_in *>(relay.init_message + sizeof(fuse_in_header))
    relay.passthrough_agreed = edit_init(
        message + REPLY_HEAD, size - REPLY_HEAD, relay.message_max, offered.flags, offered.flags2,
        relay.passthrough_wanted) or relay.passthrough_agreed
    if (<fuse_out_header *>message).unique == replay_unique():
        send_answer(wire, message, REPLY_HEAD, 0, -NOTIFY_RESEND)
    else:
        to_device(wire, message, size)
    relay.ready = True
