# Answers to GETATTR that Python gave in advance: attributes of folders, which the kernel asks for again after each change in
# them, and of files that are read, whose times of access it asks for again after each read.
#
# Owns: copies of struct fuse_attr_out. A .pxd of inline functions, compiled into fuse_transport. Knows no names.
# Invariants: (1) What is in the table is what Python would answer: it replaces or drops an entry in the handler that changes
# the inode, before that handler's reply; a file that the transport makes moves the times of its folder here at once. (2) At most TABLE_MAX inodes; then a new one is not taken (Python answers it).

from cython_ext.fuse_abi cimport fuse_attr_out
from cython_ext.handle_table cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock)
from cython_ext.u64_map cimport U64Map, map_free, map_get, map_init, map_put, map_take
from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc

ctypedef struct AttributeTable:
    pthread_mutex_t mutex
    U64Map map

cdef enum:
    TABLE_SLOTS = 1 << 14
    TABLE_MAX = 1 << 13


cdef inline int attributes_init(AttributeTable *table) noexcept nogil:
    """0, or -1 when there is no memory."""
    pthread_mutex_init(&table.mutex, NULL)
    return map_init(&table.map, TABLE_SLOTS)


cdef inline void attributes_free(AttributeTable *table) noexcept nogil:
    """Only when no other thread knows the table any more."""
    cdef size_t at
    for at in range(table.map.mask + 1):
        free(<void *><uintptr_t>table.map.slots[at].value)
    map_free(&table.map)
    pthread_mutex_destroy(&table.mutex)


cdef inline int attributes_put(AttributeTable *table, uint64_t ino, const fuse_attr_out *answer) noexcept nogil:
    """Insert or replace a copy. 0 or ENOMEM; a full table is no error."""
    cdef fuse_attr_out *kept
    cdef int code = 0
    pthread_mutex_lock(&table.mutex)
    kept = <fuse_attr_out *><uintptr_t>map_get(&table.map, ino)
    if kept == NULL and table.map.used < TABLE_MAX:
        kept = <fuse_attr_out *>malloc(sizeof(fuse_attr_out))
        code = 0 if kept != NULL else ENOMEM
        if not code:
            map_put(&table.map, ino, <uintptr_t>kept)
    if kept != NULL:
        kept[0] = answer[0]
    pthread_mutex_unlock(&table.mutex)
    return code


cdef inline void attributes_drop(AttributeTable *table, uint64_t ino) noexcept nogil:
    pthread_mutex_lock(&table.mutex)
    free(<void *><uintptr_t>map_take(&table.map, ino))
    pthread_mutex_unlock(&table.mutex)


cdef inline bint attributes_copy(AttributeTable *table, uint64_t ino, fuse_attr_out *answer) noexcept nogil:
    """False when the inode is not in the table."""
    cdef fuse_attr_out *kept
    pthread_mutex_lock(&table.mutex)
    kept = <fuse_attr_out *><uintptr_t>map_get(&table.map, ino)
    if kept != NULL:
        answer[0] = kept[0]
    pthread_mutex_unlock(&table.mutex)
    return kept != NULL


cdef inline void attributes_touch(AttributeTable *table, uint64_t ino, int64_t time_ns) noexcept nogil:
    """Something in a folder changed at that time."""
    cdef fuse_attr_out *kept
    pthread_mutex_lock(&table.mutex)
    kept = <fuse_attr_out *><uintptr_t>map_get(&table.map, ino)
    if kept != NULL:
        kept.attr.mtime = kept.attr.ctime = <uint64_t>(time_ns // 1000000000)
        kept.attr.mtimensec = kept.attr.ctimensec = <uint32_t>(time_ns % 1000000000)
    pthread_mutex_unlock(&table.mutex)
