# Checksums of the pages of index.db and of the frames of its WAL, and the one flipped bit that explains a wrong one.
#
# Owns: XXH3-64 of each page of a buffer, SQLite's frame checksum (file format, section 4.2). Knows no file and no meaning of
# a page. The GIL is released for all of it. Invariants:
# (1) Nothing is read outside the given buffers; a frame that is cut short is not looked at.
# (2) A search leaves its buffer as it found it.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from "<xxhash.h>" nogil:
    uint64_t XXH3_64bits(const void *data, size_t size)

cdef extern from "<byteswap.h>" nogil:
    uint32_t bswap_32(uint32_t x)

cdef enum:
    WAL_HEADER = 32
    FRAME_HEADER = 24
    SALTS = 1
    CHAINED = 2

SALTS_MATCH, CHAIN_MATCHES = SALTS, CHAINED  # bits of frame_checks()


cdef uint32_t big(const uint8_t *p) noexcept nogil:
    cdef uint32_t x
    memcpy(&x, p, 4)
    return bswap_32(x)


cdef void add_words(const uint8_t *p, size_t count, bint swap, uint32_t *s0, uint32_t *s1) noexcept nogil:
    """SQLite's walChecksumBytes over `count` bytes, a multiple of 8."""
    cdef uint32_t a = s0[0], b = s1[0], x, y
    cdef size_t i
    for i in range(0, count, 8):
        memcpy(&x, p + i, 4)
        memcpy(&y, p + i + 4, 4)
        if swap:
            x, y = bswap_32(x), bswap_32(y)
        a += x + b
        b += y + a
    s0[0], s1[0] = a, b


cdef bint frame_chains(const uint8_t *frame, size_t page_bytes, bint swap, uint32_t s0, uint32_t s1) noexcept nogil:
    """Whether the frame's stored checksum continues (s0, s1)."""
    add_words(frame, 8, swap, &s0, &s1)
    add_words(frame + FRAME_HEADER, page_bytes, swap, &s0, &s1)
    return s0 == big(frame + 16) and s1 == big(frame + 20) and big(frame) != 0


def page_sums(const uint8_t[::1] data, size_t page_bytes, uint64_t[::1] out):
    """out[i] = XXH3-64 of page i, for every whole page of `data` that `out` has room for."""
    cdef size_t i
    cdef size_t count = min(<size_t>data.shape[0] // page_bytes, <size_t>out.shape[0])
    with nogil:
        for i in range(count):
            out[i] = XXH3_64bits(&data[i * page_bytes], page_bytes)


def words_sum(const uint8_t[::1] data, bint swap):
    """SQLite's WAL checksum of `data` from (0, 0), its length a multiple of 8: what a WAL header carries."""
    cdef uint32_t s0 = 0, s1 = 0
    cdef size_t count = <size_t>data.shape[0] // 8 * 8
    if count:
        add_words(&data[0], count, swap, &s0, &s1)
    return s0, s1


def frame_checks(const uint8_t[::1] wal, size_t page_bytes, bint swap, uint8_t[::1] out):
    """out[i]: SALTS_MATCH if frame i carries the salts of the WAL header, CHAIN_MATCHES if its checksum continues the one
    stored in the frame before (in the header, for the first)."""
    cdef size_t step = FRAME_HEADER + page_bytes
    cdef size_t i
    cdef size_t count = 0
    cdef const uint8_t *base
    cdef const uint8_t *frame
    cdef uint32_t s0, s1
    if wal.shape[0] < WAL_HEADER:
        return
    count = min((<size_t>wal.shape[0] - WAL_HEADER) // step, <size_t>out.shape[0])
    base = &wal[0]
    with nogil:
        s0, s1 = big(base + 24), big(base + 28)
        for i in range(count):
            frame = base + WAL_HEADER + i * step
            out[i] = SALTS if big(frame + 8) == big(base + 16) and big(frame + 12) == big(base + 20) else 0
            if frame_chains(frame, page_bytes, swap, s0, s1):
                out[i] |= CHAINED
            s0, s1 = big(frame + 16), big(frame + 20)


def flipped_page_bit(uint8_t[::1] page, uint64_t wanted):
    """The number of the one bit of `page` that, flipped, gives the sum `wanted`; -1 when there is none."""
    cdef size_t count = <size_t>page.shape[0]
    cdef int64_t bit, found = -1
    with nogil:
        for bit in range(<int64_t>count * 8):
            page[bit >> 3] ^= <uint8_t>(1 << (bit & 7))
            if XXH3_64bits(&page[0], count) == wanted:
                found = bit
            page[bit >> 3] ^= <uint8_t>(1 << (bit & 7))
            if found >= 0:
                break
    return found


def flipped_frame_bits(uint8_t[::1] frame, const uint8_t[::1] header, const uint8_t[::1] before, bint swap):
    """The bits of a WAL frame of which any one, flipped, makes it right after the checksum `before` (8 bytes). Often one; the
    checksum is a sum, so that the top bits of its words cannot always be told apart."""
    cdef size_t count = <size_t>frame.shape[0]
    cdef int64_t bit
    cdef bint fits
    cdef uint32_t s0, s1
    found = []
    if count <= FRAME_HEADER or header.shape[0] < WAL_HEADER or before.shape[0] < 8:
        return found
    s0, s1 = big(&before[0]), big(&before[4])
    for bit in range(<int64_t>count * 8):
        with nogil:
            frame[bit >> 3] ^= <uint8_t>(1 << (bit & 7))
            fits = big(&frame[8]) == big(&header[16]) and big(&frame[12]) == big(&header[20]) and frame_chains(
                &frame[0], count - FRAME_HEADER, swap, s0, s1
            )
            frame[bit >> 3] ^= <uint8_t>(1 << (bit & 7))
        if fits:
            found.append(bit)
    return found
