# Fingerprints and comparisons of byte ranges of open files; where a buffer holds nothing.
#
# Owns: reading a range of a descriptor into a caller's buffer, XXH3-128 keyed with the store's secret, byte comparison, zeros.
# Knows nothing of objects, tiers or names. The GIL is released for all of it. Invariants:
# (1) Equal bytes and equal secret give equal fingerprints on every machine (XXH3's canonical big-endian form).
# (2) A range past the end of the file is an error (EIO), never zeros: the file shrank under the caller.
# Files are read with pread, not mapped: a mapping of a file that shrinks kills the process with SIGBUS. mapped_fingerprints() and
# changed_pages() map, because the copy costs twice what the hash does, and catch the signal.

from libc.errno cimport EINTR, EIO, errno
from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memcmp

from os import strerror

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *buf, size_t count, int64_t offset)

cdef extern from "<xxhash.h>" nogil:
    ctypedef struct XXH128_hash_t:
        pass
    ctypedef struct XXH128_canonical_t:
        uint8_t digest[16]
    int XXH128_isEqual(XXH128_hash_t a, XXH128_hash_t b)
    XXH128_hash_t XXH128_hashFromCanonical(const XXH128_canonical_t *src)
    void XXH128_canonicalFromHash(XXH128_canonical_t *out, XXH128_hash_t hash)

cdef extern from *:
    """
    #include <setjmp.h>
    #include <signal.h>
    #include <string.h>
    #include <sys/mman.h>

    /* The library's own choice by processor (AVX2, AVX-512: 1.6 times the speed), where it was built with one. The same values. */
    extern XXH128_hash_t XXH3_128bits_withSecret_dispatch(const void *, size_t, const void *, size_t) __attribute__((weak));

    static XXH128_hash_t cf_hash(const void *data, size_t size, const void *secret) {
        return XXH3_128bits_withSecret_dispatch ? XXH3_128bits_withSecret_dispatch(data, size, secret, 192)
                                                : XXH3_128bits_withSecret(data, size, secret, 192);
    }

    static __thread sigjmp_buf cf_escape;
    static __thread volatile sig_atomic_t cf_is_reading;
    static struct sigaction cf_other;  /* whose handler it is when the fault is not ours */

    static void cf_on_fault(int number, siginfo_t *info, void *context) {
        if (cf_is_reading) siglongjmp(cf_escape, 1);
        sigaction(number, &cf_other, NULL);  /* the instruction faults again, and then it is theirs */
    }

    static void cf_catch_faults(void) {
        struct sigaction now, ours;
        sigaction(SIGBUS, NULL, &now);
        if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == cf_on_fault) return;
        cf_other = now;
        memset(&ours, 0, sizeof(ours));
        ours.sa_sigaction = cf_on_fault;
        ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
        sigaction(SIGBUS, &ours, NULL);
    }

    /* Prints of `count` blocks of `step` bytes, the last of `last`, from `offset` on; an errno, EIO when the file ends before. */
    static int cf_mapped_prints(
            int fd, off_t offset, size_t step, size_t count, size_t last, const void *secret, XXH128_canonical_t *out) {
        size_t size = step * (count - 1) + last;
        const char *data = (const char *)mmap(NULL, size, PROT_READ, MAP_SHARED, fd, offset);
        if (data == MAP_FAILED) return errno;
        int code = 0;
        cf_catch_faults();
        if (!sigsetjmp(cf_escape, 0)) {
            cf_is_reading = 1;
            for (size_t i = 0; i < count; i++)
                XXH128_canonicalFromHash(&out[i], cf_hash(data + i * step, i + 1 < count ? step : last, secret));
        } else {
            code = EIO;
        }
        cf_is_reading = 0;
        munmap((void *)data, size);
        return code;
    }

    static void cf_page_prints(const void *data, size_t size, const void *secret, XXH128_canonical_t *out) {
        for (size_t at = 0; at < size; at += 4096)
            XXH128_canonicalFromHash(out++, cf_hash((const char *)data + at, size - at < 4096 ? size - at : 4096, secret));
    }

    /* Sets the flag of each page whose print is not that of the first `known`. As above. */
    static int cf_changed_pages(int fd, off_t offset, size_t size, size_t known, const void *secret,
                                const XXH128_canonical_t *prints, char *flags) {
        const char *data = (const char *)mmap(NULL, size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, offset);
        if (data == MAP_FAILED) return errno;
        int code = 0;
        cf_catch_faults();
        if (!sigsetjmp(cf_escape, 0)) {
            cf_is_reading = 1;
            for (size_t i = 0; i * 4096 < size; i++) {
                size_t length = size - i * 4096 < 4096 ? size - i * 4096 : 4096;
                XXH128_canonical_t now;
                flags[i] = 1;
                if (i >= known) continue;
                XXH128_canonicalFromHash(&now, cf_hash(data + i * 4096, length, secret));
                flags[i] = memcmp(&now, &prints[i], sizeof(now)) != 0;
            }
        } else {
            code = EIO;
        }
        cf_is_reading = 0;
        munmap((void *)data, size);
        return code;
    }
    """
    XXH128_hash_t cf_hash(const void *data, size_t size, const void *secret) nogil
    void cf_page_prints(const void *data, size_t size, const void *secret, XXH128_canonical_t *out) nogil
    int cf_changed_pages(
        int fd, int64_t offset, size_t size, size_t known, const void *secret, const XXH128_canonical_t *prints, char *flags) nogil
    int cf_mapped_prints(
        int fd, int64_t offset, size_t step, size_t count, size_t last, const void *secret, XXH128_canonical_t *out) nogil

SECRET_BYTES = 192  # XXH3_SECRET_DEFAULT_SIZE; the minimum is 136


cdef int read_fully(int fd, uint8_t *out, size_t count, int64_t offset) noexcept nogil:
    """0 when all `count` bytes were read, else an errno."""
    cdef ssize_t got
    while count:
        got = pread(fd, out, count, offset)
        if got < 0:
            if errno == EINTR:
                continue
            return errno
        if got == 0:
            return EIO
        out += got
        offset += got
        count -= <size_t>got
    return 0


cdef int check(int code) except -1:
    if code:
        raise OSError(code, strerror(code))
    return 0


def read_into(int fd, int64_t offset, uint8_t[::1] out):
    """Fill `out` from `fd` at byte `offset`. Raises OSError; EIO when the file ends before."""
    cdef int code = 0
    cdef size_t count = <size_t>out.shape[0]
    with nogil:
        if count:
            code = read_fully(fd, &out[0], count, offset)
    check(code)


def fingerprint(const uint8_t[::1] data, const uint8_t[::1] secret):
    """16 bytes: XXH3-128 of `data` keyed with `secret` (SECRET_BYTES long)."""
    cdef XXH128_canonical_t out
    cdef size_t count = <size_t>data.shape[0]
    if secret.shape[0] != 192:
        raise ValueError("the secret is 192 bytes long")
    with nogil:
        XXH128_canonicalFromHash(&out, cf_hash(&data[0] if count else NULL, count, &secret[0]))
    return bytes(out.digest[:16])


def flipped_bit(uint8_t[::1] data, const uint8_t[::1] secret, const uint8_t[::1] wanted):
    """The number of the one bit of `data` that, flipped, gives the fingerprint `wanted` (16 bytes); -1 when there is none.

    Costs the square of the length. `data` is left as it was."""
    cdef XXH128_canonical_t given
    cdef XXH128_hash_t aim
    cdef size_t count = <size_t>data.shape[0]
    cdef int64_t bit, found = -1
    if secret.shape[0] != 192 or wanted.shape[0] != 16:
        raise ValueError("the secret is 192 bytes long, a fingerprint 16")
    for bit in range(16):
        given.digest[bit] = wanted[bit]
    aim = XXH128_hashFromCanonical(&given)
    with nogil:
        for bit in range(<int64_t>count * 8):
            data[bit >> 3] ^= <uint8_t>(1 << (bit & 7))
            if XXH128_isEqual(cf_hash(&data[0], count, &secret[0]), aim):
                found = bit
            data[bit >> 3] ^= <uint8_t>(1 << (bit & 7))
            if found >= 0:
                break
    return found


def read_fingerprint(int fd, int64_t offset, uint8_t[::1] out, const uint8_t[::1] secret):
    """read_into() and fingerprint() of what was read, in one step: the bytes in `out` are those that were hashed."""
    read_into(fd, offset, out)
    return fingerprint(out, secret)


def mapped_fingerprints(int fd, int64_t offset, int64_t size, int64_t step, const uint8_t[::1] secret):
    """Fingerprints of the blocks of `step` bytes, the last may be shorter, of `size` bytes of a file from a multiple of 4096 on,
    without a copy. What they were taken from may have changed before this returns. OSError; EIO when the file ends before."""
    cdef int code = 0
    cdef int64_t count = (size + step - 1) // step, i
    if secret.shape[0] != 192:
        raise ValueError("the secret is 192 bytes long")
    if not count:
        return []
    prints = bytearray(16 * count)
    cdef uint8_t[::1] out = prints
    with nogil:
        code = cf_mapped_prints(
            fd, offset, <size_t>step, <size_t>count, <size_t>(size - step * (count - 1)), &secret[0], <XXH128_canonical_t *>&out[0])
    check(code)
    return [bytes(prints[16 * i : 16 * i + 16]) for i in range(count)]


cdef enum:
    PAGE = 4096


def page_prints(const uint8_t[::1] data, const uint8_t[::1] secret):
    """The fingerprints, joined, of the pages of 4096 bytes of `data`; the last may be shorter."""
    cdef size_t count = <size_t>data.shape[0]
    if secret.shape[0] != 192:
        raise ValueError("the secret is 192 bytes long")
    prints = bytearray((count + PAGE - 1) // PAGE * 16)
    cdef uint8_t[::1] out = prints
    if count:
        with nogil:
            cf_page_prints(&data[0], count, &secret[0], <XXH128_canonical_t *>&out[0])
    return prints


def changed_pages(int fd, int64_t offset, int64_t size, const uint8_t[::1] prints, const uint8_t[::1] secret):
    """[(offset, length)] of runs of pages, among `size` bytes of a file from a multiple of 4096 on, whose fingerprints are not
    those of `prints`, as page_prints() makes them, which begin with that page and may end before. Without a copy: what lies
    there may have changed before this returns. OSError; EIO when the file ends before."""
    cdef int64_t pages = (size + PAGE - 1) // PAGE, known = min(pages, <int64_t>prints.shape[0] // 16), at = 0, begin
    cdef int code
    if secret.shape[0] != 192:
        raise ValueError("the secret is 192 bytes long")
    if not pages:
        return []
    cdef char[::1] flags = bytearray(pages)
    with nogil:
        code = cf_changed_pages(
            fd, offset, <size_t>size, <size_t>known, &secret[0], <const XXH128_canonical_t *>(&prints[0] if known else NULL),
            &flags[0])
    check(code)
    found = []
    while at < pages:
        if not flags[at]:
            at += 1
            continue
        begin = at
        while at < pages and flags[at]:
            at += 1
        found.append((offset + begin * PAGE, min(size, at * PAGE) - begin * PAGE))
    return found


cdef bint is_zero(const uint8_t *page) noexcept nogil:
    """Whether a page is zeros; nearly always its first byte tells that it is not."""
    return not page[0] and not memcmp(page, page + 1, PAGE - 1)


cdef int64_t next_run(const uint8_t *data, int64_t *at, int64_t pages, int64_t least) noexcept nogil:
    """The first page, counted from `at` on, of a run of at least `least` pages of zeros, and behind it in `at`; -1: no more.

    Of each such run a page at a multiple of the stride is part, so that others need not be looked at to find it."""
    cdef int64_t floor = at[0]
    cdef int64_t stride = max(1, (least + 1) // 2)
    cdef int64_t begin, end, probe = (floor + stride - 1) // stride * stride
    while probe < pages:
        if is_zero(data + probe * PAGE):
            begin, end = probe, probe + 1
            while begin > floor and is_zero(data + (begin - 1) * PAGE):
                begin -= 1
            while end < pages and is_zero(data + end * PAGE):
                end += 1
            if end - begin >= least:
                at[0] = end
                return begin
            floor = end
            probe = end // stride * stride
        probe += stride
    return -1


def zero_runs(const uint8_t[::1] data, int64_t least_bytes):
    """[(begin, end)] of the runs of whole pages of zeros, at least `least_bytes` long. Pages begin at multiples of 4096."""
    cdef int64_t pages = data.shape[0] // PAGE, least = max(1, least_bytes // PAGE), at = 0, begin
    found = []
    while pages:
        with nogil:
            begin = next_run(&data[0], &at, pages, least)
        if begin < 0:
            break
        found.append((begin * PAGE, at * PAGE))
    return found


def equal(int fd_a, int64_t offset_a, int fd_b, int64_t offset_b, int64_t length, uint8_t[::1] scratch):
    """Whether `length` bytes of two files are the same. `scratch` is working space, at least 2 bytes long."""
    cdef int64_t half = scratch.shape[0] // 2
    cdef int64_t step, done = 0
    cdef int code = 0
    cdef int differs = 0
    if half < 1:
        raise ValueError("scratch is too small")
    with nogil:
        while done < length and not code and not differs:
            step = min(half, length - done)
            code = read_fully(fd_a, &scratch[0], <size_t>step, offset_a + done)
            if not code:
                code = read_fully(fd_b, &scratch[half], <size_t>step, offset_b + done)
            if not code:
                differs = memcmp(&scratch[0], &scratch[half], <size_t>step)
            done += step
    check(code)
    return not differs
