# Which names exist, as counted 64-bit hashes of (folder, name): enough to answer "no such file" without Python.
#
# Owns: the counts, whose name some of them are, and how long the kernel may keep what it was told. A .pxd of inline functions,
# compiled into fuse_transport.
# Invariants:
# (1) Python adds a name before it can be looked up, and removes it after it no longer can: a count of 0 means that there is
#     no such name. Names of one hash share a count, so a collision costs a question to Python, never a wrong answer.
# (2) Nothing is answered from the table before Python said that it is complete.
# (3) An inode that is told of a name is the one of the only name of that hash.
# (4) The kernel may go on by itself for `absent_s`: each name that appears later is made by way of that kernel, which then knows it.

from cython_ext.fuse_abi cimport *
from cython_ext.transport.handle_table cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock)
from cython_ext.transport.u64_map cimport U64Map, map_clear, map_double, map_free, map_full, map_get, map_init, map_put, map_take
from libc.errno cimport ENOMEM
from libc.stdint cimport uint32_t, uint64_t, uint8_t
from libc.string cimport memcmp

ctypedef struct NameTable:
    pthread_mutex_t mutex
    U64Map map
    U64Map inodes  # of names that were made or moved lately
    bint complete
    uint32_t absent_s

cdef enum:
    FIRST_NAME_SLOTS = 4096
    INODE_SLOTS = 1 << 15  # half of it may be used; then all are forgotten
    NAME_MAX = 255
    ROOT_FOLDER = 1
    VIRTUAL_SHIFT = 60  # folders from 1 << 60 on are made up by Python: their names are not in the table


cdef inline int names_init(NameTable *table) noexcept nogil:
    """0, or -1 when there is no memory."""
    pthread_mutex_init(&table.mutex, NULL)
    table.complete, table.absent_s = False, 0
    return map_init(&table.map, FIRST_NAME_SLOTS) or map_init(&table.inodes, INODE_SLOTS)


cdef inline void names_free(NameTable *table) noexcept nogil:
    map_free(&table.map)
    map_free(&table.inodes)
    pthread_mutex_destroy(&table.mutex)


cdef inline uint64_t name_hash(uint64_t folder, const uint8_t *name, size_t size) noexcept nogil:
    """FNV-1a over the name, started from the folder, with a final mix (the map uses the upper half)."""
    cdef uint64_t found = <uint64_t>0xCBF29CE484222325 ^ (folder * <uint64_t>0x9E3779B97F4A7C15)
    cdef size_t at
    for at in range(size):
        found = (found ^ name[at]) * <uint64_t>0x100000001B3
    found ^= found >> 32
    return found * <uint64_t>0xD6E8FEB86659FD93


cdef inline int names_add(NameTable *table, uint64_t key) noexcept nogil:
    """0 or ENOMEM."""
    cdef int code = 0
    pthread_mutex_lock(&table.mutex)
    if map_full(&table.map) and map_double(&table.map):
        code = ENOMEM
    else:
        map_put(&table.map, key, map_get(&table.map, key) + 1)
        map_take(&table.inodes, key)
    pthread_mutex_unlock(&table.mutex)
    return code


cdef inline void names_remove(NameTable *table, uint64_t key) noexcept nogil:
    cdef uint64_t count
    pthread_mutex_lock(&table.mutex)
    map_take(&table.inodes, key)
    count = map_get(&table.map, key)
    if count > 1:
        map_put(&table.map, key, count - 1)
    elif count:
        map_take(&table.map, key)
    pthread_mutex_unlock(&table.mutex)


cdef inline void names_tell(NameTable *table, uint64_t key, uint64_t ino) noexcept nogil:
    """Whose name it is."""
    pthread_mutex_lock(&table.mutex)
    if map_full(&table.inodes):
        map_clear(&table.inodes)
    if map_get(&table.map, key) == 1:
        map_put(&table.inodes, key, ino)
    pthread_mutex_unlock(&table.mutex)


cdef inline uint64_t names_inode(NameTable *table, uint64_t key) noexcept nogil:
    """Whose name it is; 0: not known."""
    cdef uint64_t ino
    pthread_mutex_lock(&table.mutex)
    ino = map_get(&table.inodes, key)
    pthread_mutex_unlock(&table.mutex)
    return ino


cdef inline bint names_lack(NameTable *table, uint64_t key) noexcept nogil:
    """Whether it is certain that there is no such name."""
    cdef bint lacking
    pthread_mutex_lock(&table.mutex)
    lacking = table.complete and not map_get(&table.map, key)
    pthread_mutex_unlock(&table.mutex)
    return lacking


cdef inline bint names_hold(NameTable *table, uint64_t key) noexcept nogil:
    """Whether a name of that hash is counted, and all are."""
    cdef bint held
    pthread_mutex_lock(&table.mutex)
    held = table.complete and map_get(&table.map, key) > 0
    pthread_mutex_unlock(&table.mutex)
    return held


cdef inline bint is_of_python(uint64_t folder, const uint8_t *name, size_t size) noexcept nogil:
    """Whether only Python knows what a name means: dots, and what it makes up."""
    if name[0] != c".":
        return False
    return size == 1 or (size == 2 and name[1] == c".") or (folder == ROOT_FOLDER and size == 8 and not memcmp(name, b".cascade", 8))


cdef inline bint is_absent(NameTable *table, const uint8_t *message, size_t size) noexcept nogil:
    """Whether a LOOKUP asks for a name that certainly is not there. Too long names are Python's, too."""
    cdef const uint8_t *name = message + sizeof(fuse_in_header)
    cdef size_t length = size - sizeof(fuse_in_header)
    cdef uint64_t folder = (<const fuse_in_header *>message).nodeid
    if length < 2 or length > NAME_MAX + 1 or folder >> VIRTUAL_SHIFT or is_of_python(folder, name, length - 1):
        return False
    return names_lack(table, name_hash(folder, name, length - 1))
