# Which requests are answered without Python, and with what: the tables' answers put on the wire.
#
# Owns: nothing. A .pxd of inline functions, compiled into fuse_transport. Knows no socket to pyfuse3. Invariant: a function that
# returns True has answered, and `code` is 0 or the errno that ends the reader's loop; one that returns False has changed nothing.

from cython_ext.transport.event_queue cimport keep_forgets
from cython_ext.fuse_abi cimport *
from cython_ext.transport.listing_queue cimport listings_note, listings_put
from cython_ext.transport.message_io cimport asks_for_capability
from cython_ext.transport.name_table cimport is_absent
from cython_ext.transport.own_answers cimport (
    Known, allocate_file, attributes_of, keep_release, make_file, move_name, open_file, open_folder, remove_name, seek_file)
from cython_ext.transport.wire cimport Wire, answer, answer_open
from libc.errno cimport ENODATA, ENOENT, ENOSYS
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t
from libc.string cimport memset

cdef enum:
    ENTRY_BYTES = sizeof(fuse_create_out) - sizeof(fuse_open_out)


cdef inline bint names_answered(
        Known *known, Wire *wire, const uint8_t *message, size_t size, bint makes_files, int *code) noexcept nogil:
    """LOOKUP, CREATE, UNLINK, RENAME, and what is asked of folders. `makes_files`: in passthrough."""
    cdef const fuse_in_header *head = <const fuse_in_header *>message
    cdef fuse_create_out made
    cdef fuse_open_out opened
    if head.opcode == FUSE_LOOKUP and is_absent(&known.names, message, size):
        memset(&made, 0, ENTRY_BYTES)  # no inode: like ENOENT, but the kernel may keep it
        made.entry_valid = known.names.absent_s
        code[0] = answer(wire, head.unique, 0 if known.names.absent_s else ENOENT, &made, ENTRY_BYTES)
    elif head.opcode == FUSE_CREATE and makes_files and make_file(known, message, size, &made):
        code[0] = answer_open(wire, &known.events, head.unique, &made, sizeof(made), made.opened.fh)
    elif head.opcode == FUSE_UNLINK and remove_name(known, message, size) or (
            head.opcode == FUSE_RENAME and move_name(known, message, size)):
        code[0] = answer(wire, head.unique, 0, NULL, 0)
    elif head.opcode in (FUSE_OPENDIR, FUSE_RELEASEDIR) and open_folder(known, head, &opened):
        code[0] = answer(wire, head.unique, 0, &opened, sizeof(opened) if head.opcode == FUSE_OPENDIR else 0)
    elif head.opcode == FUSE_READDIRPLUS and listings_put(&known.listings, message):
        code[0] = 0
    else:
        return False
    return True


cdef inline bint files_answered(
        Known *known, Wire *wire, uint8_t *message, size_t size, bint capabilities, int *code) noexcept nogil:
    """What is asked of an inode or of an open file. `capabilities`: whether any file may have some."""
    cdef const fuse_in_header *head = <const fuse_in_header *>message
    cdef fuse_attr_out found
    cdef fuse_open_out opened
    cdef fuse_lseek_out sought
    listings_note(&known.listings, head.opcode)
    if not capabilities and asks_for_capability(message, size):
        code[0] = answer(wire, head.unique, ENODATA, NULL, 0)
    elif head.opcode == FUSE_GETATTR and attributes_of(known, head.nodeid, &found):
        code[0] = answer(wire, head.unique, 0, &found, sizeof(found))
    elif head.opcode == FUSE_OPEN and open_file(known, message, &opened):
        code[0] = answer_open(wire, &known.events, head.unique, &opened, sizeof(opened), opened.fh)
    elif head.opcode == FUSE_RELEASE and keep_release(known, message):
        code[0] = answer(wire, head.unique, 0, NULL, 0)
    elif head.opcode in (FUSE_FORGET, FUSE_BATCH_FORGET) and keep_forgets(&known.events, message, size):
        code[0] = 0
    elif head.opcode == FUSE_IOCTL:  # isatty() at every open() of Python's; the kernel makes ENOTTY of it
        code[0] = answer(wire, head.unique, ENOSYS, NULL, 0)
    elif head.opcode == FUSE_FALLOCATE:
        code[0] = allocate_file(known, message)
        if code[0] < 0:
            return False
        code[0] = answer(wire, head.unique, code[0], NULL, 0)
    elif head.opcode == FUSE_LSEEK:
        code[0] = seek_file(known, message, &sought)
        if code[0] < 0:
            return False
        code[0] = answer(wire, head.unique, code[0], &sought, sizeof(sought))
    else:
        return False
    return True
