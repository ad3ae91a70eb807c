# READ and WRITE of a handle that has a descriptor.
#
# Owns: nothing. A .pxd of inline functions, compiled into fuse_transport. Knows no names and no grants.
# Invariants: (1) A READ is short only at the end of the file, a WRITE never. (2) What is not answered here has changed nothing that
# Python would not do again: a WRITE without space may have written some of its bytes. (3) A handle is borrowed while its descriptor
# is in use and not for longer: never while sending or replying.

from cython_ext.fuse_abi cimport *
from cython_ext.handle_table cimport Handle, HandleTable, handles_borrow, handles_return
from cython_ext.message_io cimport REPLY_HEAD, WRITE_HEAD, count
from cython_ext.page_pipe cimport PagePipe, pipe_fill, pipe_send, pipe_take
from cython_ext.positioned_io cimport read_range, write_range
from cython_ext.wire cimport Wire, answer, send_answer, to_device
from libc.errno cimport EDQUOT, EINVAL, EIO, ENOSPC
from libc.stdint cimport int64_t, uint64_t, uint8_t


cdef inline bint read_served(
        HandleTable *handles, Wire *wire, PagePipe *pipe, uint8_t *message, size_t message_max) noexcept nogil:
    """Answer a READ; False: it is Python's."""
    cdef fuse_io_in *arg = <fuse_io_in *>(message + sizeof(fuse_in_header))
    cdef uint8_t *data = message + WRITE_HEAD
    cdef uint64_t unique = (<fuse_in_header *>message).unique
    cdef size_t room = message_max - WRITE_HEAD
    cdef int64_t got = -EINVAL
    cdef bint piped = False
    cdef Handle *handle = handles_borrow(handles, arg.fh)
    if handle == NULL:
        return False
    if not handle.served or handle.fd < 0:
        handles_return(handles, handle)
        return False
    if arg.size <= room:
        got = pipe_fill(pipe, handle.fd, <int64_t>arg.offset, arg.size, unique, data, room)
        piped = got >= 0
        if not piped:  # this overwrites the request, which ends where the data begin: in the answer's head only
            got = read_range(handle.fd, data, arg.size, <int64_t>arg.offset)
    handles_return(handles, handle)
    if got < 0:
        answer(wire, unique, <int>-got, NULL, 0)
        return True
    count(&wire.counters.served, 1)
    count(&wire.counters.read_bytes, <uint64_t>got)
    if piped:
        send_piped(wire, pipe, data - REPLY_HEAD, REPLY_HEAD + <size_t>got)
    else:
        send_answer(wire, data - REPLY_HEAD, REPLY_HEAD + <size_t>got, unique, 0)
    return True


cdef inline void send_piped(Wire *wire, PagePipe *pipe, uint8_t *message, size_t size) noexcept nogil:
    if pipe_send(pipe, wire.device_fd, size):
        count(&wire.counters.spliced_bytes, size - REPLY_HEAD)
    elif pipe_take(pipe, message, size):
        to_device(wire, message, size)


cdef inline int write_served(HandleTable *handles, Wire *wire, uint8_t *message) noexcept nogil:
    """Answer a WRITE: 0. Python's: the errno that it is refused with if it cannot be forwarded."""
    cdef fuse_io_in *arg = <fuse_io_in *>(message + sizeof(fuse_in_header))
    cdef fuse_write_out done
    cdef int code
    cdef Handle *handle = handles_borrow(handles, arg.fh)
    if handle == NULL:
        return EIO
    if not handle.served or not handle.writable or handle.fd < 0:
        handles_return(handles, handle)
        return EIO
    code = write_range(handle.fd, message + WRITE_HEAD, arg.size, <int64_t>arg.offset)
    handles_return(handles, handle)
    if code in (ENOSPC, EDQUOT):
        return ENOSPC  # Python can make room; the bytes already written it writes again
    if not code:
        count(&wire.counters.write_bytes, arg.size)
    done.size, done.padding = arg.size, 0
    return answer(wire, (<fuse_in_header *>message).unique, code, &done, sizeof(done))
