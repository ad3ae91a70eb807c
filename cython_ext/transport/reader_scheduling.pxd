# How the reader of the device gets a processor: at once, and on the core of the program that it answers.
#
# Owns: its niceness, when to look where the caller runs, the move. A .pxd of inline functions, compiled into fuse_transport.
# Knows no message. An answer takes a few microseconds; but where all cores are busy, an ordinary thread waits for milliseconds to
# be let in, and its caller with it. A caller sleeps until its answer comes, so its core is free; a wake-up on another core, which
# is often halted, costs ten times the answer itself on a virtual machine, and the scheduler keeps either state for seconds.
# Invariants:
# (1) The thread may run wherever it might before: it is moved, not bound, so the scheduler still takes it off a busy core.
# (2) The thread stays in the ordinary class, with the highest priority there where that is allowed: a caller that is woken by a
#     real-time thread goes to another core if one is idle, and the two would chase each other.
# (3) What is not allowed or cannot be found out (no /proc, a caller in another namespace, a core that is not ours) changes nothing.

from libc.stdint cimport uint32_t
from libc.stdio cimport snprintf
from libc.stdlib cimport atoi
from libc.string cimport strrchr
from posix.fcntl cimport O_CLOEXEC, O_RDONLY, open
from posix.unistd cimport close, read

cdef extern from "<sys/resource.h>" nogil:
    int PRIO_PROCESS
    int setpriority(int which, unsigned int who, int priority)

cdef extern from "<sched.h>" nogil:
    ctypedef struct cpu_set_t:
        pass
    int sched_getcpu()
    int sched_getaffinity(int thread, size_t size, cpu_set_t *mask)
    int sched_setaffinity(int thread, size_t size, const cpu_set_t *mask)
    int CPU_ISSET(int core, const cpu_set_t *mask)
    int CPU_COUNT(const cpu_set_t *mask)
    void CPU_ZERO(cpu_set_t *mask)
    void CPU_SET(int core, cpu_set_t *mask)

cdef enum:
    HIGHEST_PRIORITY = -20
    LOOK_EVERY = 16  # requests. A look costs 5 us, a move 50 to 100; after pauses, when caches are cold, both cost more than they gain
    STAT_BYTES = 1024
    FIELDS_BEFORE_CORE = 37  # of /proc/PID/stat, after the name of the command; the core is field 39 of all

ctypedef struct CallerCore:  # zeros: not begun
    bint begun
    cpu_set_t allowed
    bint useful  # whether there is a choice
    uint32_t requests  # since the last look


cdef inline void begin_to_follow(CallerCore *follow) noexcept nogil:
    """In the thread that is to follow."""
    setpriority(PRIO_PROCESS, 0, HIGHEST_PRIORITY)  # 0: this thread
    follow.begun = True
    follow.useful = sched_getaffinity(0, sizeof(cpu_set_t), &follow.allowed) == 0 and CPU_COUNT(&follow.allowed) > 1


cdef inline int core_of(uint32_t thread) noexcept nogil:
    """Where a thread of this machine ran last; -1: not known."""
    cdef char text[STAT_BYTES]
    cdef const char *at
    cdef int fd, field = 0
    cdef ssize_t got
    snprintf(text, STAT_BYTES, "/proc/%u/stat", thread)
    fd = open(text, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return -1
    got = read(fd, text, STAT_BYTES - 1)
    close(fd)
    text[max(got, 0)] = 0
    at = strrchr(text, c")")
    while at != NULL and at[0] and field < FIELDS_BEFORE_CORE:
        at += 1
        field += at[0] == c" "
    return atoi(at + 1) if at != NULL and at[0] else -1


cdef inline int core_to_follow(CallerCore *follow, uint32_t caller) noexcept nogil:
    """Before the answer to a request of thread `caller`, while it sleeps: now and then, the core where it does; else -1: stay."""
    cdef int core
    if not follow.begun:
        begin_to_follow(follow)
    follow.requests += 1
    if not follow.useful or not caller or follow.requests < LOOK_EVERY:
        return -1
    follow.requests = 0
    core = core_of(caller)
    return core if core >= 0 and core != sched_getcpu() and CPU_ISSET(core, &follow.allowed) else -1


cdef inline void move_to(CallerCore *follow, int core) noexcept nogil:
    """After the answer: a caller that is woken by a thread on its own core goes to another one that is idle."""
    cdef cpu_set_t one
    if core < 0:
        return
    CPU_ZERO(&one)
    CPU_SET(core, &one)
    if sched_setaffinity(0, sizeof(cpu_set_t), &one) == 0:
        sched_setaffinity(0, sizeof(cpu_set_t), &follow.allowed)
