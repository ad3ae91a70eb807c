# Answers to GETATTR that Python gave in advance: attributes of folders, which the kernel asks for again after each change in
# them, and of files that are read or were just written, which it asks for again after each read and write.
#
# Owns: copies of struct fuse_attr_out. Owns no descriptor: who gave one drops the entry before closing it. A .pxd of inline
# functions, compiled into fuse_transport. Knows no names. Invariants:
# (1) What is in the table is what Python would answer: it replaces or drops an entry in the handler that changes the inode,
#     before that handler's reply; a file that the transport makes moves the times of its folder here at once.
# (2) Size, blocks and time of modification of a staged file are its own: they are read from its descriptor each time.
# (3) An entry without a mode is of a file that is yet to be made: it answers nothing, and is filled in once.
# (4) At most TABLE_MAX inodes; then a new one is not taken (Python answers it).

from cython_ext.fuse_abi cimport fuse_attr_out
from cython_ext.transport.handle_table cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock)
from cython_ext.transport.u64_map cimport U64Map, map_free, map_get, map_init, map_put, map_take
from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from posix.time cimport timespec

cdef extern from "<sys/stat.h>" nogil:
    ctypedef struct FileState "struct stat":
        int64_t st_size
        int64_t st_blocks
        timespec st_mtim
    int fstat(int fd, FileState *state)

ctypedef struct Kept:
    fuse_attr_out answer
    int fd  # of the staged file; -1: the answer is whole

ctypedef struct AttributeTable:
    pthread_mutex_t mutex
    U64Map map

cdef enum:
    TABLE_SLOTS = 1 << 15
    TABLE_MAX = 1 << 14


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


cdef inline int attributes_put(AttributeTable *table, uint64_t ino, const fuse_attr_out *answer, int fd) noexcept nogil:
    """Insert or replace a copy. 0 or ENOMEM; a full table is no error."""
    cdef Kept *kept
    cdef int code = 0
    pthread_mutex_lock(&table.mutex)
    kept = <Kept *><uintptr_t>map_get(&table.map, ino)
    if kept == NULL and table.map.used < TABLE_MAX:
        kept = <Kept *>malloc(sizeof(Kept))
        code = 0 if kept != NULL else ENOMEM
        if not code:
            map_put(&table.map, ino, <uintptr_t>kept)
    if kept != NULL:
        kept.answer, kept.fd = answer[0], fd
    pthread_mutex_unlock(&table.mutex)
    return code


cdef inline void attributes_fill(AttributeTable *table, uint64_t ino, const fuse_attr_out *answer) noexcept nogil:
    """The file of an entry without a mode is made."""
    cdef Kept *kept
    pthread_mutex_lock(&table.mutex)
    kept = <Kept *><uintptr_t>map_get(&table.map, ino)
    if kept != NULL and not kept.answer.attr.mode:
        kept.answer = answer[0]
    pthread_mutex_unlock(&table.mutex)


cdef inline void attributes_drop(AttributeTable *table, uint64_t ino) noexcept nogil:
    pthread_mutex_lock(&table.mutex)
    free(<void *><uintptr_t>map_take(&table.map, ino))
    pthread_mutex_unlock(&table.mutex)


cdef inline bint attributes_copy(AttributeTable *table, uint64_t ino, fuse_attr_out *answer) noexcept nogil:
    """False when the inode is not in the table."""
    cdef Kept *kept
    cdef bint known
    pthread_mutex_lock(&table.mutex)
    kept = <Kept *><uintptr_t>map_get(&table.map, ino)
    known = kept != NULL and kept.answer.attr.mode
    if known:
        answer[0] = kept.answer
        known = kept.fd < 0 or add_staged(answer, kept.fd)
    pthread_mutex_unlock(&table.mutex)
    return known


cdef inline bint add_staged(fuse_attr_out *answer, int fd) noexcept nogil:
    """What only the staged file knows, as `Files.with_staged` has it; False when it does not tell."""
    cdef FileState state
    cdef int64_t told, modified
    if fstat(fd, &state):
        return False
    answer.attr.size, answer.attr.blocks = <uint64_t>state.st_size, <uint64_t>state.st_blocks
    told = nanoseconds(answer.attr.mtime, answer.attr.mtimensec)
    answer.attr.mtime, answer.attr.mtimensec = <uint64_t>state.st_mtim.tv_sec, <uint32_t>state.st_mtim.tv_nsec
    modified = nanoseconds(answer.attr.mtime, answer.attr.mtimensec)
    if modified != told and modified > nanoseconds(answer.attr.ctime, answer.attr.ctimensec):
        answer.attr.ctime, answer.attr.ctimensec = answer.attr.mtime, answer.attr.mtimensec
    return True


cdef inline int64_t nanoseconds(uint64_t seconds, uint32_t rest) noexcept nogil:
    return <int64_t>seconds * 1000000000 + rest


cdef inline void attributes_change(AttributeTable *table, uint64_t ino, int64_t time_ns) noexcept nogil:
    """An inode changed at that time, in what is not its content."""
    cdef Kept *kept
    pthread_mutex_lock(&table.mutex)
    kept = <Kept *><uintptr_t>map_get(&table.map, ino)
    if kept != NULL:
        kept.answer.attr.ctime, kept.answer.attr.ctimensec = <uint64_t>(time_ns // 1000000000), <uint32_t>(time_ns % 1000000000)
    pthread_mutex_unlock(&table.mutex)


cdef inline void attributes_touch(AttributeTable *table, uint64_t ino, int64_t time_ns) noexcept nogil:
    """Something in a folder changed at that time."""
    cdef Kept *kept
    pthread_mutex_lock(&table.mutex)
    kept = <Kept *><uintptr_t>map_get(&table.map, ino)
    if kept != NULL:
        kept.answer.attr.mtime = kept.answer.attr.ctime = <uint64_t>(time_ns // 1000000000)
        kept.answer.attr.mtimensec = kept.answer.attr.ctimensec = <uint32_t>(time_ns % 1000000000)
    pthread_mutex_unlock(&table.mutex)
