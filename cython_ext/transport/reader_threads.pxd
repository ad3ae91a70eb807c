# Which threads are blocked in a read of the device, and how they are made to leave it.
#
# Owns: the register of readers. Knows nothing of messages. A .pxd of inline functions, compiled into fuse_transport.
# A read of /dev/fuse ends early only by a signal. (Polling the device together with an eventfd would do as well, but costs
# one more system call for each request.) SIGURG is used because it is ignored by default: one that comes late does no harm.
# Invariants:
# (1) A reader says READING, then looks at `stopping`, then reads. readers_stop() sets `stopping`, then signals all that are
#     READING until none is. Both are sequentially consistent, so no reader can miss it.
# (2) A registered thread is alive: it registers and leaves by itself, and is signalled under the mutex only.
# (3) Nobody waits for a reader that is WORKING: it may itself wait for the caller of readers_stop().

from cython_ext.transport.handle_table cimport pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock
from libc.errno cimport ETIMEDOUT
from libc.signal cimport SIGURG
from libc.string cimport memset
from posix.signal cimport sigaction, sigaction_t, sigemptyset

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    pthread_t pthread_self()
    int pthread_kill(pthread_t thread, int signal_number)

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int microseconds)

cdef extern from * nogil:  # built into gcc and clang
    int __atomic_load_n(const int *at, int order)
    void __atomic_store_n(int *at, int value, int order)

cdef enum:
    READER_SLOTS = 64
    ABSENT = 0
    WORKING = 1
    READING = 2
    SEQ_CST = 5  # __ATOMIC_SEQ_CST
    STOP_ROUNDS = 5000  # of 1 ms; one or two are enough unless a reader has SIGURG blocked

ctypedef struct ReaderThread:
    pthread_t thread
    int state

ctypedef struct ReaderThreads:
    pthread_mutex_t mutex
    int stopping
    ReaderThread slots[READER_SLOTS]


cdef inline ReaderThread *readers_enter(ReaderThreads *readers) noexcept nogil:
    """NULL when there are too many."""
    cdef int at
    cdef ReaderThread *free_slot = NULL
    pthread_mutex_lock(&readers.mutex)
    for at in range(READER_SLOTS):
        if readers.slots[at].state == ABSENT:
            free_slot = &readers.slots[at]
            free_slot.thread = pthread_self()
            __atomic_store_n(&free_slot.state, WORKING, SEQ_CST)
            break
    pthread_mutex_unlock(&readers.mutex)
    return free_slot


cdef inline void readers_leave(ReaderThreads *readers, ReaderThread *reader) noexcept nogil:
    pthread_mutex_lock(&readers.mutex)
    __atomic_store_n(&reader.state, ABSENT, SEQ_CST)
    pthread_mutex_unlock(&readers.mutex)


cdef inline bint reader_may_read(ReaderThreads *readers, ReaderThread *reader) noexcept nogil:
    """Whether the reader may enter the read; it is READING from here on."""
    __atomic_store_n(&reader.state, READING, SEQ_CST)
    return not __atomic_load_n(&readers.stopping, SEQ_CST)


cdef inline void reader_works(ReaderThread *reader) noexcept nogil:
    __atomic_store_n(&reader.state, WORKING, SEQ_CST)


cdef inline void wake_by_signal(int signal_number) noexcept nogil:
    pass


cdef inline bint signal_those_reading(ReaderThreads *readers) noexcept nogil:
    cdef int at
    cdef bint any_reading = False
    pthread_mutex_lock(&readers.mutex)
    for at in range(READER_SLOTS):
        if __atomic_load_n(&readers.slots[at].state, SEQ_CST) == READING:
            pthread_kill(readers.slots[at].thread, SIGURG)
            any_reading = True
    pthread_mutex_unlock(&readers.mutex)
    return any_reading


cdef inline int readers_stop(ReaderThreads *readers) noexcept nogil:
    """No reader starts another read after this. 0 or an errno. SIGURG has its old handler again afterwards."""
    cdef sigaction_t wake, before
    cdef int rounds = 0
    memset(&wake, 0, sizeof(wake))
    sigemptyset(&wake.sa_mask)
    wake.sa_handler = wake_by_signal  # and no SA_RESTART: the read ends with EINTR
    __atomic_store_n(&readers.stopping, 1, SEQ_CST)
    sigaction(SIGURG, &wake, &before)
    while signal_those_reading(readers) and rounds < STOP_ROUNDS:
        usleep(1000)
        rounds += 1
    sigaction(SIGURG, &before, NULL)
    return ETIMEDOUT if rounds == STOP_ROUNDS else 0
