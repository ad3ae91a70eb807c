# What the kernel is told in the answer to INIT beyond what libfuse knows of.
#
# Owns: the choice of flags. A .pxd of one inline function, compiled into fuse_transport. Invariant: nothing is agreed to that
# the kernel did not offer.

from cython_ext.fuse_abi cimport *
from cython_ext.transport.message_io cimport PAGE, WRITE_HEAD
from libc.stdint cimport uint16_t, uint32_t, uint8_t


cdef inline bint edit_init(
        uint8_t *body, size_t size, size_t message_max, uint32_t offered, uint32_t offered2,
        bint passthrough) noexcept nogil:
    """Edit in place; whether passthrough was agreed to."""
    cdef fuse_init_out *out = <fuse_init_out *>body
    cdef uint32_t data_max = <uint32_t>((message_max - WRITE_HEAD) // PAGE * PAGE)
    if size < sizeof(fuse_init_out):
        return False  # an old, short answer: no flags2
    # What does not fit the buffer must not be sent; libfuse does not know how large ours is.
    out.max_write = min(out.max_write, data_max)
    out.max_pages = <uint16_t>min(<uint32_t>out.max_pages, data_max // PAGE)
    if not offered & INIT_EXT:
        return False
    # KILLPRIV_V2: else the kernel asks for the xattr security.capability before each write(2), also of passthrough.
    out.flags |= INIT_EXT | (offered & INIT_HANDLE_KILLPRIV_V2)
    out.flags2 |= offered2 & INIT2_DIRECT_IO_ALLOW_MMAP
    if not (passthrough and offered2 & INIT2_PASSTHROUGH) or out.flags & INIT_WRITEBACK_CACHE:
        return False  # the kernel refuses writeback and passthrough together
    out.flags2 |= INIT2_PASSTHROUGH
    out.max_stack_depth = 1
    return True
