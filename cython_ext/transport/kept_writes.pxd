# Bytes of WRITEs that Python must see and that do not fit its socket, which an ordinary user's mount cannot make larger.
#
# Owns: copies, each from keep_write() until it is taken, once. A .pxd of inline functions, compiled into fuse_transport. Knows no
# handle. Invariant: at most KEPT_MAX at a time, of a WRITE's length each: more are refused.

from cython_ext.fuse_abi cimport *
from cython_ext.transport.handle_table cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock)
from cython_ext.transport.message_io cimport WRITE_HEAD
from libc.stdint cimport uint64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

cdef enum:
    KEPT_MAX = 64
    FITTING_BYTES = 64 << 10  # the smallest socket buffer a system may grant is 208 KiB

ctypedef struct KeptWrite:
    uint64_t unique  # of the request; 0: none
    size_t size
    uint8_t *data

ctypedef struct KeptWrites:
    pthread_mutex_t mutex
    KeptWrite writes[KEPT_MAX]


cdef inline void kept_init(KeptWrites *table) noexcept nogil:
    memset(table, 0, sizeof(KeptWrites))
    pthread_mutex_init(&table.mutex, NULL)


cdef inline void kept_free(KeptWrites *table) noexcept nogil:
    """Only when no other thread knows the table any more."""
    cdef int at
    for at in range(KEPT_MAX):
        free(table.writes[at].data)
    pthread_mutex_destroy(&table.mutex)


cdef inline size_t keep_write(KeptWrites *table, uint8_t *message, uint64_t mark) noexcept nogil:
    """Put the request's number, with a mark at the handle's, in the place of the bytes of a WRITE; the length of the message now.
    0: there is no room, and nothing has changed."""
    cdef fuse_in_header *head = <fuse_in_header *>message
    cdef fuse_io_in *arg = <fuse_io_in *>(message + sizeof(fuse_in_header))
    cdef uint8_t *copy = <uint8_t *>malloc(arg.size)
    cdef KeptWrite *place
    cdef bint kept = False
    cdef int at
    if copy == NULL:
        return 0
    memcpy(copy, message + WRITE_HEAD, arg.size)
    pthread_mutex_lock(&table.mutex)
    for at in range(KEPT_MAX):
        place = &table.writes[at]
        if not place.unique:
            place.unique, place.size, place.data = head.unique, arg.size, copy
            kept = True
            break
    pthread_mutex_unlock(&table.mutex)
    if not kept:
        free(copy)
        return 0
    (<uint64_t *>(message + WRITE_HEAD))[0] = head.unique
    arg.fh |= mark
    arg.size = sizeof(uint64_t)
    head.len = <uint32_t>(WRITE_HEAD + sizeof(uint64_t))
    return head.len


cdef inline bytes taken_write(KeptWrites *table, uint64_t unique):
    """The bytes; None when they are not here."""
    cdef KeptWrite found
    cdef int at
    found.data = NULL
    pthread_mutex_lock(&table.mutex)
    for at in range(KEPT_MAX):
        if table.writes[at].unique == unique:
            found = table.writes[at]
            memset(&table.writes[at], 0, sizeof(KeptWrite))
            break
    pthread_mutex_unlock(&table.mutex)
    if found.data == NULL:
        return None
    try:
        return found.data[:found.size]
    finally:
        free(found.data)
