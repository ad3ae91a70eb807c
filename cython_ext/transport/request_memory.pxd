# What is remembered of requests that Python answers: which answers must be edited, and their unique numbers.
#
# Owns: the map of pending requests and the last REQUEST_SLOTS unique numbers. A .pxd of inline functions, compiled into
# fuse_transport. Knows no answer. Invariant: the mutex is held for a few memory accesses only.

from cython_ext.fuse_abi cimport *
from cython_ext.transport.handle_table cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock)
from cython_ext.transport.u64_map cimport U64Map, map_free, map_full, map_init, map_put, map_take
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    PENDING_SLOTS = 1 << 15  # half of it may be used: 16384 opens under way at once
    REQUEST_SLOTS = 1 << 12  # requests whose unique number a handler may ask for; pyfuse3 has 99 handlers at work at most

ctypedef struct RequestMemory:
    pthread_mutex_t mutex
    U64Map pending  # unique -> opcode
    uint64_t uniques[REQUEST_SLOTS]
    uint32_t pids[REQUEST_SLOTS]
    uint64_t next


cdef inline int requests_init(RequestMemory *memory) noexcept nogil:
    """0, or -1 when there is no memory."""
    pthread_mutex_init(&memory.mutex, NULL)
    memory.next = 0
    return map_init(&memory.pending, PENDING_SLOTS)


cdef inline void requests_free(RequestMemory *memory) noexcept nogil:
    map_free(&memory.pending)
    pthread_mutex_destroy(&memory.mutex)


cdef inline bint remember(RequestMemory *memory, uint64_t unique, uint32_t opcode) noexcept nogil:
    """False when there are too many."""
    cdef bint room
    pthread_mutex_lock(&memory.mutex)
    room = not map_full(&memory.pending)
    if room:
        map_put(&memory.pending, unique, opcode)
    pthread_mutex_unlock(&memory.mutex)
    return room


cdef inline uint32_t recall(RequestMemory *memory, uint64_t unique) noexcept nogil:
    """The opcode remembered for `unique`, now forgotten; 0 for none."""
    cdef uint32_t opcode
    pthread_mutex_lock(&memory.mutex)
    opcode = <uint32_t>map_take(&memory.pending, unique)
    pthread_mutex_unlock(&memory.mutex)
    return opcode


cdef inline void note_request(RequestMemory *memory, fuse_in_header *head) noexcept nogil:
    """Keep the unique number, which libfuse does not hand on, and put where it is kept in the place of the caller's pid."""
    pthread_mutex_lock(&memory.mutex)
    memory.uniques[memory.next % REQUEST_SLOTS] = head.unique
    memory.pids[memory.next % REQUEST_SLOTS] = head.pid
    head.pid = <uint32_t>(memory.next % REQUEST_SLOTS)
    memory.next += 1
    pthread_mutex_unlock(&memory.mutex)
