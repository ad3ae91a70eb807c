# Objects whose OPEN for reading is answered without Python: inode -> open backing file, with its backing id.
#
# Owns: the grants and the numbers of the handles made from them. A .pxd of inline functions, compiled into fuse_transport. Owns no
# descriptor. Invariants:
# (1) A grant is given out, and noted as an event, under the mutex: after grants_drop() returns, every handle that was made from the
#     grant is in the ring of events, and no further one is made.
# (2) While the mutex is held, those of the handle table and of the ring may be taken; never the other way round.

from cython_ext.transport.event_queue cimport EventQueue, events_put
from cython_ext.fuse_abi cimport *
from cython_ext.transport.handle_table cimport (
    Handle, HandleTable, handles_drop, handles_put, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_t, pthread_mutex_unlock)
from cython_ext.transport.u64_map cimport U64Map, map_double, map_free, map_full, map_get, map_init, map_put, map_take
from libc.errno cimport ENOMEM
from libc.stdint cimport int32_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc

cdef enum:
    FIRST_GRANT_SLOTS = 4096

ctypedef struct Grant:
    int fd
    int32_t backing_id
    uint32_t open_flags
    bint served  # READ is answered with the descriptor, as handle_table.pxd says

ctypedef struct GrantTable:
    pthread_mutex_t mutex
    U64Map map
    uint64_t next_fh


cdef inline int grants_init(GrantTable *table) noexcept nogil:
    """0, or -1 when there is no memory."""
    pthread_mutex_init(&table.mutex, NULL)
    table.next_fh = 0
    return map_init(&table.map, FIRST_GRANT_SLOTS)


cdef inline void grants_free(GrantTable *table) noexcept nogil:
    """Only when no other thread knows the table any more."""
    cdef size_t at
    for at in range(table.map.mask + 1):
        free(<void *><uintptr_t>table.map.slots[at].value)
    map_free(&table.map)
    pthread_mutex_destroy(&table.mutex)


cdef inline int grants_put(
        GrantTable *table, uint64_t ino, int fd, int32_t backing_id, uint32_t open_flags, bint served) noexcept nogil:
    """Insert or replace. 0 or ENOMEM."""
    cdef Grant *kept = <Grant *>malloc(sizeof(Grant))
    if kept == NULL:
        return ENOMEM
    kept.fd, kept.backing_id, kept.open_flags, kept.served = fd, backing_id, open_flags, served
    pthread_mutex_lock(&table.mutex)
    if map_full(&table.map) and map_double(&table.map):
        pthread_mutex_unlock(&table.mutex)
        free(kept)
        return ENOMEM
    free(<void *><uintptr_t>map_put(&table.map, ino, <uintptr_t>kept))
    pthread_mutex_unlock(&table.mutex)
    return 0


cdef inline void grants_drop(GrantTable *table, uint64_t ino) noexcept nogil:
    pthread_mutex_lock(&table.mutex)
    free(<void *><uintptr_t>map_take(&table.map, ino))
    pthread_mutex_unlock(&table.mutex)


cdef inline uint64_t grants_open(
        GrantTable *table, HandleTable *handles, EventQueue *events, const fuse_in_header *head) noexcept nogil:
    """The number of a new handle for the inode of this OPEN; 0 without a grant, or without room."""
    cdef Handle *handle = <Handle *>malloc(sizeof(Handle))
    cdef Grant *grant
    cdef uint64_t fh = 0
    if handle == NULL:
        return 0
    pthread_mutex_lock(&table.mutex)
    grant = <Grant *><uintptr_t>map_get(&table.map, head.nodeid)
    if grant != NULL and table.next_fh:
        handle.fh, handle.fd, handle.backing_id, handle.open_flags = table.next_fh, grant.fd, grant.backing_id, grant.open_flags
        handle.served, handle.writable, handle.busy = grant.served, False, 0
        if not handles_put(handles, handle):
            handle = NULL  # it is the table's
            if events_put(events, FUSE_OPEN, table.next_fh, head.nodeid, head.unique, grant.backing_id):
                fh = table.next_fh
                table.next_fh += 1
            else:
                handles_drop(handles, table.next_fh)
    pthread_mutex_unlock(&table.mutex)
    free(handle)
    return fh
