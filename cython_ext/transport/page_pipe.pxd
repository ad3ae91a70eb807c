# Answers that carry a file's pages without copying them here: file -> pipe (references to the pages) -> kernel (the one copy).
#
# Owns: the pipe of one reader thread. A .pxd of inline functions, compiled into fuse_transport. Knows no handle and no table.
# Invariants: (1) The pipe is empty between two answers. (2) Nothing here waits: the pipe is non-blocking, and an answer that
# does not fit is not begun. (3) An answer has exactly the bytes that its header tells, or it is not given: then the caller copies.

from cython_ext.fuse_abi cimport fuse_out_header
from cython_ext.transport.message_io cimport PAGE, REPLY_HEAD
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t, uint8_t
from posix.stat cimport fstat, struct_stat
from posix.unistd cimport close, read, write

cdef extern from "<fcntl.h>" nogil:
    ssize_t splice(int source, int64_t *source_offset, int target, int64_t *target_offset, size_t size, unsigned int flags)
    int fcntl(int fd, int command, ...)
    int F_SETPIPE_SZ
    int O_CLOEXEC
    int O_NONBLOCK

cdef extern from "<unistd.h>" nogil:
    int pipe2(int *ends, int flags)

cdef enum:
    PIPE_BYTES = 1 << 20  # fs.pipe-max-size where nobody has changed it: a slot for each page, the header's included
    SPLICE_LEAST = 64 << 10  # below, one copy costs less than a system call and the references

ctypedef struct PagePipe:
    int out_of
    int into
    size_t pages  # 0: there is none


cdef inline void pipe_init(PagePipe *pipe, bint wanted) noexcept nogil:
    """Without a pipe every answer is copied."""
    cdef int ends[2]
    cdef int granted
    pipe.pages = 0
    if not wanted or pipe2(ends, O_CLOEXEC | O_NONBLOCK):
        return
    pipe.out_of, pipe.into = ends[0], ends[1]
    granted = fcntl(pipe.into, F_SETPIPE_SZ, <int>PIPE_BYTES)
    if granted < 0:  # a user who has too many pipes: 64 KiB hold no answer that is worth it
        close(ends[0])
        close(ends[1])
        return
    pipe.pages = <size_t>granted // PAGE


cdef inline void pipe_free(PagePipe *pipe) noexcept nogil:
    if pipe.pages:
        close(pipe.out_of)
        close(pipe.into)


cdef inline void pipe_empty(PagePipe *pipe, uint8_t *scratch, size_t room) noexcept nogil:
    while read(pipe.out_of, scratch, room) > 0:
        pass


cdef inline size_t bytes_there(int fd, int64_t offset, size_t count) noexcept nogil:
    """How many of the `count` bytes are before the end of the file, as far as can be told."""
    cdef struct_stat found
    if fstat(fd, &found) or found.st_size <= offset:
        return 0
    return min(count, <size_t>(found.st_size - offset))


cdef inline int64_t pipe_fill(
        PagePipe *pipe, int fd, int64_t offset, size_t count, uint64_t unique, uint8_t *scratch, size_t room) noexcept nogil:
    """Put the answer to a READ into the pipe: the bytes of the file in it, or -1: nothing is, copy them."""
    cdef fuse_out_header head
    cdef size_t done = 0, size = bytes_there(fd, offset, count) if pipe.pages and count >= SPLICE_LEAST else 0
    cdef ssize_t got
    if size < SPLICE_LEAST or 1 + (<size_t>offset % PAGE + size + PAGE - 1) // PAGE > pipe.pages:
        return -1
    head.len, head.error, head.unique = <uint32_t>(REPLY_HEAD + size), 0, unique
    if write(pipe.into, &head, REPLY_HEAD) != <ssize_t>REPLY_HEAD:
        return -1
    while done < size:
        got = splice(fd, &offset, pipe.into, NULL, size - done, 0)
        if got > 0:
            done += <size_t>got
        elif got == 0 or errno != EINTR:  # the file was cut meanwhile; its file system cannot do it
            pipe_empty(pipe, scratch, room)
            return -1
    return <int64_t>size


cdef inline bint pipe_send(PagePipe *pipe, int device_fd, size_t size) noexcept nogil:
    """Give the kernel an answer of `size` bytes with its header. False: it may not have taken it, and pipe_take() has it."""
    return splice(pipe.out_of, NULL, device_fd, NULL, size, 0) == <ssize_t>size


cdef inline bint pipe_take(PagePipe *pipe, uint8_t *message, size_t size) noexcept nogil:
    """Copy an answer out of the pipe; False when it is not there, that is: the kernel has taken it, wanted or not."""
    cdef bint whole = read(pipe.out_of, message, size) == <ssize_t>size
    if not whole:
        pipe_empty(pipe, message, size)
    return whole
