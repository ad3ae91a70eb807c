# A hash map from any uint64 to a uint64 that is not 0: open addressing, linear probing.
#
# Owns: its slots. Knows nothing of locks (the caller holds one) nor of what keys and values mean.
# A .pxd of inline functions, not a module: each user compiles them in, and no Python object is anywhere near.
# Invariants:
# (1) A slot is free exactly when its value is 0.
# (2) Between a key's home slot and the slot it is in no slot is free, so a lookup ends at the first free one.
# (3) At most half of the slots are used, so there always is a free one.

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

ctypedef struct U64Slot:
    uint64_t key
    uint64_t value

ctypedef struct U64Map:
    U64Slot *slots
    size_t mask  # number of slots - 1; the number is a power of two
    size_t used


cdef inline int map_init(U64Map *map, size_t slots) noexcept nogil:
    """`slots` is a power of two. 0, or -1 when there is no memory."""
    map.slots = <U64Slot *>calloc(slots, sizeof(U64Slot))
    map.mask = slots - 1
    map.used = 0
    return 0 if map.slots != NULL else -1


cdef inline void map_free(U64Map *map) noexcept nogil:
    free(map.slots)
    map.slots = NULL


cdef inline void map_clear(U64Map *map) noexcept nogil:
    memset(map.slots, 0, (map.mask + 1) * sizeof(U64Slot))
    map.used = 0


cdef inline size_t map_home(const U64Map *map, uint64_t key) noexcept nogil:
    # Fibonacci hashing: keys count up by one or by two, the multiplication spreads them into the upper half.
    return <size_t>((key * <uint64_t>0x9E3779B97F4A7C15) >> 32) & map.mask


cdef inline size_t map_find(const U64Map *map, uint64_t key) noexcept nogil:
    """The slot that holds `key`, or the free one where it would go."""
    cdef size_t at = map_home(map, key)
    while map.slots[at].value and map.slots[at].key != key:
        at = (at + 1) & map.mask
    return at


cdef inline uint64_t map_get(const U64Map *map, uint64_t key) noexcept nogil:
    return map.slots[map_find(map, key)].value


cdef inline bint map_full(const U64Map *map) noexcept nogil:
    return 2 * (map.used + 1) > map.mask + 1


cdef inline int map_double(U64Map *map) noexcept nogil:
    cdef U64Map wider
    cdef size_t at
    if map_init(&wider, 2 * (map.mask + 1)):
        return -1
    for at in range(map.mask + 1):
        if map.slots[at].value:
            wider.slots[map_find(&wider, map.slots[at].key)] = map.slots[at]
    wider.used = map.used
    map_free(map)
    map[0] = wider
    return 0


cdef inline uint64_t map_put(U64Map *map, uint64_t key, uint64_t value) noexcept nogil:
    """Insert or replace; the value before, 0 if there was none. The map must not be full."""
    cdef size_t at = map_find(map, key)
    cdef uint64_t before = map.slots[at].value
    map.used += 0 if before else 1
    map.slots[at].key = key
    map.slots[at].value = value
    return before


cdef inline uint64_t map_take(U64Map *map, uint64_t key) noexcept nogil:
    """Remove `key`; its value, 0 if there was none."""
    cdef size_t hole = map_find(map, key)
    cdef size_t at = hole
    cdef uint64_t value = map.slots[hole].value
    if not value:
        return 0
    map.used -= 1
    # Whatever follows without a gap and may stand nearer to its home moves into the hole: invariant (2).
    while True:
        map.slots[hole].value = 0
        while True:
            at = (at + 1) & map.mask
            if not map.slots[at].value:
                return value
            if ((at - map_home(map, map.slots[at].key)) & map.mask) >= ((at - hole) & map.mask):
                break
        map.slots[hole] = map.slots[at]
        hole = at
