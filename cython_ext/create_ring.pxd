# Files that are made before anybody asks for them, and the record of those that were given away: how CREATE is answered at once.
#
# Owns: the spares (each an empty staged file with a file handle that the transport already knows) and the writing end of the ring of
# records, which lies in the memory tier and outlives every process (its reader: cascadefs/creates.py). A .pxd of inline functions,
# compiled into fuse_transport. Knows no names table and no answer. Invariants:
# (1) A spare is given away once: it leaves the pool under the mutex, together with the writing of its record.
# (2) A record is complete before `put` tells of it, and before the kernel hears of the file: a process that is killed in between
#     leaves a file that was made, or none.
# (3) A full ring, or an empty pool, gives nothing: the request is then Python's, as any other.
# (4) The descriptor of a spare is open until Python has seen its record and the RELEASE of its handle.

from cython_ext.fuse_abi cimport *
from cython_ext.handle_table cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock)
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uint8_t
from libc.string cimport memcpy, memset

cdef enum:
    CREATE_RECORDS = 1 << 10
    SPARES_MAX = 1 << 9
    NAME_ROOM = 256
    SEQ_CST = 5  # __ATOMIC_SEQ_CST

ctypedef struct Spare:
    uint64_t ino
    uint64_t fh
    int fd
    int32_t backing_id

ctypedef struct CreateRecord:  # as creates.py has it
    uint64_t request
    uint64_t folder
    uint64_t ino
    uint64_t fh
    int64_t time_ns
    uint32_t mode
    uint32_t uid
    uint32_t gid
    int32_t backing_id
    uint32_t name_bytes
    uint32_t padding
    uint8_t name[NAME_ROOM]

ctypedef struct CreateRing:  # counts of records that were put and that are done with
    uint64_t magic
    uint64_t put
    uint64_t done
    uint64_t padding[5]
    CreateRecord records[CREATE_RECORDS]

ctypedef struct CreatePool:
    pthread_mutex_t mutex
    CreateRing *ring  # NULL: nothing is given
    Spare spares[SPARES_MAX]
    uint32_t first
    uint32_t count

cdef extern from * nogil:  # built into gcc and clang
    void __atomic_store_n(uint64_t *at, uint64_t value, int order)


cdef inline void creates_init(CreatePool *pool, void *memory) noexcept nogil:
    """`memory`: sizeof(CreateRing) bytes that outlive the process, or NULL."""
    memset(pool, 0, sizeof(CreatePool))
    pool.ring = <CreateRing *>memory
    pthread_mutex_init(&pool.mutex, NULL)


cdef inline void creates_free(CreatePool *pool) noexcept nogil:
    pthread_mutex_destroy(&pool.mutex)


cdef inline bint spares_put(CreatePool *pool, const Spare *spare) noexcept nogil:
    """False when there are enough."""
    cdef bint room
    pthread_mutex_lock(&pool.mutex)
    room = pool.ring != NULL and pool.count < SPARES_MAX
    if room:
        pool.spares[(pool.first + pool.count) % SPARES_MAX] = spare[0]
        pool.count += 1
    pthread_mutex_unlock(&pool.mutex)
    return room


cdef inline uint64_t spares_withdraw(CreatePool *pool) noexcept nogil:
    """The inode of a spare that is not given away any more; 0 when there is none left."""
    cdef uint64_t ino = 0
    pthread_mutex_lock(&pool.mutex)
    if pool.count:
        ino = pool.spares[pool.first].ino
        pool.first = (pool.first + 1) % SPARES_MAX
        pool.count -= 1
    pthread_mutex_unlock(&pool.mutex)
    return ino


cdef inline bint creates_give(CreatePool *pool, CreateRecord *record, Spare *spare) noexcept nogil:
    """Take a spare out, complete the record with it, and put that. False: none, or the ring is full; nothing has changed then."""
    cdef CreateRing *ring = pool.ring
    cdef bint given
    pthread_mutex_lock(&pool.mutex)
    given = pool.count > 0 and ring.put - ring.done < CREATE_RECORDS
    if given:
        spare[0] = pool.spares[pool.first]
        pool.first = (pool.first + 1) % SPARES_MAX
        pool.count -= 1
        record.ino, record.fh, record.backing_id = spare.ino, spare.fh, spare.backing_id
        ring.records[ring.put % CREATE_RECORDS] = record[0]
        __atomic_store_n(&ring.put, ring.put + 1, SEQ_CST)
    pthread_mutex_unlock(&pool.mutex)
    return given


cdef inline bint read_create(const uint8_t *message, size_t size, CreateRecord *record) noexcept nogil:
    """What a CREATE asks for. False when it is none of the plain ones: sent again, with extensions, a name that begins with a dot."""
    cdef const fuse_in_header *head = <const fuse_in_header *>message
    cdef const fuse_create_in *arg = <const fuse_create_in *>(message + sizeof(fuse_in_header))
    cdef const uint8_t *name = message + sizeof(fuse_in_header) + sizeof(fuse_create_in)
    cdef size_t length = size - sizeof(fuse_in_header) - sizeof(fuse_create_in)
    if length < 2 or length > NAME_ROOM or name[length - 1] or name[0] == c"." or head.total_extlen or head.unique >> 63:
        return False
    memset(record, 0, sizeof(CreateRecord))
    record.request, record.folder = head.unique, head.nodeid
    record.mode = MODE_REGULAR | (arg.mode & 0o7777 & ~arg.umask)
    record.uid, record.gid = head.uid, head.gid
    record.name_bytes = <uint32_t>(length - 1)
    memcpy(record.name, name, length)
    return True


cdef inline void answer_create(const CreateRecord *record, fuse_create_out *answer) noexcept nogil:
    """The answer but for what the handle table adds; attributes.py `entry` says the same of a staged file."""
    cdef uint64_t seconds = <uint64_t>(record.time_ns // 1000000000)
    cdef uint32_t rest = <uint32_t>(record.time_ns % 1000000000)
    memset(answer, 0, sizeof(fuse_create_out))
    answer.nodeid, answer.entry_valid, answer.attr_valid = record.ino, SETTLED_S, STAGED_S
    answer.attr.ino, answer.attr.nlink, answer.attr.blksize = record.ino, 1, BLOCK_BYTES
    answer.attr.mode, answer.attr.uid, answer.attr.gid = record.mode, record.uid, record.gid
    answer.attr.atime = answer.attr.mtime = answer.attr.ctime = seconds
    answer.attr.atimensec = answer.attr.mtimensec = answer.attr.ctimensec = rest
    answer.opened.fh = record.fh
