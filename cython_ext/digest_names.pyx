# Lists a folder of object copies: a hundred thousand names are read in the time that Python needs for a tenth of them.
#
# Owns: which name is a digest (32 lower-case hex digits). Knows no tier. Invariant: a name that readdir(3) does not call a
# regular file is told among the others, whatever it looks like: the caller decides on it.

cimport libc.errno as c
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.string cimport strlen

import os

cdef extern from "<dirent.h>" nogil:
    ctypedef struct DIR:
        pass
    cdef struct dirent:
        char d_name[256]
        unsigned char d_type
    DIR *opendir(const char *name)
    dirent *readdir(DIR *folder)
    int closedir(DIR *folder)
    int DT_REG

cdef enum:
    DIGEST_BYTES = 16


cdef int digit(char c) noexcept nogil:
    """The value of a hex digit, or -1."""
    if c'0' <= c <= c'9':
        return c - c'0'
    if c'a' <= c <= c'f':
        return c - c'a' + 10
    return -1


cdef bint decoded(const char *name, char *out) noexcept nogil:
    """Whether the whole name is a digest; its bytes are in `out` then."""
    cdef int i, high, low
    if strlen(name) != 2 * DIGEST_BYTES:
        return False
    for i in range(DIGEST_BYTES):
        high, low = digit(name[2 * i]), digit(name[2 * i + 1])
        if high < 0 or low < 0:
            return False
        out[i] = <char>(high << 4 | low)
    return True


cdef object failure(object path):
    return OSError(c.errno, os.strerror(c.errno), path)


def listed(str path):
    """({digest: 0} of the regular files named by one, the names of everything else)."""
    cdef dict digests = {}
    cdef list others = []
    cdef DIR *folder = opendir(os.fsencode(path))
    cdef dirent *entry
    cdef char digest[DIGEST_BYTES]
    if folder is NULL:
        raise failure(path)
    try:
        while True:
            c.errno = 0
            entry = readdir(folder)
            if entry is NULL:
                break
            if entry.d_type == DT_REG and decoded(entry.d_name, digest):
                digests[PyBytes_FromStringAndSize(digest, DIGEST_BYTES)] = 0
            else:
                others.append(os.fsdecode(entry.d_name))
        if c.errno:
            raise failure(path)
    finally:
        closedir(folder)
    return digests, [name for name in others if name not in (".", "..")]
