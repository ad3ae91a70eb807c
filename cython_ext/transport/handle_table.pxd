# What the transport knows of each open file: file handle -> Handle, shared by Python and the transport's threads.
#
# Owns: the Handle records. Owns no descriptor: whoever put one in closes it after handles_put() or handles_drop().
# Knows nothing of FUSE messages nor of Python. A .pxd of inline functions, compiled into fuse_transport.
# Invariants:
# (1) A record in the map is not changed, it is replaced; `busy` alone changes, under `mutex`.
# (2) A record is freed by the one who took it out of the map, once nobody borrows it. Hence, after handles_put() and
#     handles_drop() return, no thread uses the descriptor that the record before named.
# (3) New borrowers get the new record at once, so a replacement waits for at most one operation of each thread.

from cython_ext.fuse_abi cimport (
    DEV_IOC_BACKING_CLOSE, DEV_IOC_BACKING_OPEN, OPEN_PASSTHROUGH, OPEN_WITH_PASSTHROUGH, fuse_backing_map, fuse_open_out)
from cython_ext.transport.u64_map cimport U64Map, map_double, map_free, map_full, map_get, map_init, map_put, map_take
from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset
from posix.ioctl cimport ioctl

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_cond_init(pthread_cond_t *condition, const void *attributes)
    int pthread_cond_destroy(pthread_cond_t *condition)
    int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)
    int pthread_cond_broadcast(pthread_cond_t *condition)

ctypedef struct Handle:
    uint64_t fh
    int fd  # -1: none
    int backing_id  # 0: none
    uint32_t open_flags
    uint32_t busy  # borrowers
    bint served
    bint writable
    bint guarded  # a write takes privileges from the file: Python comes first

ctypedef struct HandleTable:
    pthread_mutex_t mutex
    pthread_cond_t returned
    U64Map map

cdef enum:
    FIRST_HANDLE_SLOTS = 1024


cdef inline int handles_init(HandleTable *table) noexcept nogil:
    if map_init(&table.map, FIRST_HANDLE_SLOTS):
        return ENOMEM
    pthread_mutex_init(&table.mutex, NULL)
    pthread_cond_init(&table.returned, NULL)
    return 0


cdef inline void handles_free(HandleTable *table) noexcept nogil:
    """Only when no other thread knows the table any more."""
    cdef size_t at
    for at in range(table.map.mask + 1):
        free(<void *><uintptr_t>table.map.slots[at].value)
    map_free(&table.map)
    pthread_cond_destroy(&table.returned)
    pthread_mutex_destroy(&table.mutex)


cdef inline void retire(HandleTable *table, Handle *handle) noexcept nogil:
    """Free a record that has left the map. The mutex is held, and given up while somebody borrows the record."""
    if handle == NULL:
        return
    while handle.busy:
        pthread_cond_wait(&table.returned, &table.mutex)
    free(handle)


cdef inline int handles_put(HandleTable *table, Handle *handle) noexcept nogil:
    """Insert or replace; takes `handle` (from malloc) over. 0 or ENOMEM: then nothing changed and it is still the caller's."""
    pthread_mutex_lock(&table.mutex)
    if map_full(&table.map) and map_double(&table.map):
        pthread_mutex_unlock(&table.mutex)
        return ENOMEM
    retire(table, <Handle *><uintptr_t>map_put(&table.map, handle.fh, <uintptr_t>handle))
    pthread_mutex_unlock(&table.mutex)
    return 0


cdef inline int handles_copy(HandleTable *table, const Handle *handle) noexcept nogil:
    """handles_put() of a copy."""
    cdef Handle *copy = <Handle *>malloc(sizeof(Handle))
    cdef int code
    if copy == NULL:
        return ENOMEM
    copy[0] = handle[0]
    code = handles_put(table, copy)
    if code:
        free(copy)
    return code


cdef inline int open_backing(int device_fd, int fd) noexcept nogil:
    """The backing id of a file, or -1 and errno."""
    cdef fuse_backing_map map
    memset(&map, 0, sizeof(map))
    map.fd = fd
    return ioctl(device_fd, <unsigned long>DEV_IOC_BACKING_OPEN, &map)


cdef inline int close_backing(int device_fd, uint32_t backing_id) noexcept nogil:
    """0, or -1 and errno."""
    return ioctl(device_fd, <unsigned long>DEV_IOC_BACKING_CLOSE, &backing_id)


cdef inline void handles_drop(HandleTable *table, uint64_t fh) noexcept nogil:
    pthread_mutex_lock(&table.mutex)
    retire(table, <Handle *><uintptr_t>map_take(&table.map, fh))
    pthread_mutex_unlock(&table.mutex)


cdef inline Handle *handles_borrow(HandleTable *table, uint64_t fh) noexcept nogil:
    """NULL when unknown. What is borrowed goes back by handles_return(), soon: somebody may be waiting to close its file."""
    cdef Handle *handle
    pthread_mutex_lock(&table.mutex)
    handle = <Handle *><uintptr_t>map_get(&table.map, fh)
    if handle != NULL:
        handle.busy += 1
    pthread_mutex_unlock(&table.mutex)
    return handle


cdef inline void handles_return(HandleTable *table, Handle *handle) noexcept nogil:
    pthread_mutex_lock(&table.mutex)
    handle.busy -= 1
    if not handle.busy:
        pthread_cond_broadcast(&table.returned)
    pthread_mutex_unlock(&table.mutex)


cdef inline void edit_open(HandleTable *table, fuse_open_out *opened) noexcept nogil:
    """Put into the answer to OPEN or CREATE what is known of the handle."""
    cdef Handle *handle = handles_borrow(table, opened.fh)
    if handle == NULL:
        return
    opened.open_flags |= handle.open_flags
    if handle.backing_id > 0:
        opened.open_flags = (opened.open_flags & OPEN_WITH_PASSTHROUGH) | OPEN_PASSTHROUGH
        opened.backing_id = handle.backing_id
    handles_return(table, handle)
