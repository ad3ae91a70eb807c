# Memory for files that are being written, allocated before their writers need it: it is charged to the memory cgroup of whoever
# allocates, and a writer in a small one would be killed for pages that it cannot give back. Also sees who writes with gaps.
#
# Owns: the files that are open for writing as far as they are watched, what files of a folder grew to, who lives in another memory
# cgroup than we do. Only for those writers anything is allocated. A .pxd of inline functions, compiled into fuse_transport.
# Invariants: (1) The mutex is held for a few memory accesses only, never during a system call. (2) What is allocated lies behind
# the end of a file, so nobody sees it; Python gives it back when the file is sealed. (3) At most `room` bytes are allocated until
# Python says how much more may be. (4) A file is watched until its RELEASE, and its handle borrowed while it is looked at.

from cython_ext.transport.doorbell cimport Doorbell, bell_ring
from cython_ext.transport.handle_table cimport (
    Handle, HandleTable, handles_borrow, handles_return, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init,
    pthread_cond_t, pthread_cond_wait, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_unlock)
from cython_ext.transport.positioned_io cimport allocate_range
from cython_ext.transport.reader_scheduling cimport HIGHEST_PRIORITY, PRIO_PROCESS, setpriority
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memset, strchr, strcmp, strstr
from posix.fcntl cimport O_CLOEXEC, O_RDONLY, open
from posix.stat cimport fstat, struct_stat
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport close, read

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int microseconds)

cdef enum:
    WATCHED_MAX = 256  # a file whose place is taken is not watched
    FOLDERS = 256
    CALLERS = 64
    GAPS_MAX = 64
    CGROUP_BYTES = 512
    TEXT_BYTES = 4096
    FIRST_BYTES = 16 << 20  # of a file in a folder that we know nothing of: 40 us
    CREATE_BYTES_MAX = 64 << 20  # 180 us
    AHEAD_MIN = 64 << 20  # its writer holds the lock of the file most of the time: we get it after 4 ms, or 40 MB
    AHEAD_MAX = 256 << 20
    AHEAD_SLOW = 1 << 20  # hundreds may be open that grow little by little: none of them takes what the others need
    LOOKS_AHEAD = 32
    CREATE_SHARE = 8  # of the room that is left
    GROWTH_SHARE = 2
    PAGE_BYTES = 4096
    KEEP_SIZE = 1
    TOLD_MS = 1000  # a process that moves to another cgroup is seen this much later
    GROWING_US = 500  # a writer of 10 GB/s takes 5 MB meanwhile
    RESTING_US = 5000
    REST_ROUNDS = 200  # without growth, then it looks less often; without a file, then it sleeps until there is one


ctypedef struct Watched:
    uint64_t fh  # 0: none
    uint64_t ino
    uint32_t folder  # FOLDERS: it was not made just now, and teaches nothing of others
    bint foreign
    bint gaps_told
    int64_t allocated  # as far as we did
    int64_t expected  # size, as of others in its folder; 0: not known
    int64_t seen  # size at the last look

ctypedef struct Caller:
    uint32_t pid
    bint foreign
    int64_t until_ms

ctypedef struct AheadTable:
    pthread_mutex_t mutex
    pthread_cond_t came
    Watched files[WATCHED_MAX]
    uint32_t count
    int64_t learned[FOLDERS]  # by folder; 0: nothing yet
    int64_t last_learned
    int64_t room
    char own[CGROUP_BYTES]  # empty: not known, then nobody is foreign
    Caller callers[CALLERS]
    bint any_foreign
    bint stopping
    uint64_t gaps[GAPS_MAX]  # inodes
    uint32_t gap_count


cdef inline int64_t milliseconds() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return <int64_t>time.tv_sec * 1000 + time.tv_nsec // 1000000


cdef inline bint cgroup_in(char *text, char *out) noexcept nogil:
    """The memory cgroup in the text of /proc/PID/cgroup: of the v1 hierarchy that has it, else of v2."""
    cdef char *line = text
    cdef char *end
    cdef char *controllers
    cdef char *path
    cdef char *memory
    cdef char *found = NULL
    while line != NULL and line[0]:
        end = strchr(line, c"\n")
        if end != NULL:
            end[0] = 0
        controllers = strchr(line, c":")
        path = strchr(controllers + 1, c":") if controllers != NULL else NULL
        if path != NULL:
            memory = strstr(controllers + 1, b"memory")
            if memory != NULL and memory < path:
                found = path + 1
                break
            if controllers + 1 == path:
                found = path + 1
        line = end + 1 if end != NULL else NULL
    if found == NULL:
        return False
    snprintf(out, CGROUP_BYTES, "%s", found)
    return True


cdef inline bint read_cgroup(uint32_t pid, char *out) noexcept nogil:
    """Of a thread that we can see; 0: ours."""
    cdef char text[TEXT_BYTES]
    cdef ssize_t got
    cdef int fd
    if pid:
        snprintf(text, TEXT_BYTES, "/proc/%u/cgroup", pid)
    else:
        snprintf(text, TEXT_BYTES, "/proc/self/cgroup")
    fd = open(text, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return False
    got = read(fd, text, TEXT_BYTES - 1)
    close(fd)
    text[max(got, 0)] = 0
    return cgroup_in(text, out)


cdef inline void ahead_init(AheadTable *table) noexcept nogil:
    memset(table, 0, sizeof(AheadTable))
    pthread_mutex_init(&table.mutex, NULL)
    pthread_cond_init(&table.came, NULL)
    if not read_cgroup(0, table.own):
        table.own[0] = 0


cdef inline void ahead_free(AheadTable *table) noexcept nogil:
    pthread_cond_destroy(&table.came)
    pthread_mutex_destroy(&table.mutex)


cdef inline bint is_foreign(AheadTable *table, uint32_t pid) noexcept nogil:
    """Whether a caller pays from another memory cgroup. 0: it lives in another pid namespace."""
    cdef char theirs[CGROUP_BYTES]
    cdef Caller *caller = &table.callers[pid % CALLERS]
    cdef int64_t now
    cdef bint found
    if not table.own[0]:
        return False
    now = milliseconds()
    pthread_mutex_lock(&table.mutex)
    found = caller.pid == pid and now < caller.until_ms
    if found:
        found = caller.foreign
        pthread_mutex_unlock(&table.mutex)
        return found
    pthread_mutex_unlock(&table.mutex)
    found = not pid or (read_cgroup(pid, theirs) and strcmp(theirs, table.own) != 0)
    pthread_mutex_lock(&table.mutex)
    caller.pid, caller.foreign, caller.until_ms = pid, found, now + TOLD_MS
    table.any_foreign = table.any_foreign or found
    pthread_mutex_unlock(&table.mutex)
    return found


cdef inline int64_t first_part(AheadTable *table, Watched *file) noexcept nogil:
    """How much to allocate for a new file, taken off the room; 0: nothing."""
    cdef int64_t size
    pthread_mutex_lock(&table.mutex)
    file.expected = table.learned[file.folder] or table.last_learned
    size = min(file.expected or FIRST_BYTES, CREATE_BYTES_MAX, table.room // CREATE_SHARE)
    size = 0 if size < PAGE_BYTES else size
    table.room -= size
    pthread_mutex_unlock(&table.mutex)
    return size


cdef inline void watch(AheadTable *table, const Watched *file) noexcept nogil:
    cdef Watched *place = &table.files[file.fh % WATCHED_MAX]
    pthread_mutex_lock(&table.mutex)
    if not place.fh:
        place[0] = file[0]
        table.count += 1
        if table.count == 1:
            pthread_cond_broadcast(&table.came)
    pthread_mutex_unlock(&table.mutex)


cdef inline void ahead_opened(AheadTable *table, uint64_t ino, uint64_t fh, bint foreign) noexcept nogil:
    """A file was opened for writing, by a handle that the handle table knows."""
    cdef Watched file
    memset(&file, 0, sizeof(file))
    file.fh, file.ino, file.folder, file.foreign = fh, ino, FOLDERS, foreign
    watch(table, &file)


cdef inline void ahead_created(
        AheadTable *table, uint64_t folder, bint foreign, uint64_t ino, uint64_t fh, int fd) noexcept nogil:
    """The same of a new file, which nobody has written to: what it will probably need is allocated."""
    cdef Watched file
    memset(&file, 0, sizeof(file))
    file.fh, file.ino, file.folder, file.foreign = fh, ino, <uint32_t>(folder % FOLDERS), foreign
    if file.foreign:
        file.allocated = first_part(table, &file)
        if file.allocated and allocate_range(fd, KEEP_SIZE, 0, file.allocated):
            file.allocated = 0
    watch(table, &file)


cdef inline void ahead_released(AheadTable *table, uint64_t fh, int fd) noexcept nogil:
    """A handle has gone; `fd` is still its file, or -1."""
    cdef Watched *place = &table.files[fh % WATCHED_MAX]
    cdef struct_stat state
    cdef int64_t size = -1
    if place.fh != fh:
        return
    if place.foreign and fd >= 0 and fstat(fd, &state) == 0:
        size = state.st_size
    pthread_mutex_lock(&table.mutex)
    if place.fh == fh:
        if size >= 0 and place.folder < FOLDERS:
            table.learned[place.folder] = table.last_learned = max(size, 1)
        place.fh = 0
        table.count -= 1
    pthread_mutex_unlock(&table.mutex)


cdef inline int64_t take_room(AheadTable *table, int64_t wanted) noexcept nogil:
    """As much of it as one file may have."""
    cdef int64_t found
    pthread_mutex_lock(&table.mutex)
    found = max(min(wanted, table.room // GROWTH_SHARE), 0)
    table.room -= found
    pthread_mutex_unlock(&table.mutex)
    return found


cdef inline void tell_gaps(AheadTable *table, uint64_t ino) noexcept nogil:
    pthread_mutex_lock(&table.mutex)
    if table.gap_count < GAPS_MAX:
        table.gaps[table.gap_count] = ino
        table.gap_count += 1
    pthread_mutex_unlock(&table.mutex)


cdef inline bint outgrows(const Watched *file, int64_t size) noexcept nogil:
    """Whether a file needs more than it got at its creation: it is longer than others were, or that was not enough for them."""
    if size <= file.expected and file.expected <= file.allocated:
        return False
    return size > file.allocated // 2


cdef inline int64_t far_ahead(int64_t size, int64_t growth) noexcept nogil:
    """How far to allocate ahead of a file that has grown so much since the last look."""
    return min(max(growth * LOOKS_AHEAD, AHEAD_SLOW), max(size, AHEAD_MIN), AHEAD_MAX)


cdef inline bint look_at(AheadTable *table, HandleTable *handles, Watched *file) noexcept nogil:
    """At one file, a copy of whose entry is `file`; whether it has grown."""
    cdef Handle *handle = handles_borrow(handles, file.fh)
    cdef struct_stat state
    cdef int64_t size, wanted, start
    cdef bint grown = False
    if handle == NULL:
        return False
    if handle.fd >= 0 and fstat(handle.fd, &state) == 0:
        size = state.st_size
        grown = size != file.seen
        wanted = far_ahead(size, size - file.seen)
        file.seen = size
        if not file.gaps_told and size - state.st_blocks * 512 >= PAGE_BYTES:
            file.gaps_told = True
            tell_gaps(table, file.ino)
        elif file.foreign and grown:
            start = max(file.allocated, size)
            if outgrows(file, size) and size + wanted // 2 > start:
                wanted = take_room(table, size + wanted - start)
                if wanted and not allocate_range(handle.fd, KEEP_SIZE, start, wanted):
                    file.allocated = start + wanted
    handles_return(handles, handle)
    return grown and file.foreign


cdef inline bint look_at_all(AheadTable *table, HandleTable *handles) noexcept nogil:
    """Whether one has grown that we allocate for."""
    cdef Watched file
    cdef Watched *place
    cdef bint grown = False
    cdef int at
    for at in range(WATCHED_MAX):
        place = &table.files[at]
        if not place.fh:
            continue
        pthread_mutex_lock(&table.mutex)
        file = place[0]
        pthread_mutex_unlock(&table.mutex)
        if file.fh and look_at(table, handles, &file):
            grown = True
        pthread_mutex_lock(&table.mutex)
        if place.fh == file.fh and file.fh:
            place[0] = file
        pthread_mutex_unlock(&table.mutex)
    return grown


cdef inline bint ahead_gap(AheadTable *table, uint64_t *ino) noexcept nogil:
    """The inode of a file that is written with gaps, once; False: no more."""
    cdef bint found
    pthread_mutex_lock(&table.mutex)
    found = table.gap_count > 0
    if found:
        table.gap_count -= 1
        ino[0] = table.gaps[table.gap_count]
    pthread_mutex_unlock(&table.mutex)
    return found


cdef inline list gaps_taken(AheadTable *table):
    """All of them."""
    cdef uint64_t ino
    found = []
    while ahead_gap(table, &ino):
        found.append(ino)
    return found


cdef inline void ahead_watch(AheadTable *table, HandleTable *handles, Doorbell *bell) noexcept nogil:
    """Until ahead_stop(). Rings when Python has to hear of gaps, or to allow more."""
    cdef int rounds = 0, quiet = 0
    cdef bint grown
    setpriority(PRIO_PROCESS, 0, HIGHEST_PRIORITY)  # as the reader has: this thread must be ahead of those who write
    while not table.stopping:
        grown = look_at_all(table, handles)
        if grown or table.gap_count:
            bell_ring(bell)
        rounds = 0 if table.count else rounds + 1
        if rounds > REST_ROUNDS:
            pthread_mutex_lock(&table.mutex)
            while not table.count and not table.stopping:
                pthread_cond_wait(&table.came, &table.mutex)
            pthread_mutex_unlock(&table.mutex)
            rounds = 0
        quiet = 0 if grown else quiet + 1
        usleep(GROWING_US if table.any_foreign and table.count and quiet < REST_ROUNDS else RESTING_US)


cdef inline void ahead_stop(AheadTable *table) noexcept nogil:
    pthread_mutex_lock(&table.mutex)
    table.stopping = True
    pthread_cond_broadcast(&table.came)
    pthread_mutex_unlock(&table.mutex)
