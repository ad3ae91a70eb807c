# What was answered without Python (RELEASE, FORGET, OPEN by a grant), kept until Python takes it in one go.
#
# Owns: the use of a ring of bounded size, which lies in memory that outlives the process: who answered a RELEASE may be killed
# before Python has seen it. A .pxd of inline functions, compiled into fuse_transport. Knows no handle and no inode.
# Invariants: (1) Events are taken in the order they were put. Each is handed out once in the life of a process, and again to the
# next process unless events_done() was called after it. (2) A full ring takes nothing: the request then goes to pyfuse3 as any
# other. (3) The mutex is held for a few memory accesses only. (4) An event is written before `put` tells of it.

from cython_ext.transport.handle_table cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock)
from cython_ext.fuse_abi cimport *
from libc.stdint cimport uint32_t, uint64_t, uint8_t
from libc.string cimport memmove

cdef enum:
    RING_EVENTS = 1 << 16  # a power of two; 2.5 MiB; Python empties it every few milliseconds
    SEQ_CST = 5  # __ATOMIC_SEQ_CST

ctypedef struct Event:
    uint64_t kind  # an opcode
    uint64_t subject  # file handle or inode
    uint64_t count  # of lookups forgotten; of an OPEN the inode
    uint64_t request  # of an OPEN: its unique number
    uint64_t backing_id

ctypedef struct EventRing:  # counts of events that were put and that are done with; zeros are an empty ring
    uint64_t put
    uint64_t done
    Event events[RING_EVENTS]

ctypedef struct EventQueue:
    pthread_mutex_t mutex
    EventRing *ring
    uint64_t taken

cdef extern from * nogil:  # built into gcc and clang
    void __atomic_store_n(uint64_t *at, uint64_t value, int order)


cdef inline void events_init(EventQueue *queue, void *memory) noexcept nogil:
    """`memory`: sizeof(EventRing) bytes that outlive the queue."""
    queue.ring = <EventRing *>memory
    queue.taken = queue.ring.done
    pthread_mutex_init(&queue.mutex, NULL)


cdef inline void events_free(EventQueue *queue) noexcept nogil:
    pthread_mutex_destroy(&queue.mutex)


cdef inline bint events_put(
        EventQueue *queue, uint64_t kind, uint64_t subject, uint64_t count, uint64_t request, uint64_t backing_id) noexcept nogil:
    """False when the ring is full."""
    cdef Event *event
    cdef bint room
    pthread_mutex_lock(&queue.mutex)
    room = queue.ring.put - queue.ring.done < RING_EVENTS
    if room:
        event = &queue.ring.events[queue.ring.put & (RING_EVENTS - 1)]
        event.kind, event.subject, event.count = kind, subject, count
        event.request, event.backing_id = request, backing_id
        __atomic_store_n(&queue.ring.put, queue.ring.put + 1, SEQ_CST)
    pthread_mutex_unlock(&queue.mutex)
    return room


cdef inline uint64_t events_count(EventQueue *queue) noexcept nogil:
    """How many were put so far."""
    cdef uint64_t put
    pthread_mutex_lock(&queue.mutex)
    put = queue.ring.put
    pthread_mutex_unlock(&queue.mutex)
    return put


cdef inline bint events_take(EventQueue *queue, Event *event, uint64_t limit) noexcept nogil:
    """False when there is none among the first `limit`."""
    cdef bint some
    pthread_mutex_lock(&queue.mutex)
    some = queue.taken < limit
    if some:
        event[0] = queue.ring.events[queue.taken & (RING_EVENTS - 1)]
        queue.taken += 1
    pthread_mutex_unlock(&queue.mutex)
    return some


cdef inline void events_done(EventQueue *queue) noexcept nogil:
    """What was taken so far has had its effect: nobody needs to see it again."""
    pthread_mutex_lock(&queue.mutex)
    queue.ring.done = queue.taken
    pthread_mutex_unlock(&queue.mutex)


cdef inline bint keep_forgets(EventQueue *queue, uint8_t *message, size_t size) noexcept nogil:
    """Keep a FORGET or a BATCH_FORGET. False when the ring is full: what is left in the message must be forwarded."""
    cdef fuse_in_header *head = <fuse_in_header *>message
    cdef fuse_batch_forget_in *batch = <fuse_batch_forget_in *>(message + sizeof(fuse_in_header))
    cdef fuse_forget_one *one = <fuse_forget_one *>(batch + 1)
    cdef uint32_t at
    if head.opcode == FUSE_FORGET:
        return events_put(queue, FUSE_FORGET, head.nodeid, (<fuse_forget_in *>batch).nlookup, 0, 0)
    if batch.count > (size - sizeof(fuse_in_header) - sizeof(fuse_batch_forget_in)) // sizeof(fuse_forget_one):
        return True  # its length is a lie, and nobody waits to be told so
    for at in range(batch.count):
        if not events_put(queue, FUSE_FORGET, one[at].nodeid, one[at].nlookup, 0, 0):
            batch.count -= at
            head.len -= <uint32_t>(at * sizeof(fuse_forget_one))
            memmove(one, one + at, batch.count * sizeof(fuse_forget_one))
            return False
    return True


cdef inline tuple events_taken(EventQueue *queue, uint64_t limit):
    """Those among the first `limit` as `Transport.take_events` tells them."""
    cdef Event event
    opened, released, forgotten = [], [], []
    while events_take(queue, &event, limit):
        if event.kind == FUSE_RELEASE:
            released.append(event.subject)
        elif event.kind == FUSE_OPEN:
            opened.append((event.subject, event.count, event.request, event.backing_id))
        else:
            forgotten.append((event.subject, event.count))
    return opened, released, forgotten
