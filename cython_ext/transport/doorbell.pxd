# Python looks every few milliseconds for what was answered here. When nothing is asked it sleeps until the bell rings.
#
# Owns: an eventfd, and whether somebody sleeps on it. A .pxd of inline functions, compiled into fuse_transport.
# Invariant: who has armed the bell and then sees no new request may sleep: each one that it did not see rings, after it was
# answered. Nothing depends on it but how soon Python looks: the sleep has an end of its own.

from libc.stdint cimport uint64_t
from posix.unistd cimport close

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int value, int flags)
    int eventfd_read(int fd, uint64_t *value)
    int eventfd_write(int fd, uint64_t value)
    int EFD_CLOEXEC
    int EFD_NONBLOCK

cdef extern from * nogil:  # built into gcc and clang
    int __atomic_load_n(const int *at, int order)
    int __atomic_exchange_n(int *at, int value, int order)

cdef enum:
    SEQ_CST = 5  # __ATOMIC_SEQ_CST

ctypedef struct Doorbell:
    int fd
    int armed


cdef inline int bell_init(Doorbell *bell) noexcept nogil:
    """0, or -1 when there is no descriptor left."""
    bell.armed, bell.fd = 0, eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    return 0 if bell.fd >= 0 else -1


cdef inline void bell_free(Doorbell *bell) noexcept nogil:
    """Only when no other thread knows the bell any more."""
    close(bell.fd)


cdef inline void bell_arm(Doorbell *bell) noexcept nogil:
    """The next bell_ring() makes the descriptor readable, which it is not until then."""
    cdef uint64_t rung
    eventfd_read(bell.fd, &rung)
    __atomic_exchange_n(&bell.armed, 1, SEQ_CST)


cdef inline void bell_ring(Doorbell *bell) noexcept nogil:
    """One system call for the first after bell_arm(), none for others."""
    if __atomic_load_n(&bell.armed, SEQ_CST) and __atomic_exchange_n(&bell.armed, 0, SEQ_CST):
        eventfd_write(bell.fd, 1)
