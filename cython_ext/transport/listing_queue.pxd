# Requests for the entries of a folder (READDIRPLUS) that wait for Python, which answers each with one call and without pyfuse3; and
# which folders need not be asked for, because the kernel has kept the last listing.
#
# Owns: a ring of bounded size, the eventfd that wakes Python, the numbers of open folders, what is kept. A .pxd of inline functions,
# compiled into fuse_transport. Knows no entry. Invariants: (1) What is refused is pyfuse3's: when the ring is full, the folders of .cascade, a request that is
# sent again, and all before Python says that it takes them. (2) Each request is handed out once. (3) The mutex is held for a few
# memory accesses only. (4) The kernel drops by itself what it has kept of a folder in which a name came or went: each does so by way
# of that kernel. A kept listing gives no attributes: it is asked for again when many of those that the kernel got with it do not hold any
# more, because the files were opened or changed, the kernel has forgotten them, or half of their time is over.

from cython_ext.transport.doorbell cimport EFD_CLOEXEC, EFD_NONBLOCK, eventfd, eventfd_read, eventfd_write
from cython_ext.fuse_abi cimport *
from cython_ext.transport.handle_table cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock)
from cython_ext.transport.message_io cimport count
from cython_ext.transport.name_table cimport VIRTUAL_SHIFT
from libc.stdint cimport uint32_t, uint64_t, uint8_t
from cython_ext.transport.u64_map cimport U64Map, map_clear, map_free, map_full, map_get, map_init, map_put, map_take
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec
from posix.unistd cimport close

cdef enum:
    LISTINGS_MAX = 256  # a power of two
    # A longer answer would not make listings faster, but keep others waiting: this one takes Python half a millisecond.
    LISTING_BYTES = 128 << 10
    KEPT_SLOTS = 1 << 13  # half of it may be used; then all are forgotten
    KEPT_S = 1800  # half of SETTLED_S
    KEPT_CHANGES = 4096  # as many files can be looked at without Python (delegations.py)

ctypedef struct Listing:
    uint64_t unique
    uint64_t folder
    uint64_t handle
    uint64_t position
    uint32_t room

ctypedef struct ListingQueue:
    pthread_mutex_t mutex
    int wake_fd
    bint taken_by_python
    uint64_t put, taken
    uint64_t last_handle
    U64Map kept  # folder -> when (the second, then the lower half of `changes`)
    uint64_t changes  # of single files: opened, linked, given an attribute
    Listing waiting[LISTINGS_MAX]


cdef inline int listings_init(ListingQueue *queue) noexcept nogil:
    """0, or -1 when there is no descriptor left."""
    cdef timespec now
    pthread_mutex_init(&queue.mutex, NULL)
    queue.taken_by_python, queue.put, queue.taken = False, 0, 0
    clock_gettime(CLOCK_REALTIME, &now)  # folders that are open since an earlier worker have lower numbers
    queue.last_handle = <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec
    queue.changes = 0
    queue.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    return 0 if queue.wake_fd >= 0 and not map_init(&queue.kept, KEPT_SLOTS) else -1


cdef inline void listings_free(ListingQueue *queue) noexcept nogil:
    """Only when no other thread knows the queue any more."""
    close(queue.wake_fd)
    map_free(&queue.kept)
    pthread_mutex_destroy(&queue.mutex)


cdef inline uint64_t listings_open(ListingQueue *queue) noexcept nogil:
    """A number for one more open folder."""
    pthread_mutex_lock(&queue.mutex)
    queue.last_handle += 1
    cdef uint64_t handle = queue.last_handle
    pthread_mutex_unlock(&queue.mutex)
    return handle


cdef inline uint64_t kept_now(const ListingQueue *queue) noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec << 32 | <uint32_t>queue.changes


cdef inline void listings_keep(ListingQueue *queue, uint64_t folder) noexcept nogil:
    """A whole listing of that folder was told just now; 0: the kernel does not have any more what it was told with listings."""
    pthread_mutex_lock(&queue.mutex)
    if not folder or map_full(&queue.kept):
        map_clear(&queue.kept)
    if folder:
        map_put(&queue.kept, folder, kept_now(queue))
    pthread_mutex_unlock(&queue.mutex)


cdef inline uint32_t listing_flags(ListingQueue *queue, uint64_t folder) noexcept nogil:
    """For the answer to OPENDIR."""
    cdef uint64_t then, now
    pthread_mutex_lock(&queue.mutex)
    then, now = map_get(&queue.kept, folder), kept_now(queue)
    pthread_mutex_unlock(&queue.mutex)
    if then and (now >> 32) - (then >> 32) < KEPT_S and <uint32_t>(now - then) < KEPT_CHANGES:
        return OPEN_CACHE_DIR | OPEN_KEEP_CACHE
    return OPEN_CACHE_DIR


cdef inline void listings_note(ListingQueue *queue, uint32_t opcode) noexcept nogil:
    """A request that leaves the kernel without some of the attributes of a file."""
    if opcode in (FUSE_OPEN, FUSE_LINK, FUSE_SETXATTR, FUSE_REMOVEXATTR):
        count(&queue.changes, 1)


cdef inline bint listings_put(ListingQueue *queue, const uint8_t *message) noexcept nogil:
    """False when the request is pyfuse3's."""
    cdef const fuse_in_header *head = <const fuse_in_header *>message
    cdef const fuse_io_in *arg = <const fuse_io_in *>(message + sizeof(fuse_in_header))
    cdef Listing *one
    cdef bint room
    if head.unique >> 63 or head.nodeid >> VIRTUAL_SHIFT:
        return False
    pthread_mutex_lock(&queue.mutex)
    if not arg.offset:
        map_take(&queue.kept, head.nodeid)  # until all is told
    room = queue.taken_by_python and queue.put - queue.taken < LISTINGS_MAX
    if room:
        one = &queue.waiting[queue.put & (LISTINGS_MAX - 1)]
        one.unique, one.folder, one.handle, one.position = head.unique, head.nodeid, arg.fh, arg.offset
        one.room = min(arg.size, <uint32_t>LISTING_BYTES)
        queue.put += 1
    pthread_mutex_unlock(&queue.mutex)
    if room:
        eventfd_write(queue.wake_fd, 1)
    return room


cdef inline bint listings_take(ListingQueue *queue, Listing *one) noexcept nogil:
    """False when there is none; then the next one that comes wakes Python."""
    cdef uint64_t woken
    cdef bint some
    eventfd_read(queue.wake_fd, &woken)  # before looking: what comes later makes it readable again
    pthread_mutex_lock(&queue.mutex)
    some = queue.taken < queue.put
    if some:
        one[0] = queue.waiting[queue.taken & (LISTINGS_MAX - 1)]
        queue.taken += 1
    pthread_mutex_unlock(&queue.mutex)
    return some
