# The entries of a folder as the kernel reads them, packed inside SQLite: an aggregate function turns rows into the body of one
# answer to READDIRPLUS. A row as Python objects costs four times what SQLite needs to find it.
#
# Owns: struct fuse_direntplus. Knows no folder and no handle; the rows are its caller's. Invariants:
# (1) Rows come with ascending cookies, or the statement fails. (2) An entry is whole or not there, and so are those after it.
# (3) Until renewed() has been there, `attr_valid_nsec` of a staged file is its home: a nanosecond or two to the kernel.
# (4) No byte of a blob is left as the allocator gave it.

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cython_ext.fuse_abi cimport BLOCK_BYTES, FOLDER_BLOCK_BYTES, MODE_FOLDER, MODE_FORMAT, SETTLED_S, STAGED_S, fuse_attr
from libc.errno cimport ENOENT, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t, uint8_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy, memset

from os import strerror

cdef extern from "<sqlite3.h>" nogil:
    ctypedef struct sqlite3:
        pass
    ctypedef struct sqlite3_context:
        pass
    ctypedef struct sqlite3_value:
        pass
    int SQLITE_OK
    int SQLITE_UTF8
    int sqlite3_auto_extension(void (*entry)() noexcept nogil)
    int sqlite3_create_function(
        sqlite3 *db, const char *name, int arguments, int flags, void *app, void *scalar,
        void (*step)(sqlite3_context *, int, sqlite3_value **) noexcept nogil, void (*final)(sqlite3_context *) noexcept nogil)
    void *sqlite3_aggregate_context(sqlite3_context *context, int size)
    int64_t sqlite3_value_int64(sqlite3_value *value)
    const void *sqlite3_value_blob(sqlite3_value *value)
    int sqlite3_value_bytes(sqlite3_value *value)
    void sqlite3_result_blob(sqlite3_context *context, const void *blob, int size, void (*destroy)(void *) noexcept nogil)
    void sqlite3_result_error(sqlite3_context *context, const char *text, int size)
    void sqlite3_result_error_nomem(sqlite3_context *context)
    void sqlite3_result_zeroblob(sqlite3_context *context, int size)
    void *sqlite3_malloc(int size)
    void sqlite3_free(void *memory) noexcept

cdef extern from "<sys/stat.h>" nogil:
    ctypedef struct timespec:
        int64_t tv_sec
        long tv_nsec
    ctypedef struct status "struct stat":
        int64_t st_size
        int64_t st_blocks
        timespec st_mtim
    int lstat(const char *path, status *found)

cdef enum:
    PATH_BYTES = 4096
    NS = 1000000000
    ARGUMENTS = 15
    AFTER_DOTS = 2
    HOME_COLD = 2  # types.py

cdef bint files_are_padded = False

ctypedef struct DirentPlus:  # struct fuse_direntplus: an entry reply and a struct fuse_dirent, whose name follows
    uint64_t nodeid
    uint64_t generation
    uint64_t entry_valid
    uint64_t attr_valid
    uint32_t entry_valid_nsec
    uint32_t attr_valid_nsec
    fuse_attr attr
    uint64_t ino
    uint64_t off
    uint32_t namelen
    uint32_t type

ctypedef struct Packing:
    uint8_t *entries
    int used, room
    int64_t last
    bint full

DOTS = AFTER_DOTS  # positions 1 and 2 are those after the dots, then come the cookies with so much added
FUNCTION = "direntplus"
ENTRY_BYTES = sizeof(DirentPlus) + 8  # the least that an entry with a name takes


cdef inline size_t entry_bytes(size_t name_bytes) noexcept nogil:
    return (sizeof(DirentPlus) + name_bytes + 7) & ~<size_t>7


cdef inline void put_time(int64_t time_ns, uint64_t *seconds, uint32_t *rest) noexcept nogil:
    """Rounded down, before 1970, too: Cython divides as Python does."""
    seconds[0], rest[0] = <uint64_t>(time_ns // NS), <uint32_t>(time_ns % NS)


cdef inline int64_t time_of(uint64_t seconds, uint32_t rest) noexcept nogil:
    return <int64_t>seconds * NS + rest


cdef void fill(DirentPlus *entry, sqlite3_value **of) noexcept nogil:
    """From the arguments behind the name. The kernel's names of these fields are those of struct stat."""
    cdef fuse_attr *attr = &entry.attr
    cdef uint32_t home = <uint32_t>sqlite3_value_int64(of[10])
    entry.nodeid = entry.ino = attr.ino = <uint64_t>sqlite3_value_int64(of[0])
    attr.mode, attr.uid = <uint32_t>sqlite3_value_int64(of[1]), <uint32_t>sqlite3_value_int64(of[2])
    attr.gid, attr.nlink = <uint32_t>sqlite3_value_int64(of[3]), <uint32_t>sqlite3_value_int64(of[4])
    attr.rdev, attr.size = <uint32_t>sqlite3_value_int64(of[5]), <uint64_t>sqlite3_value_int64(of[6])
    put_time(sqlite3_value_int64(of[7]), &attr.atime, &attr.atimensec)
    put_time(sqlite3_value_int64(of[8]), &attr.mtime, &attr.mtimensec)
    put_time(sqlite3_value_int64(of[9]), &attr.ctime, &attr.ctimensec)
    attr.blocks, attr.blksize = <uint64_t>sqlite3_value_int64(of[11]), BLOCK_BYTES
    if attr.mode & MODE_FORMAT == MODE_FOLDER:
        attr.blksize = FOLDER_BLOCK_BYTES
    entry.entry_valid, entry.attr_valid = SETTLED_S, STAGED_S if home else SETTLED_S
    entry.attr_valid_nsec = home
    entry.type = (attr.mode & MODE_FORMAT) >> 12


cdef void step(sqlite3_context *context, int count, sqlite3_value **of) noexcept nogil:
    """(room in bytes, cookie, name, ino, mode, uid, gid, nlink, rdev, size, atime_ns, mtime_ns, ctime_ns, home, blocks)"""
    cdef Packing *packing = <Packing *>sqlite3_aggregate_context(context, sizeof(Packing))
    cdef int64_t cookie = sqlite3_value_int64(of[1])
    cdef size_t name_bytes = <size_t>sqlite3_value_bytes(of[2]), size = entry_bytes(name_bytes)
    cdef DirentPlus *entry
    if packing == NULL:
        sqlite3_result_error_nomem(context)
        return
    if packing.entries == NULL and not packing.full:
        packing.room = <int>sqlite3_value_int64(of[0])
        packing.entries = <uint8_t *>sqlite3_malloc(max(packing.room, 1))
        if packing.entries == NULL:
            packing.full = True
            sqlite3_result_error_nomem(context)
            return
    elif cookie <= packing.last:
        sqlite3_result_error(context, b"entries out of order", -1)
        return
    packing.last = cookie
    packing.full = packing.full or packing.used + <int>size > packing.room
    if packing.full:
        return
    entry = <DirentPlus *>(packing.entries + packing.used)
    memset(entry, 0, size)
    entry.off, entry.namelen = <uint64_t>cookie + AFTER_DOTS, <uint32_t>name_bytes
    memcpy(entry + 1, sqlite3_value_blob(of[2]), name_bytes)
    fill(entry, of + 3)
    packing.used += <int>size


cdef void final(sqlite3_context *context) noexcept nogil:
    cdef Packing *packing = <Packing *>sqlite3_aggregate_context(context, 0)
    if packing == NULL or packing.entries == NULL:
        sqlite3_result_zeroblob(context, 0)
    else:
        sqlite3_result_blob(context, packing.entries, packing.used, sqlite3_free)


cdef int register(sqlite3 *db, char **why, const void *routines) noexcept nogil:
    return sqlite3_create_function(db, b"direntplus", ARGUMENTS, SQLITE_UTF8, NULL, NULL, step, final)


def offer():
    """Connections that are opened from now on have the function FUNCTION, unless Python's sqlite3 has a library of its own."""
    if sqlite3_auto_extension(<void (*)() noexcept nogil><void *>register) != SQLITE_OK:
        raise MemoryError()


cdef int renew(DirentPlus *entry, const char *folder) noexcept nogil:
    """What files.with_staged() does to a row: 0 or an errno. Without a file (a creation that failed half-way) the row stands."""
    cdef fuse_attr *attr = &entry.attr
    cdef int64_t mtime, ctime = time_of(attr.ctime, attr.ctimensec)
    cdef char path[PATH_BYTES]
    cdef status found
    entry.attr_valid_nsec = 0
    snprintf(path, PATH_BYTES, b"%s/%llu", folder, <unsigned long long>entry.nodeid)
    if lstat(path, &found):
        return 0 if errno == ENOENT else errno
    mtime = found.st_mtim.tv_sec * NS + found.st_mtim.tv_nsec
    if mtime != time_of(attr.mtime, attr.mtimensec):
        put_time(max(ctime, mtime), &attr.ctime, &attr.ctimensec)
    put_time(mtime, &attr.mtime, &attr.mtimensec)
    attr.size, attr.blocks = <uint64_t>found.st_size, <uint64_t>found.st_blocks
    if files_are_padded:
        attr.blocks = min(attr.blocks, (attr.size + 4095) // 4096 * 8)
    return 0


cdef int renew_all(uint8_t *entries, size_t size, const char *memory, const char *parking) noexcept nogil:
    """0 or an errno."""
    cdef DirentPlus *entry
    cdef size_t at = 0
    cdef int code = 0
    while at < size and not code:
        entry = <DirentPlus *>(entries + at)
        if entry.attr_valid_nsec:
            code = renew(entry, parking if entry.attr_valid_nsec == HOME_COLD else memory)
        at += entry_bytes(entry.namelen)
    return code


def pads(bint padded):
    """Whether staged files may have blocks behind their end that are not theirs."""
    global files_are_padded
    files_are_padded = padded


def told(bytes entries):
    """What an answer tells of: ([the inode of each entry], whether some are staged, the position after the last)."""
    cdef const char *data = PyBytes_AS_STRING(entries)
    cdef size_t at = 0, size = <size_t>PyBytes_GET_SIZE(entries)
    cdef const DirentPlus *entry
    cdef list found = []
    cdef bint staged = False
    cdef uint64_t end = 0
    while at < size:
        entry = <const DirentPlus *>(data + at)
        found.append(entry.nodeid)
        staged = staged or entry.attr_valid_nsec != 0
        end = entry.off
        at += entry_bytes(entry.namelen)
    return found, staged, end


def renewed(bytes entries, bytes memory, bytes parking, frozenset mapped=frozenset()):
    """The entries with what their staged files say, which lie in these two folders under the numbers of their inodes. Attributes
    of the `mapped` are for no time at all."""
    cdef bytes copy = PyBytes_FromStringAndSize(PyBytes_AS_STRING(entries), PyBytes_GET_SIZE(entries))
    cdef uint8_t *data = <uint8_t *>PyBytes_AS_STRING(copy)
    cdef size_t size = <size_t>PyBytes_GET_SIZE(copy)
    cdef const char *in_memory = memory
    cdef const char *in_parking = parking
    cdef int code
    with nogil:  # the disk may have to be asked
        code = renew_all(data, size, in_memory, in_parking)
    if code:
        raise OSError(code, strerror(code))
    if mapped:
        shorten(data, size, mapped)
    return copy


cdef void shorten(uint8_t *entries, size_t size, frozenset mapped):
    cdef DirentPlus *entry
    cdef size_t at = 0
    while at < size:
        entry = <DirentPlus *>(entries + at)
        if entry.nodeid in mapped:
            entry.attr_valid = 0
        at += entry_bytes(entry.namelen)
