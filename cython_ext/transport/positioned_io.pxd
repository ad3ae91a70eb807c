# System calls on the file behind a handle, carried to completion. A .pxd of inline functions, compiled into fuse_transport.
#
# Owns: nothing. Knows nothing of FUSE nor of handles.
# Invariants: (1) Interrupted and short calls are repeated: the caller sees all bytes, the end of the file, or an error.
# (2) Errors are returned as errno (or -errno where the answer is a count); nothing else is told through errno.

from libc.errno cimport EBADF, EFBIG, EINTR, EINVAL, EIO, ENXIO, EOPNOTSUPP, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf

cdef extern from "<fcntl.h>" nogil:  # with _GNU_SOURCE, as Python.h has it
    int open(const char *path, int flags)
    int fallocate(int fd, int mode, int64_t offset, int64_t length)
    int O_RDWR
    int O_CLOEXEC
    int O_NONBLOCK
    int FALLOC_FL_KEEP_SIZE
    int FALLOC_FL_PUNCH_HOLE
    int FALLOC_FL_ZERO_RANGE

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *out, size_t count, int64_t offset)
    ssize_t pwrite(int fd, const void *data, size_t count, int64_t offset)
    int64_t lseek(int fd, int64_t offset, int whence)
    int close(int fd)
    int SEEK_DATA
    int SEEK_HOLE


cdef enum:
    FILE_BITS_MAX = 41  # 2 TiB, as config.py says


cdef inline bint too_far(int64_t offset, uint64_t length) noexcept nogil:
    """Whether a range ends where no file may."""
    return length > <uint64_t>1 << FILE_BITS_MAX or offset > (<int64_t>1 << FILE_BITS_MAX) - <int64_t>length


cdef inline int64_t read_range(int fd, uint8_t *out, size_t count, int64_t offset) noexcept nogil:
    """Bytes read, fewer than `count` only at the end of the file; or -errno."""
    cdef size_t done = 0
    cdef ssize_t got
    while done < count:
        got = pread(fd, out + done, count - done, offset + <int64_t>done)
        if got == 0:
            break
        if got > 0:
            done += <size_t>got
        elif errno != EINTR:
            return -errno
    return <int64_t>done


cdef inline int write_range(int fd, const uint8_t *data, size_t count, int64_t offset) noexcept nogil:
    cdef size_t done = 0
    cdef ssize_t put
    if too_far(offset, count):
        return EFBIG
    while done < count:
        put = pwrite(fd, data + done, count - done, offset + <int64_t>done)
        if put > 0:
            done += <size_t>put
        elif put == 0:
            return EIO
        elif errno != EINTR:
            return errno
    return 0


cdef inline int allocate(int fd, int mode, int64_t offset, int64_t length) noexcept nogil:
    """fallocate(2); a range is zeroed where the filesystem cannot, as tmpfs, by punching and allocating it."""
    cdef int code = try_to_allocate(fd, mode, offset, length)
    if code != EOPNOTSUPP or not mode & FALLOC_FL_ZERO_RANGE:
        return code
    code = try_to_allocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
    return code if code else try_to_allocate(fd, mode & FALLOC_FL_KEEP_SIZE, offset, length)


cdef inline int try_to_allocate(int fd, int mode, int64_t offset, int64_t length) noexcept nogil:
    while fallocate(fd, mode, offset, length):
        if errno != EINTR:
            return errno
    return 0


cdef inline int allocate_range(int fd, int mode, int64_t offset, int64_t length) noexcept nogil:
    """fallocate(2), also when `fd` is read-only."""
    cdef char path[32]
    cdef int writable_fd
    cdef int code
    if offset >= 0 and length > 0 and not mode & FALLOC_FL_PUNCH_HOLE and too_far(offset, <uint64_t>length):
        return EFBIG
    code = allocate(fd, mode, offset, length)
    if code != EBADF:
        return code
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd)
    # O_NONBLOCK: where somebody holds a lease on the file, open() would wait 45 s for it (lease-break-time).
    writable_fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK)
    if writable_fd < 0:
        return errno
    code = allocate(writable_fd, mode, offset, length)
    close(writable_fd)
    return code


cdef inline int64_t seek_content(int fd, uint64_t offset, uint32_t whence) noexcept nogil:
    """SEEK_DATA or SEEK_HOLE; or -errno.

    This moves the descriptor's own position, which nothing here uses.
    """
    cdef int64_t found
    if whence != <uint32_t>SEEK_DATA and whence != <uint32_t>SEEK_HOLE:
        return -EINVAL
    found = lseek(fd, <int64_t>offset, <int>whence)
    return found if found >= 0 else -errno
