# What a thread of the transport needs beside the messages themselves: buffers, waiting, counters, what a request may hold.
#
# Owns: nothing; a .pxd of inline functions, compiled into fuse_transport. Knows no handle and no socket by itself.
# Invariants: (1) Counters are only added to. (2) A buffer serves one thread: request and answer share its bytes.

from cython_ext.fuse_abi cimport *
from libc.stdint cimport uint32_t, uint64_t, uint8_t
from libc.string cimport memcmp, memset

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **out, size_t alignment, size_t size)

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *at, size_t size, int advice)
    int MADV_HUGEPAGE

cdef extern from "<sys/socket.h>" nogil:
    ssize_t send(int fd, const void *message, size_t size, int flags)
    ssize_t recv(int fd, void *message, size_t size, int flags)
    int MSG_DONTWAIT
    int MSG_NOSIGNAL
    int MSG_TRUNC

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
    int poll(pollfd *fds, unsigned long count, int timeout_ms)
    int POLLIN
    int POLLOUT

cdef extern from * nogil:  # built into gcc and clang
    uint64_t __atomic_fetch_add(uint64_t *at, uint64_t n, int order)
    uint64_t __atomic_load_n(const uint64_t *at, int order)

cdef enum:
    PAGE = 4096
    HUGE_PAGE = 2 << 20
    RELAXED = 0  # __ATOMIC_RELAXED
    # The largest fixed part of a request that carries data: a WRITE's. Data start on a page (see aligned_buffer).
    WRITE_HEAD = sizeof(fuse_in_header) + sizeof(fuse_io_in)
    REPLY_HEAD = sizeof(fuse_out_header)

ctypedef struct Counters:
    uint64_t requests[OPCODE_SLOTS]
    uint64_t read_bytes
    uint64_t spliced_bytes  # of them
    uint64_t write_bytes
    uint64_t served
    uint64_t forwarded
    uint64_t failed_replies
    uint64_t malformed
    uint64_t lost_handles


cdef inline void count(uint64_t *counter, uint64_t n) noexcept nogil:
    __atomic_fetch_add(counter, n, RELAXED)


cdef inline bint has_answer(uint32_t opcode) noexcept nogil:
    return opcode not in (FUSE_FORGET, FUSE_BATCH_FORGET, FUSE_INTERRUPT, FUSE_NOTIFY_REPLY)


cdef inline bint answer_is_edited(uint32_t opcode) noexcept nogil:
    return opcode in (FUSE_INIT, FUSE_OPEN, FUSE_CREATE)


cdef inline bint is_told_once(uint32_t opcode) noexcept nogil:
    """Whether doing it twice would not be the same as once, or leave a handle behind."""
    return opcode in (
        FUSE_CREATE, FUSE_OPEN, FUSE_MKNOD, FUSE_MKDIR, FUSE_SYMLINK, FUSE_LINK, FUSE_UNLINK, FUSE_RMDIR, FUSE_RENAME,
        FUSE_RENAME2, FUSE_REMOVEXATTR)


cdef inline bint asks_for_capability(const uint8_t *message, size_t size) noexcept nogil:
    """Whether this is the GETXATTR that the kernel sends before the first write(2) to a file."""
    cdef const char *wanted = b"security.capability"  # 20 bytes with the zero
    cdef size_t at = sizeof(fuse_in_header) + sizeof(fuse_getxattr_in)
    return (<const fuse_in_header *>message).opcode == FUSE_GETXATTR and size == at + 20 and not memcmp(message + at, wanted, 20)


cdef inline size_t least_bytes(uint32_t opcode) noexcept nogil:
    """How long a request must be before the transport looks behind its header."""
    if opcode in (FUSE_READ, FUSE_WRITE, FUSE_READDIR, FUSE_READDIRPLUS):
        return sizeof(fuse_in_header) + sizeof(fuse_io_in)
    if opcode == FUSE_FSYNCDIR:
        return sizeof(fuse_in_header) + sizeof(fuse_fsync_in)
    if opcode == FUSE_GETXATTR:
        return sizeof(fuse_in_header) + sizeof(fuse_getxattr_in)
    if opcode == FUSE_FORGET:
        return sizeof(fuse_in_header) + sizeof(fuse_forget_in)
    if opcode == FUSE_BATCH_FORGET:
        return sizeof(fuse_in_header) + sizeof(fuse_batch_forget_in)
    if opcode == FUSE_RELEASE:
        return sizeof(fuse_in_header) + sizeof(fuse_release_in)
    if opcode == FUSE_FALLOCATE:
        return sizeof(fuse_in_header) + sizeof(fuse_fallocate_in)
    if opcode == FUSE_OPEN:
        return sizeof(fuse_in_header) + sizeof(fuse_open_in)
    if opcode == FUSE_RENAME:
        return sizeof(fuse_in_header) + sizeof(fuse_rename_in)
    if opcode in (FUSE_CREATE, FUSE_TMPFILE):
        return sizeof(fuse_in_header) + sizeof(fuse_create_in)
    if opcode == FUSE_LSEEK:
        return sizeof(fuse_in_header) + sizeof(fuse_lseek_in)
    if opcode == FUSE_INIT:
        return sizeof(fuse_in_header) + sizeof(fuse_init_in)
    return sizeof(fuse_in_header)


cdef inline void await_ready(int fd, short events) noexcept nogil:
    """For descriptors that somebody made non-blocking. An error or a signal ends the wait: the caller tries again anyway."""
    cdef pollfd one
    one.fd = fd
    one.events = events
    poll(&one, 1, -1)


cdef inline uint8_t *aligned_buffer(size_t message_max) except NULL:
    """Room for a request at [PAGE - WRITE_HEAD] and for an answer at [PAGE - REPLY_HEAD]; both use the same bytes.

    The data of a WRITE and of a READ then start on a page, as the kernel's copy goes page by page on both sides and
    would otherwise cut each in two. One buffer for both keeps the working set of a thread near its L2 cache.
    """
    cdef void *base = NULL
    cdef size_t size = (PAGE + message_max + HUGE_PAGE - 1) // HUGE_PAGE * HUGE_PAGE
    if posix_memalign(&base, HUGE_PAGE, size):
        raise MemoryError()
    madvise(base, size, MADV_HUGEPAGE)  # a wish: without huge pages it is slower, not wrong
    # The kernel ends a request with EIO when it cannot copy it to the reader; and it does not fault pages in for a process that is
    # being killed. So every page is there before the first request.
    memset(base, 0, size)
    return <uint8_t *>base
