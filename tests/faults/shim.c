// Stands between a process and the C library (LD_PRELOAD) for files below given folders: records what changes them, makes calls fail.
//
// Owns: the log of mutations and the counting of calls. Knows paths and descriptors, nothing of what the bytes mean. It sees the calls
// of CPython, of libsqlite3 and of the compiled kernels alike. Environment:
//   FAULTS_ROOTS    folders, separated by ':'; files elsewhere pass untouched
//   FAULTS_LOG      a file that gets one record for each mutation (struct entry, path, data): recording
//   FAULTS_CONTROL  a file that holds struct control, mapped shared: injection, steered by whoever maps it
// Invariants: (1) The log is in the order in which the calls took effect: one lock is held around a call and its record. (2) A call that
// failed is not in the log. (3) A call that is made to fail has no effect.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN, CREATE, READ, WRITE, TRUNCATE, SYNC, RENAME, UNLINK, LINK, MKDIR, PUNCH, SEND, MARK };  // PUNCH: any fallocate
enum tier { NONE, EXTENTS, PARKING, INDEX, IDENTITY, MEMORY, FOLDER };
enum mode { OFF, FAIL, SHORT, DELAY };

#define TRACE_MAX 65536
struct control {
    uint64_t kinds, tiers;        // bit masks of the calls that are counted
    int64_t fire_at, fire_count;  // which of them fail: from the fire_at-th (0 is the first) on, fire_count of them
    int32_t mode, error;          // enum mode; the errno of FAIL
    uint64_t delay_us;            // of DELAY
    uint64_t seen, fired;         // calls counted; calls changed
    uint8_t trace[TRACE_MAX];     // kind << 3 | tier of each counted call
};

struct entry {
    uint32_t kind, path_bytes, data_bytes, pad;
    uint64_t inode;  // of the file that is changed; of the new file for CREATE, LINK and MKDIR
    int64_t offset, length;
};

#define FDS 65536
static struct { uint8_t tier; } files[FDS];
static char *roots[8];
static int root_count, log_fd = -1;
static struct control *control;
static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

#define REAL(name) ((__typeof__(&name))real_##name)
#define DECLARE(name) static void *real_##name
DECLARE(open64); DECLARE(openat64); DECLARE(close); DECLARE(read); DECLARE(write); DECLARE(pread64); DECLARE(pwrite64);
DECLARE(preadv64); DECLARE(preadv64v2); DECLARE(pwritev64); DECLARE(ftruncate64); DECLARE(truncate64); DECLARE(fsync);
DECLARE(fdatasync); DECLARE(rename); DECLARE(unlink); DECLARE(link); DECLARE(mkdir); DECLARE(fallocate64); DECLARE(sendfile64);

__attribute__((constructor)) static void start(void) {
#define FIND(name) real_##name = dlsym(RTLD_NEXT, #name)
    FIND(open64); FIND(openat64); FIND(close); FIND(read); FIND(write); FIND(pread64); FIND(pwrite64);
    FIND(preadv64); FIND(preadv64v2); FIND(pwritev64); FIND(ftruncate64); FIND(truncate64); FIND(fsync);
    FIND(fdatasync); FIND(rename); FIND(unlink); FIND(link); FIND(mkdir); FIND(fallocate64); FIND(sendfile64);
    char *list = getenv("FAULTS_ROOTS"), *path = getenv("FAULTS_LOG"), *steering = getenv("FAULTS_CONTROL"), *rest = NULL;
    if (!list) return;
    list = strdup(list);
    for (char *root = strtok_r(list, ":", &rest); root && root_count < 8; root = strtok_r(NULL, ":", &rest)) roots[root_count++] = root;
    if (path) log_fd = REAL(open64)(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    int fd = steering ? REAL(open64)(steering, O_RDWR | O_CLOEXEC) : -1;
    if (fd >= 0) {
        control = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (control == MAP_FAILED) control = NULL;
        REAL(close)(fd);
    }
}

static enum tier tier_of(const char *path) {
    for (int i = 0; i < root_count; i++) {
        size_t n = strlen(roots[i]);
        if (strncmp(path, roots[i], n) || (path[n] && path[n] != '/')) continue;
        const char *rest = path + n;
        if (strstr(rest, "/cascadefs.log")) return NONE;
        if (strstr(rest, "/cascadefs-")) return MEMORY;
        if (strstr(rest, "/extents/")) return EXTENTS;
        if (strstr(rest, "/parking/")) return PARKING;
        if (strstr(rest, "/index.db")) return INDEX;
        if (strstr(rest, "/store.")) return IDENTITY;
        return FOLDER;
    }
    return NONE;
}

static enum tier tier_of_fd(int fd) { return fd >= 0 && fd < FDS ? files[fd].tier : NONE; }

static void take_tier(int fd, const char *path) {
    int other;
    if (fd < 0 || fd >= FDS) return;
    files[fd].tier = sscanf(path, "/proc/self/fd/%d", &other) == 1 ? tier_of_fd(other) : tier_of(path);
}

// Count a call; -1 with errno when it is to fail. `count` (may be NULL) is cut for a short transfer.
static int meet(enum kind kind, enum tier tier, size_t *count) {
    if (!control || tier == NONE || !(control->kinds >> kind & 1) || !(control->tiers >> tier & 1)) return 0;
    if (control->mode == SHORT && (!count || *count < 2)) return 0;  // there is nothing to cut
    uint64_t at = __atomic_fetch_add(&control->seen, 1, __ATOMIC_SEQ_CST);
    if (at < TRACE_MAX) control->trace[at] = kind << 3 | tier;
    if (control->mode == OFF || (int64_t)at < control->fire_at || (int64_t)at >= control->fire_at + control->fire_count) return 0;
    if (control->mode == SHORT) *count = *count >= 1024 ? (*count / 2) & ~(size_t)511 : *count / 2;
    __atomic_fetch_add(&control->fired, 1, __ATOMIC_SEQ_CST);
    if (control->mode == DELAY) usleep(control->delay_us);
    if (control->mode != FAIL) return 0;
    errno = control->error;
    return -1;
}

static uint64_t inode_of(int fd) {
    struct stat64 found;
    return fstat64(fd, &found) ? 0 : found.st_ino;
}

static uint64_t inode_at(const char *path) {
    struct stat64 found;
    return lstat64(path, &found) ? 0 : found.st_ino;
}

static void note(enum kind kind, uint64_t inode, const char *path, const void *data, size_t bytes, int64_t offset, int64_t length) {
    struct entry entry = {kind, path ? strlen(path) : 0, bytes, 0, inode, offset, length};
    struct iovec parts[] = {{&entry, sizeof entry}, {(void *)path, entry.path_bytes}, {(void *)data, bytes}};
    if ((size_t)syscall(SYS_writev, log_fd, parts, 3) != sizeof entry + entry.path_bytes + bytes) abort();
}

// GUARDED(tier, call, record): the call and, when it worked and somebody records, its record, as one step.
#define GUARDED(tier, call, record) ({ \
    int recording_ = log_fd >= 0 && (tier) != NONE; \
    if (recording_) pthread_mutex_lock(&lock); \
    __typeof__(call) result_ = (call); \
    int saved_ = errno; \
    if (recording_ && result_ >= 0) { __typeof__(result_) result = result_; (void)result; record; } \
    if (recording_) pthread_mutex_unlock(&lock); \
    errno = saved_; \
    result_; })

// A line of the recorder's own in the log: what the application was told so far.
void faults_mark(const char *text) {
    pthread_mutex_lock(&lock);
    if (log_fd >= 0) note(MARK, 0, NULL, text, strlen(text), 0, 0);
    pthread_mutex_unlock(&lock);
}

static int open_file(int folder, const char *path, int flags, mode_t mode) {
    enum tier tier = tier_of(path);
    if (tier == NONE && strncmp(path, "/proc/self/fd/", 14)) return REAL(openat64)(folder, path, flags, mode);
    int creates = flags & O_CREAT && tier != NONE && access(path, F_OK);
    if (meet(creates ? CREATE : OPEN, tier, NULL)) return -1;
    int fd = GUARDED(tier, REAL(openat64)(folder, path, flags, mode), {
        if (creates) note(CREATE, inode_of(result), path, NULL, 0, 0, 0);
        else if (flags & O_TRUNC) note(TRUNCATE, inode_of(result), path, NULL, 0, 0, 0);
    });
    take_tier(fd, path);
    return fd;
}

static mode_t mode_of(int flags, va_list rest) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; }

#define OPENER(name) int name(const char *path, int flags, ...) { \
    va_list rest; va_start(rest, flags); mode_t mode = mode_of(flags, rest); va_end(rest); return open_file(AT_FDCWD, path, flags, mode); }
OPENER(open)
OPENER(open64)
#define OPENER_AT(name) int name(int folder, const char *path, int flags, ...) { \
    va_list rest; va_start(rest, flags); mode_t mode = mode_of(flags, rest); va_end(rest); return open_file(folder, path, flags, mode); }
OPENER_AT(openat)
OPENER_AT(openat64)

int close(int fd) {
    if (fd >= 0 && fd < FDS) files[fd].tier = NONE;
    return REAL(close)(fd);
}

ssize_t read(int fd, void *data, size_t count) {
    return meet(READ, tier_of_fd(fd), &count) ? -1 : REAL(read)(fd, data, count);
}

ssize_t pread64(int fd, void *data, size_t count, off64_t offset) {
    return meet(READ, tier_of_fd(fd), &count) ? -1 : REAL(pread64)(fd, data, count, offset);
}
ssize_t pread(int fd, void *data, size_t count, off_t offset) { return pread64(fd, data, count, offset); }

// Of a vector of one part, which is all that cascadefs uses, a shorter one is made; longer vectors are counted, never cut.
static ssize_t read_vector(int fd, const struct iovec *parts, int n, off64_t offset, int flags) {
    struct iovec cut = parts[0];
    if (meet(READ, tier_of_fd(fd), n == 1 ? &cut.iov_len : NULL)) return -1;
    return REAL(preadv64v2)(fd, n == 1 ? &cut : parts, n, offset, flags);
}
ssize_t preadv(int fd, const struct iovec *parts, int n, off_t offset) { return read_vector(fd, parts, n, offset, 0); }
ssize_t preadv64(int fd, const struct iovec *parts, int n, off64_t offset) { return read_vector(fd, parts, n, offset, 0); }
ssize_t preadv2(int fd, const struct iovec *parts, int n, off_t offset, int flags) { return read_vector(fd, parts, n, offset, flags); }
ssize_t preadv64v2(int fd, const struct iovec *parts, int n, off64_t offset, int flags) { return read_vector(fd, parts, n, offset, flags); }

ssize_t pwrite64(int fd, const void *data, size_t count, off64_t offset) {
    enum tier tier = tier_of_fd(fd);
    if (meet(WRITE, tier, &count)) return -1;
    return GUARDED(tier, REAL(pwrite64)(fd, data, count, offset), note(WRITE, inode_of(fd), NULL, data, result, offset, result));
}
ssize_t pwrite(int fd, const void *data, size_t count, off_t offset) { return pwrite64(fd, data, count, offset); }

ssize_t write(int fd, const void *data, size_t count) {
    enum tier tier = tier_of_fd(fd);
    if (tier == NONE) return REAL(write)(fd, data, count);
    if (meet(WRITE, tier, &count)) return -1;
    return GUARDED(tier, REAL(write)(fd, data, count),
                   note(WRITE, inode_of(fd), NULL, data, result, lseek64(fd, 0, SEEK_CUR) - result, result));
}

// cascadefs writes no vectors; who does must not escape the record unseen.
ssize_t pwritev64(int fd, const struct iovec *parts, int n, off64_t offset) {
    if (tier_of_fd(fd) != NONE) abort();
    return REAL(pwritev64)(fd, parts, n, offset);
}
ssize_t pwritev(int fd, const struct iovec *parts, int n, off_t offset) { return pwritev64(fd, parts, n, offset); }

int ftruncate64(int fd, off64_t length) {
    enum tier tier = tier_of_fd(fd);
    if (meet(TRUNCATE, tier, NULL)) return -1;
    return GUARDED(tier, REAL(ftruncate64)(fd, length), note(TRUNCATE, inode_of(fd), NULL, NULL, 0, 0, length));
}
int ftruncate(int fd, off_t length) { return ftruncate64(fd, length); }

int truncate64(const char *path, off64_t length) {
    enum tier tier = tier_of(path);
    if (meet(TRUNCATE, tier, NULL)) return -1;
    return GUARDED(tier, REAL(truncate64)(path, length), note(TRUNCATE, inode_at(path), NULL, NULL, 0, 0, length));
}
int truncate(const char *path, off_t length) { return truncate64(path, length); }

static int sync_with(int (*how)(int), int fd) {
    enum tier tier = tier_of_fd(fd);
    if (meet(SYNC, tier, NULL)) return -1;
    return GUARDED(tier, how(fd), note(SYNC, inode_of(fd), NULL, NULL, 0, 0, 0));
}
int fsync(int fd) { return sync_with(REAL(fsync), fd); }
int fdatasync(int fd) { return sync_with(REAL(fdatasync), fd); }

int rename(const char *old, const char *new) {
    enum tier tier = tier_of(new);
    if (meet(RENAME, tier, NULL)) return -1;
    return GUARDED(tier, REAL(rename)(old, new), note(RENAME, 0, old, new, strlen(new), 0, 0));
}

int unlink(const char *path) {
    enum tier tier = tier_of(path);
    if (meet(UNLINK, tier, NULL)) return -1;
    return GUARDED(tier, REAL(unlink)(path), note(UNLINK, 0, path, NULL, 0, 0, 0));
}

int link(const char *old, const char *new) {
    enum tier tier = tier_of(new);
    if (meet(LINK, tier, NULL)) return -1;
    return GUARDED(tier, REAL(link)(old, new), note(LINK, inode_at(new), new, NULL, 0, 0, 0));
}

int mkdir(const char *path, mode_t mode) {
    enum tier tier = tier_of(path);
    if (meet(MKDIR, tier, NULL)) return -1;
    return GUARDED(tier, REAL(mkdir)(path, mode), note(MKDIR, inode_at(path), path, NULL, 0, 0, 0));
}

int fallocate64(int fd, int mode, off64_t offset, off64_t length) {
    enum tier tier = tier_of_fd(fd);
    if (meet(PUNCH, tier, NULL)) return -1;
    return GUARDED(tier, REAL(fallocate64)(fd, mode, offset, length), note(PUNCH, inode_of(fd), NULL, NULL, 0, offset, length));
}
int fallocate(int fd, int mode, off_t offset, off_t length) { return fallocate64(fd, mode, offset, length); }

// Allocation alone: what the file holds is not changed by it, but its size; the log has that.
int posix_fallocate64(int fd, off64_t offset, off64_t length) {
    enum tier tier = tier_of_fd(fd);
    if (meet(PUNCH, tier, NULL)) return errno;
    int saved = errno, code = 0;
    if (GUARDED(tier, REAL(fallocate64)(fd, 0, offset, length), note(TRUNCATE, inode_of(fd), NULL, NULL, 0, 0, offset + length)))
        code = errno;
    errno = saved;
    return code;
}
int posix_fallocate(int fd, off_t offset, off_t length) { return posix_fallocate64(fd, offset, length); }

// What was sent is read back from the source, so that the log has the bytes.
static void note_sent(int to, int from, int64_t start, ssize_t count) {
    char *data = malloc(count ? count : 1);
    if (!data || REAL(pread64)(from, data, count, start) != count) abort();
    note(WRITE, inode_of(to), NULL, data, count, lseek64(to, 0, SEEK_CUR) - count, count);
    free(data);
}

ssize_t sendfile64(int to, int from, off64_t *offset, size_t count) {
    enum tier tier = tier_of_fd(to);
    int64_t start = offset ? *offset : lseek64(from, 0, SEEK_CUR);
    if (meet(SEND, tier, &count)) return -1;
    return GUARDED(tier, REAL(sendfile64)(to, from, offset, count), note_sent(to, from, start, result));
}
ssize_t sendfile(int to, int from, off_t *offset, size_t count) { return sendfile64(to, from, offset, count); }
