# Which ranges of some files were written through the transport, for syncs that read nothing else.
#
# Owns: the records, by inode. A .pxd of inline functions, compiled into fuse_transport. Knows no handle and no message.
# Invariants: (1) A write is noted after its bytes are in the file and before it is answered: who takes the ranges and reads then
# has the bytes of each, and what is noted later comes with the next take. (2) What does not fit is not dropped silently: then it
# is not known what was written. (3) Records are few and used only under `mutex`, for a few memory accesses.

from cython_ext.transport.handle_table cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock)
from cython_ext.transport.u64_map cimport U64Map, map_free, map_full, map_get, map_init, map_put, map_take
from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

cdef enum:
    WRITTEN_FILES = 256  # syncing at the same time
    WRITTEN_RANGES = 1024  # between two syncs: 16 KiB of memory

ctypedef struct WrittenRange:
    uint64_t offset
    uint64_t length

ctypedef struct Written:
    uint32_t count
    bint lost
    WrittenRange ranges[WRITTEN_RANGES]

ctypedef struct WrittenTable:
    pthread_mutex_t mutex
    U64Map map  # inode -> Written


cdef inline int written_init(WrittenTable *table) noexcept nogil:
    pthread_mutex_init(&table.mutex, NULL)
    return map_init(&table.map, 2 * WRITTEN_FILES)


cdef inline void written_free(WrittenTable *table) noexcept nogil:
    cdef size_t at
    for at in range(table.map.mask + 1):
        free(<void *><uintptr_t>table.map.slots[at].value)
    map_free(&table.map)
    pthread_mutex_destroy(&table.mutex)


cdef inline bint written_begin(WrittenTable *table, uint64_t ino) noexcept nogil:
    """Nothing of this file was written so far. False: there is no room for it."""
    cdef Written *found
    pthread_mutex_lock(&table.mutex)
    found = <Written *><uintptr_t>map_get(&table.map, ino)
    if found == NULL and not map_full(&table.map):
        found = <Written *>malloc(sizeof(Written))
        if found != NULL:
            map_put(&table.map, ino, <uintptr_t>found)
    if found != NULL:
        found.count, found.lost = 0, False
    pthread_mutex_unlock(&table.mutex)
    return found != NULL


cdef inline void written_end(WrittenTable *table, uint64_t ino) noexcept nogil:
    pthread_mutex_lock(&table.mutex)
    free(<void *><uintptr_t>map_take(&table.map, ino))
    pthread_mutex_unlock(&table.mutex)


cdef inline void note(Written *found, uint64_t offset, uint64_t length) noexcept nogil:
    cdef WrittenRange *last = &found.ranges[found.count - 1] if found.count else NULL
    if last != NULL and last.offset + last.length == offset:
        last.length += length
    elif last != NULL and last.offset <= offset and offset + length <= last.offset + last.length:
        pass
    elif found.count == WRITTEN_RANGES:
        found.lost = True
    else:
        found.ranges[found.count].offset, found.ranges[found.count].length = offset, length
        found.count += 1


cdef inline void written_note(WrittenTable *table, uint64_t ino, uint64_t offset, uint64_t length) noexcept nogil:
    """A write to a file that may be one of these."""
    cdef Written *found
    if not table.map.used:  # read without the lock: whoever begins tells of writes that come after
        return
    pthread_mutex_lock(&table.mutex)
    found = <Written *><uintptr_t>map_get(&table.map, ino)
    if found != NULL and not found.lost:
        note(found, offset, length)
    pthread_mutex_unlock(&table.mutex)


cdef inline void written_lose(WrittenTable *table, uint64_t ino) noexcept nogil:
    """A change to a file that no range tells."""
    cdef Written *found
    pthread_mutex_lock(&table.mutex)
    found = <Written *><uintptr_t>map_get(&table.map, ino)
    if found != NULL:
        found.lost = True
    pthread_mutex_unlock(&table.mutex)


cdef inline bint written_take(WrittenTable *table, uint64_t ino, Written *taken) noexcept nogil:
    """What was written since begin or the last call. False: not known."""
    cdef Written *found
    cdef bint known
    pthread_mutex_lock(&table.mutex)
    found = <Written *><uintptr_t>map_get(&table.map, ino)
    known = found != NULL and not found.lost
    if known:
        taken.count = found.count
        memcpy(taken.ranges, found.ranges, found.count * sizeof(WrittenRange))
        found.count = 0
    pthread_mutex_unlock(&table.mutex)
    return known
