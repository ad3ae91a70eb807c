# Names that are made, moved and removed at once, and the record of that: how CREATE, RENAME and UNLINK are answered without Python.
#
# Owns: the spares (each an empty staged file with a file handle that the transport already knows) and the writing end of the ring of
# records, which lies in the memory tier and outlives every process (its reader: cascadefs/name_ring.py). A .pxd of inline functions,
# compiled into fuse_transport. Knows no names table and no answer. Invariants:
# (1) A spare is given away once: it leaves the pool under the mutex, together with the writing of its record.
# (2) A record is complete before `put` tells of it, and before the kernel hears of the change: a process that is killed in between
#     leaves a change that was made, or none. Records are in the order of the changes; the two of a RENAME are told of together.
# (3) A full ring, an empty pool, or a ring that is not open to removals takes nothing: the request is then Python's, as any other.
# (4) The descriptor of a spare is open until Python has seen its record and the RELEASE of its handle.

from cython_ext.fuse_abi cimport *
from cython_ext.transport.handle_table cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock)
from cython_ext.transport.name_table cimport is_of_python
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uint8_t
from libc.string cimport memcpy, memset

cdef enum:
    RING_RECORDS = 1 << 11
    SPARES_MAX = 1 << 9
    NAME_ROOM = 256
    CREATED_FOR_BOTH = 1 << 16
    MOVED_TO = 1 << 17  # the second record of a RENAME, no opcode
    SEQ_CST = 5  # __ATOMIC_SEQ_CST

ctypedef struct Spare:
    uint64_t ino
    uint64_t fh
    int fd
    int32_t backing_id

ctypedef struct NameRecord:  # as name_ring.py has it
    uint64_t request
    uint64_t folder
    uint64_t ino  # 0: of an UNLINK that Python knows only
    uint64_t fh
    int64_t time_ns
    uint64_t number  # Python's, of the operation; 0: it has not begun to enter this
    uint32_t kind  # an opcode, CREATED_FOR_BOTH with it: the file is open for reading and writing; or MOVED_TO
    uint32_t mode
    uint32_t uid
    uint32_t gid
    int32_t backing_id
    uint32_t name_bytes
    uint8_t name[NAME_ROOM]

ctypedef struct NameRing:  # counts of records that were put and that are done with
    uint64_t magic
    uint64_t put
    uint64_t done
    uint64_t padding[5]
    NameRecord records[RING_RECORDS]

ctypedef struct NamePool:
    pthread_mutex_t mutex
    NameRing *ring  # NULL: nothing is taken
    bint removes  # whether UNLINK and RENAME are answered here
    uint64_t changed  # the count `put` after the last of them
    uint64_t removed_unknown  # the same of UNLINKs whose inode is known to Python only
    Spare spares[SPARES_MAX]
    uint32_t first
    uint32_t count

cdef extern from "<string.h>" nogil:
    size_t strnlen(const char *text, size_t most)

cdef extern from * nogil:  # built into gcc and clang
    void __atomic_store_n(uint64_t *at, uint64_t value, int order)
    uint64_t __atomic_load_n(uint64_t *at, int order)


cdef inline void ring_init(NamePool *pool, void *memory) noexcept nogil:
    """`memory`: sizeof(NameRing) bytes that outlive the process, or NULL."""
    memset(pool, 0, sizeof(NamePool))
    pool.ring = <NameRing *>memory
    pthread_mutex_init(&pool.mutex, NULL)


cdef inline void ring_free(NamePool *pool) noexcept nogil:
    pthread_mutex_destroy(&pool.mutex)


cdef inline bint spares_put(NamePool *pool, uint64_t ino, uint64_t fh, int fd, int32_t backing_id) noexcept nogil:
    """False when there are enough."""
    cdef Spare *spare
    cdef bint room
    pthread_mutex_lock(&pool.mutex)
    room = pool.ring != NULL and pool.count < SPARES_MAX
    if room:
        spare = &pool.spares[(pool.first + pool.count) % SPARES_MAX]
        spare.ino, spare.fh, spare.fd, spare.backing_id = ino, fh, fd, backing_id
        pool.count += 1
    pthread_mutex_unlock(&pool.mutex)
    return room


cdef inline uint64_t spares_withdraw(NamePool *pool) noexcept nogil:
    """The inode of a spare that is not given away any more; 0 when there is none left."""
    cdef uint64_t ino = 0
    pthread_mutex_lock(&pool.mutex)
    if pool.count:
        ino = pool.spares[pool.first].ino
        pool.first = (pool.first + 1) % SPARES_MAX
        pool.count -= 1
    pthread_mutex_unlock(&pool.mutex)
    return ino


cdef inline void put_record(NameRing *ring, const NameRecord *record) noexcept nogil:
    """Under the mutex, when there is room."""
    ring.records[ring.put % RING_RECORDS] = record[0]
    __atomic_store_n(&ring.put, ring.put + 1, SEQ_CST)


cdef inline bint ring_give(NamePool *pool, NameRecord *record, Spare *spare) noexcept nogil:
    """Take a spare out, complete the record with it, and put that. False: none, or the ring is full; nothing has changed then."""
    cdef NameRing *ring = pool.ring
    cdef bint given
    pthread_mutex_lock(&pool.mutex)
    given = pool.count > 0 and ring.put - ring.done < RING_RECORDS
    if given:
        spare[0] = pool.spares[pool.first]
        pool.first = (pool.first + 1) % SPARES_MAX
        pool.count -= 1
        record.ino, record.fh, record.backing_id = spare.ino, spare.fh, spare.backing_id
        put_record(ring, record)
    pthread_mutex_unlock(&pool.mutex)
    return given


cdef inline bint ring_remove(NamePool *pool, const NameRecord *record) noexcept nogil:
    """Put the record of an UNLINK; its `ino` is 0 if it is not known whose name that is. False: not now; nothing has changed then."""
    cdef NameRing *ring = pool.ring
    cdef bint taken
    pthread_mutex_lock(&pool.mutex)
    taken = pool.removes and ring.put - ring.done < RING_RECORDS
    if taken:
        put_record(ring, record)
        __atomic_store_n(&pool.changed, ring.put, SEQ_CST)
        if not record.ino:
            __atomic_store_n(&pool.removed_unknown, ring.put, SEQ_CST)
    pthread_mutex_unlock(&pool.mutex)
    return taken


cdef inline bint ring_move(NamePool *pool, const NameRecord *old, const NameRecord *new) noexcept nogil:
    """Put the two records of a RENAME. False: not now; nothing has changed then."""
    cdef NameRing *ring = pool.ring
    cdef bint taken
    pthread_mutex_lock(&pool.mutex)
    taken = pool.removes and ring.put + 1 - ring.done < RING_RECORDS
    if taken:
        ring.records[(ring.put + 1) % RING_RECORDS] = new[0]
        ring.records[ring.put % RING_RECORDS] = old[0]
        __atomic_store_n(&ring.put, ring.put + 2, SEQ_CST)
        __atomic_store_n(&pool.changed, ring.put, SEQ_CST)
    pthread_mutex_unlock(&pool.mutex)
    return taken


cdef inline bint change_pending(NamePool *pool, uint64_t ino) noexcept nogil:
    """Whether Python has not yet entered an UNLINK or RENAME of this file: what it says of it may be wrong until then."""
    cdef NameRing *ring = pool.ring
    cdef const NameRecord *record
    cdef uint64_t at
    cdef bint found = False
    if ring == NULL or __atomic_load_n(&pool.changed, SEQ_CST) <= __atomic_load_n(&ring.done, SEQ_CST):
        return False
    pthread_mutex_lock(&pool.mutex)
    for at in range(ring.done, ring.put):
        record = &ring.records[at % RING_RECORDS]
        found = found or (record.ino == ino and record.kind & ~<uint32_t>CREATED_FOR_BOTH != FUSE_CREATE)
    pthread_mutex_unlock(&pool.mutex)
    return found


cdef inline bint unknown_removals_pending(NamePool *pool) noexcept nogil:
    """Whether an UNLINK waits of which it is not known whose name that is: what is known of any file may be wrong until then."""
    return pool.ring != NULL and __atomic_load_n(&pool.removed_unknown, SEQ_CST) > __atomic_load_n(&pool.ring.done, SEQ_CST)


cdef inline void allow_removals(NamePool *pool, bint allowed) noexcept nogil:
    pthread_mutex_lock(&pool.mutex)
    pool.removes = allowed and pool.ring != NULL
    pthread_mutex_unlock(&pool.mutex)


cdef inline bint begin_record(const fuse_in_header *head, const uint8_t *name, size_t length, NameRecord *record) noexcept nogil:
    """`length`: of the name with its zero byte."""
    if length < 2 or length > NAME_ROOM or name[length - 1] or head.total_extlen or head.unique >> 63:
        return False
    if is_of_python(head.nodeid, name, length - 1):
        return False
    memset(record, 0, sizeof(NameRecord))
    record.request, record.folder, record.kind = head.unique, head.nodeid, head.opcode
    record.name_bytes = <uint32_t>(length - 1)
    memcpy(record.name, name, length)
    return True


cdef inline bint read_create(const uint8_t *message, size_t size, NameRecord *record) noexcept nogil:
    """What a CREATE asks for. False when it is none of the plain ones: sent again, with extensions, a name of Python's, writes that
    Python must see."""
    cdef const fuse_in_header *head = <const fuse_in_header *>message
    cdef const fuse_create_in *arg = <const fuse_create_in *>(message + sizeof(fuse_in_header))
    cdef size_t before = sizeof(fuse_in_header) + sizeof(fuse_create_in)
    if not begin_record(head, message + before, size - before, record):
        return False
    record.mode = MODE_REGULAR | (arg.mode & 0o7777 & ~arg.umask)
    record.uid, record.gid = head.uid, head.gid
    if arg.flags & OPEN_ACCMODE == OPEN_FOR_BOTH:
        record.kind |= CREATED_FOR_BOTH
    return not (arg.flags & <uint32_t>O_DSYNC or record.mode & MODE_SETID)


cdef inline bint read_unlink(const uint8_t *message, size_t size, NameRecord *record) noexcept nogil:
    """What an UNLINK asks for. False when it is none of the plain ones, as above."""
    cdef size_t before = sizeof(fuse_in_header)
    return begin_record(<const fuse_in_header *>message, message + before, size - before, record)


cdef inline bint read_rename(const uint8_t *message, size_t size, NameRecord *old, NameRecord *new) noexcept nogil:
    """What a RENAME without flags asks for. False when it is none of the plain ones, as above."""
    cdef const uint8_t *name = message + sizeof(fuse_in_header) + sizeof(fuse_rename_in)
    cdef fuse_in_header head = (<const fuse_in_header *>message)[0]
    cdef size_t left = size - sizeof(fuse_in_header) - sizeof(fuse_rename_in)
    cdef size_t length = strnlen(<const char *>name, left) + 1
    if length >= left or not begin_record(&head, name, length, old):
        return False
    head.nodeid = (<const fuse_rename_in *>(message + sizeof(fuse_in_header))).newdir
    if not begin_record(&head, name + length, left - length, new):
        return False
    new.kind = MOVED_TO
    return True


cdef inline void answer_create(const NameRecord *record, fuse_create_out *answer) noexcept nogil:
    """The answer but for what the handle table adds; attributes.py `entry` says the same of a staged file."""
    cdef uint64_t seconds = <uint64_t>(record.time_ns // 1000000000)
    cdef uint32_t rest = <uint32_t>(record.time_ns % 1000000000)
    memset(answer, 0, sizeof(fuse_create_out))
    answer.nodeid, answer.entry_valid = record.ino, SETTLED_S
    answer.attr_valid = 0 if record.kind & CREATED_FOR_BOTH else STAGED_S  # it may be written to through a mapping: mount/fuse/mappings.py
    answer.attr.ino, answer.attr.nlink, answer.attr.blksize = record.ino, 1, BLOCK_BYTES
    answer.attr.mode, answer.attr.uid, answer.attr.gid = record.mode, record.uid, record.gid
    answer.attr.atime = answer.attr.mtime = answer.attr.ctime = seconds
    answer.attr.atimensec = answer.attr.mtimensec = answer.attr.ctimensec = rest
    answer.opened.fh = record.fh
