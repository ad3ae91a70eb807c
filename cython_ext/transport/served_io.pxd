# READ and WRITE of a handle that has a descriptor.
#
# Owns: the marks by which Python's write() hears what a WRITE is about. A .pxd of inline functions, compiled into fuse_transport.
# Knows no names and no grants.
# Invariants: (1) A READ is short only at the end of the file, a WRITE never. (2) What is not answered here has changed nothing that
# Python would not do again: a WRITE without space may have written some of its bytes. (3) A handle is borrowed while its descriptor
# is in use and not for longer: never while sending or replying. (4) What must be durable is written here, then told to Python as a
# WRITE of the number of its bytes (`WRITE_DONE`); that of a guarded handle comes to Python first.

from cython_ext.fuse_abi cimport *
from cython_ext.transport.handle_table cimport Handle, HandleTable, handles_borrow, handles_return
from cython_ext.transport.kept_writes cimport FITTING_BYTES, KeptWrites, keep_write
from cython_ext.transport.message_io cimport REPLY_HEAD, WRITE_HEAD, count
from cython_ext.transport.page_pipe cimport PagePipe, pipe_fill, pipe_send, pipe_take
from cython_ext.transport.positioned_io cimport read_range, write_range
from cython_ext.transport.written_ranges cimport WrittenTable, written_note
from cython_ext.transport.wire cimport Wire, answer, refuse, send_answer, to_device
from libc.errno cimport EDQUOT, EINVAL, EIO, ENOSPC
from libc.stdint cimport int64_t, uint32_t, uint64_t, uint8_t

cdef extern from *:
    """
    /* Bits above those of any handle's number, in the number that Python's write() is given. */
    #define WRITE_KEPT (1ULL << 57)     /* the bytes did not fit; what follows is their number in kept_writes.pxd */
    #define WRITE_KILLS (1ULL << 58)    /* the writer may not keep set-id bits */
    #define WRITE_GUARDED (1ULL << 59)  /* the file has privileges */
    #define WRITE_SYNCED (1ULL << 60)   /* answered when durable */
    #define WRITE_DONE (1ULL << 61)     /* the bytes are in the file; what follows is their number */
    """
    uint64_t WRITE_KEPT
    uint64_t WRITE_KILLS
    uint64_t WRITE_GUARDED
    uint64_t WRITE_SYNCED
    uint64_t WRITE_DONE


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


cdef inline uint64_t marks_of(const Handle *handle, const fuse_io_in *arg) noexcept nogil:
    """What Python must do about a WRITE. The kernel sends an FSYNC after it only where it caches (fs/fuse/file.c)."""
    cdef uint64_t marks = 0
    if handle.guarded:
        marks = WRITE_GUARDED | (WRITE_KILLS if arg.io_flags & WRITE_KILL_SUIDGID else 0)
    if arg.open_flags & <uint32_t>O_DSYNC and handle.open_flags & OPEN_DIRECT_IO:
        marks |= WRITE_SYNCED
    return marks


cdef inline int write_served(
        HandleTable *handles, WrittenTable *written, Wire *wire, KeptWrites *kept, uint8_t *message, bint fits_python,
        size_t *size) noexcept nogil:
    """Answer a WRITE of `size` bytes: 0. Python's: the errno that it is refused with if it cannot be forwarded; `size` is its length
    then. `kept`: where the bytes go unless any number `fits_python`."""
    cdef fuse_io_in *arg = <fuse_io_in *>(message + sizeof(fuse_in_header))
    cdef fuse_write_out done
    cdef uint64_t marks
    cdef int code
    cdef Handle *handle
    if arg.size != size[0] - WRITE_HEAD:
        count(&wire.counters.malformed, 1)
        return refuse(wire, <fuse_in_header *>message, EINVAL)
    handle = handles_borrow(handles, arg.fh)
    if handle == NULL:
        return EIO
    if not handle.served or not handle.writable or handle.fd < 0:
        handles_return(handles, handle)
        return EIO
    marks = marks_of(handle, arg)
    if marks & WRITE_GUARDED:
        handles_return(handles, handle)
        arg.fh |= marks
        if not fits_python:
            make_fit(kept, message, size)
        return EIO
    code = write_range(handle.fd, message + WRITE_HEAD, arg.size, <int64_t>arg.offset)
    written_note(written, (<fuse_in_header *>message).nodeid, arg.offset, arg.size)  # after an error, too: some may be there
    handles_return(handles, handle)
    if code in (ENOSPC, EDQUOT):
        arg.fh |= marks
        if not fits_python:
            make_fit(kept, message, size)
        return ENOSPC  # Python can make room; the bytes already written it writes again
    if not code:
        count(&wire.counters.write_bytes, arg.size)
        if marks:
            size[0] = tell_done(message, marks)
            return EIO
    done.size, done.padding = arg.size, 0
    return answer(wire, (<fuse_in_header *>message).unique, code, &done, sizeof(done))


cdef inline void make_fit(KeptWrites *kept, uint8_t *message, size_t *size) noexcept nogil:
    """Keep the bytes of a WRITE if they are many; without room for them it stays as it is, and is refused."""
    if (<fuse_io_in *>(message + sizeof(fuse_in_header))).size > FITTING_BYTES:
        size[0] = keep_write(kept, message, WRITE_KEPT) or size[0]


cdef inline size_t tell_done(uint8_t *message, uint64_t marks) noexcept nogil:
    """Put the number of bytes in the place of the bytes of a WRITE; the length of the message now."""
    cdef fuse_io_in *arg = <fuse_io_in *>(message + sizeof(fuse_in_header))
    (<uint32_t *>(message + WRITE_HEAD))[0] = arg.size
    arg.fh |= marks | WRITE_DONE
    arg.size = sizeof(uint32_t)
    (<fuse_in_header *>message).len = <uint32_t>(WRITE_HEAD + sizeof(uint32_t))
    return WRITE_HEAD + sizeof(uint32_t)
