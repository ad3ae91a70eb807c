# Requests that pyfuse3 has no handler for, put in the form of others that it has; and those of folders, whose handle is their inode.
#
# Owns: the forms. A .pxd of inline functions, compiled into fuse_transport. Knows no table. Invariants: (1) The answer to the other
# request is, byte for byte, one to this. (2) No caller can send what is made here: pid -1 tells it.

from cython_ext.fuse_abi cimport *
from cython_ext.transport.listing_queue cimport LISTING_BYTES
from libc.stdint cimport uint8_t, uint32_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy

cdef enum:
    SEEK_NAME_BYTES = 32  # two numbers of at most 16 and 8 digits


cdef inline void put_as_other(uint8_t *message) noexcept nogil:
    """TMPFILE as CREATE: its name is `/` already, which no file can have. FALLOCATE, LSEEK and STATX as below. There is room: a WRITE is longer."""
    cdef fuse_in_header *head = <fuse_in_header *>message
    if head.opcode == FUSE_TMPFILE:
        head.opcode = FUSE_CREATE
    elif head.opcode == FUSE_STATX:
        statx_as_getxattr(message)
    elif head.opcode == FUSE_LSEEK:
        seek_as_getxattr(message)
    elif head.opcode == FUSE_FALLOCATE:
        allocation_as_setxattr(message)
    elif head.opcode in (FUSE_READDIR, FUSE_READDIRPLUS, FUSE_FSYNCDIR):
        of_folder(head, <fuse_io_in *>(message + sizeof(fuse_in_header)))


cdef inline void of_folder(const fuse_in_header *head, fuse_io_in *arg) noexcept nogil:
    """Python's handle of a folder is what pyfuse3 tells it instead of the folder. An answer must fit the smallest socket buffer that
    a system may grant, 208 KiB."""
    arg.fh = head.nodeid
    if head.opcode != FUSE_FSYNCDIR:
        arg.size = min(arg.size, <uint32_t>LISTING_BYTES)


cdef inline void statx_as_getxattr(uint8_t *message) noexcept nogil:
    """The value of `/statx` is a struct fuse_statx_out."""
    cdef fuse_in_header *head = <fuse_in_header *>message
    cdef fuse_getxattr_in *arg = <fuse_getxattr_in *>(message + sizeof(fuse_in_header))
    arg.size, arg.padding = STATX_OUT_BYTES, 0
    memcpy(<uint8_t *>arg + sizeof(fuse_getxattr_in), <const char *>b"/statx", 7)
    head.opcode, head.pid = FUSE_GETXATTR, <uint32_t>-1
    head.len = sizeof(fuse_in_header) + sizeof(fuse_getxattr_in) + 7


cdef inline void seek_as_getxattr(uint8_t *message) noexcept nogil:
    """The value of `/lseek OFFSET WHENCE`, both hexadecimal, is a struct fuse_lseek_out."""
    cdef fuse_in_header *head = <fuse_in_header *>message
    cdef fuse_getxattr_in *arg = <fuse_getxattr_in *>(message + sizeof(fuse_in_header))
    cdef fuse_lseek_in asked = (<fuse_lseek_in *>arg)[0]
    cdef char *name = <char *>arg + sizeof(fuse_getxattr_in)
    cdef int length = snprintf(
        name, SEEK_NAME_BYTES, b"/lseek %llx %x", <unsigned long long>asked.offset, <unsigned int>asked.whence)
    arg.size, arg.padding = sizeof(fuse_lseek_out), 0
    head.opcode, head.pid = FUSE_GETXATTR, <uint32_t>-1
    head.len = <uint32_t>(sizeof(fuse_in_header) + sizeof(fuse_getxattr_in) + <size_t>length + 1)


cdef inline void allocation_as_setxattr(uint8_t *message) noexcept nogil:
    """The value of `/fallocate` is what FALLOCATE asks for."""
    cdef fuse_in_header *head = <fuse_in_header *>message
    cdef fuse_setxattr_in *arg = <fuse_setxattr_in *>(message + sizeof(fuse_in_header))
    cdef fuse_fallocate_in asked = (<fuse_fallocate_in *>arg)[0]
    cdef uint8_t *name = <uint8_t *>arg + sizeof(fuse_setxattr_in)
    memcpy(name, <const char *>b"/fallocate", 11)
    memcpy(name + 11, &asked, sizeof(asked))
    arg.size, arg.flags = sizeof(asked), 0
    head.opcode, head.pid = FUSE_SETXATTR, <uint32_t>-1
    head.len = sizeof(fuse_in_header) + sizeof(fuse_setxattr_in) + 11 + sizeof(asked)
