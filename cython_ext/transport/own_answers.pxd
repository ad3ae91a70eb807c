# What the transport can answer from what it knows, as functions of a request: the answer's body, or that it is Python's.
#
# Owns: the tables together, and their order. A .pxd of inline functions, compiled into fuse_transport. Knows no device and no socket.
# Invariants: (1) A function that says no has changed nothing. (2) A handle is borrowed while its descriptor is in use and not longer.

from cython_ext.transport.allocate_ahead cimport (
    AheadTable, ahead_created, ahead_free, ahead_init, ahead_released, is_foreign)
from cython_ext.transport.attribute_table cimport (
    AttributeTable, attributes_change, attributes_copy, attributes_drop, attributes_fill, attributes_free, attributes_init,
    attributes_put, attributes_touch)
from cython_ext.transport.event_queue cimport EventQueue, events_free, events_init, events_put
from cython_ext.fuse_abi cimport *
from cython_ext.transport.handle_table cimport (
    Handle, HandleTable, edit_open, handles_borrow, handles_free, handles_init, handles_return)
from cython_ext.transport.kept_writes cimport KeptWrites, kept_free, kept_init
from cython_ext.transport.listing_queue cimport ListingQueue, listing_flags, listings_free, listings_init, listings_open
from cython_ext.transport.name_ring cimport (
    NamePool, NameRecord, Spare, answer_create, change_pending, read_create, read_rename, read_unlink, ring_free, ring_give,
    ring_init, ring_move, ring_remove, unknown_removals_pending)
from cython_ext.transport.name_table cimport (
    VIRTUAL_SHIFT, NameTable, name_hash, names_add, names_free, names_hold, names_init, names_inode, names_lack, names_remove,
    names_tell)
from cython_ext.transport.open_grants cimport GrantTable, grants_free, grants_init, grants_open
from cython_ext.transport.positioned_io cimport allocate_range, seek_content
from cython_ext.transport.written_ranges cimport WrittenTable, written_free, written_init, written_note
from libc.errno cimport EBADF, EDQUOT, ENOSPC, EOPNOTSUPP
from libc.stdint cimport int64_t, uint8_t, uint64_t
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec

cdef extern from "<time.h>" nogil:
    int CLOCK_REALTIME_COARSE

cdef extern from "<sys/stat.h>" nogil:
    int futimens(int fd, const timespec *times)

ctypedef struct Known:
    HandleTable handles
    NameTable names
    AttributeTable attributes
    EventQueue events
    NamePool ring
    GrantTable grants
    ListingQueue listings
    AheadTable ahead
    KeptWrites kept
    WrittenTable written


cdef inline int known_init(Known *known, void *event_memory, void *ring_memory) noexcept nogil:
    """0, or not 0 when there is no memory."""
    events_init(&known.events, event_memory)
    ring_init(&known.ring, ring_memory)
    ahead_init(&known.ahead)
    kept_init(&known.kept)
    return (handles_init(&known.handles) or names_init(&known.names) or attributes_init(&known.attributes)
            or grants_init(&known.grants) or listings_init(&known.listings) or written_init(&known.written))


cdef inline void known_free(Known *known) noexcept nogil:
    """Only when no other thread knows it any more."""
    handles_free(&known.handles)
    names_free(&known.names)
    attributes_free(&known.attributes)
    events_free(&known.events)
    ring_free(&known.ring)
    ahead_free(&known.ahead)
    kept_free(&known.kept)
    grants_free(&known.grants)
    listings_free(&known.listings)
    written_free(&known.written)


cdef inline int64_t now(timespec *time) noexcept nogil:
    """In nanoseconds, too."""
    clock_gettime(CLOCK_REALTIME, time)
    return <int64_t>time.tv_sec * 1000000000 + time.tv_nsec


cdef inline int tell_attributes(Known *known, uint64_t ino, const fuse_attr_out *answer, int fd) noexcept nogil:
    """Python says what GETATTR is to be answered with: 0 or ENOMEM. It is not kept while Python does not know of what was done here
    to that file; what is done after we have looked changes or drops it."""
    cdef int code = attributes_put(&known.attributes, ino, answer, fd)
    if change_pending(&known.ring, ino):
        attributes_drop(&known.attributes, ino)
    return code


cdef inline bint attributes_of(Known *known, uint64_t ino, fuse_attr_out *answer) noexcept nogil:
    """GETATTR of what Python told of, and of what was made here. While an UNLINK waits of which it is not known here what file it
    concerns, files are Python's."""
    if not attributes_copy(&known.attributes, ino, answer):
        return False
    if known.ahead.any_foreign and answer.attr.mode & MODE_FORMAT == MODE_REGULAR:  # as `Files.with_staged`
        answer.attr.blocks = min(answer.attr.blocks, (answer.attr.size + 4095) // 4096 * 8)
    return answer.attr.mode & MODE_FORMAT == MODE_FOLDER or not unknown_removals_pending(&known.ring)


cdef inline bint make_file(Known *known, const uint8_t *message, size_t size, fuse_create_out *answer) noexcept nogil:
    """CREATE with a spare. Python's: no spare, a folder that is not known, a name that may exist, anything unusual."""
    cdef NameRecord record
    cdef Spare spare
    cdef fuse_attr_out folder, file
    cdef timespec times[2]
    cdef uint64_t key
    cdef bint foreign = is_foreign(&known.ahead, (<const fuse_in_header *>message).pid)
    if known.ring.ring == NULL or not read_create(message, size, &record):
        return False
    key = name_hash(record.folder, record.name, record.name_bytes)
    if not names_lack(&known.names, key) or not attributes_copy(&known.attributes, record.folder, &folder):
        return False
    if folder.attr.mode & MODE_SETGID:
        record.gid = folder.attr.gid
    record.time_ns = now(&times[0])
    clock_gettime(CLOCK_REALTIME_COARSE, &times[1])  # modified: as the kernel will say of a write, which must not seem earlier
    if names_add(&known.names, key):
        return False
    if not ring_give(&known.ring, &record, &spare):
        names_remove(&known.names, key)
        return False
    ahead_created(&known.ahead, record.folder, foreign, spare.ino, spare.fh, spare.fd)
    futimens(spare.fd, times)
    attributes_touch(&known.attributes, record.folder, record.time_ns)
    answer_create(&record, answer)
    answer.attr.mtime, answer.attr.mtimensec = <uint64_t>times[1].tv_sec, <uint32_t>times[1].tv_nsec
    file.attr_valid, file.attr_valid_nsec, file.padding, file.attr = answer.attr_valid, 0, 0, answer.attr
    names_tell(&known.names, key, record.ino)
    attributes_fill(&known.attributes, record.ino, &file)
    edit_open(&known.handles, &answer.opened)
    return True


cdef inline bint remove_name(Known *known, const uint8_t *message, size_t size) noexcept nogil:
    """UNLINK. The kernel has seen that the name is there, is no folder, and may be removed; it holds the folder's lock. Python's:
    a folder that is not known, a name that is not, anything unusual."""
    cdef NameRecord record
    cdef fuse_attr_out folder
    cdef timespec time
    cdef uint64_t key
    if known.ring.ring == NULL or not read_unlink(message, size, &record) or record.folder >> VIRTUAL_SHIFT:
        return False
    key = name_hash(record.folder, record.name, record.name_bytes)
    if not names_hold(&known.names, key) or not attributes_copy(&known.attributes, record.folder, &folder):
        return False
    record.time_ns = now(&time)
    record.ino = names_inode(&known.names, key)
    if not ring_remove(&known.ring, &record):
        return False
    attributes_drop(&known.attributes, record.ino)
    names_remove(&known.names, key)
    attributes_touch(&known.attributes, record.folder, record.time_ns)
    return True


cdef inline bint move_name(Known *known, const uint8_t *message, size_t size) noexcept nogil:
    """RENAME of a file to a name that is absent. The kernel has checked it, and holds the locks of both folders. Python's: a name
    of which it is not known here whose it is, a file or folder whose attributes are not, anything unusual."""
    cdef NameRecord old, new
    cdef fuse_attr_out file, folder
    cdef timespec time
    cdef uint64_t key, new_key
    if known.ring.ring == NULL or not read_rename(message, size, &old, &new) or (old.folder | new.folder) >> VIRTUAL_SHIFT:
        return False
    key = name_hash(old.folder, old.name, old.name_bytes)
    new_key = name_hash(new.folder, new.name, new.name_bytes)
    old.ino = new.ino = names_inode(&known.names, key)
    if not old.ino or not names_hold(&known.names, key) or not names_lack(&known.names, new_key):
        return False
    if not attributes_copy(&known.attributes, old.ino, &file) or file.attr.mode & MODE_FORMAT != MODE_REGULAR:
        return False
    if not attributes_copy(&known.attributes, old.folder, &folder) or not attributes_copy(&known.attributes, new.folder, &folder):
        return False
    old.time_ns = new.time_ns = now(&time)
    if names_add(&known.names, new_key):
        return False
    if not ring_move(&known.ring, &old, &new):
        names_remove(&known.names, new_key)
        return False
    names_remove(&known.names, key)
    names_tell(&known.names, new_key, old.ino)
    attributes_change(&known.attributes, old.ino, old.time_ns)
    attributes_touch(&known.attributes, old.folder, old.time_ns)
    attributes_touch(&known.attributes, new.folder, old.time_ns)
    return True


cdef inline bint open_file(Known *known, const uint8_t *message, fuse_open_out *answer) noexcept nogil:
    """OPEN for reading by a grant. Python's: no grant, for writing, sent again."""
    cdef const fuse_in_header *head = <const fuse_in_header *>message
    cdef const fuse_open_in *arg = <const fuse_open_in *>(message + sizeof(fuse_in_header))
    if arg.flags & (OPEN_ACCMODE | OPEN_TRUNC) or head.unique >> 63:
        is_foreign(&known.ahead, head.pid)  # remembered for when Python has opened it
        return False
    answer.fh, answer.open_flags, answer.backing_id = grants_open(&known.grants, &known.handles, &known.events, head), 0, 0
    if not answer.fh:
        return False
    edit_open(&known.handles, answer)
    return True


cdef inline bint open_folder(Known *known, const fuse_in_header *head, fuse_open_out *answer) noexcept nogil:
    """OPENDIR; its handle tells listings apart and stands for nothing that must be released. Those of .cascade are Python's."""
    if not known.listings.taken_by_python or head.nodeid >> VIRTUAL_SHIFT:
        return False
    answer.fh, answer.open_flags, answer.backing_id = 0, 0, 0
    if head.opcode == FUSE_OPENDIR:
        answer.fh, answer.open_flags = listings_open(&known.listings), listing_flags(&known.listings, head.nodeid)
    return True


cdef inline bint keep_release(Known *known, const uint8_t *message) noexcept nogil:
    """Put a RELEASE aside for Python. Handles that Python never announced are its own affair."""
    cdef uint64_t fh = (<fuse_release_in *>(message + sizeof(fuse_in_header))).fh
    cdef Handle *handle = handles_borrow(&known.handles, fh)
    if handle == NULL:
        return False
    ahead_released(&known.ahead, fh, handle.fd)
    handles_return(&known.handles, handle)
    return events_put(&known.events, FUSE_RELEASE, fh, 0, 0, 0)


cdef inline int allocate_file(Known *known, const uint8_t *message) noexcept nogil:
    """FALLOCATE: 0 or an errno; -1: Python's."""
    cdef fuse_fallocate_in *arg = <fuse_fallocate_in *>(message + sizeof(fuse_in_header))
    cdef int code = EOPNOTSUPP
    cdef Handle *handle = handles_borrow(&known.handles, arg.fh)
    if handle == NULL:
        return EBADF
    if handle.guarded:
        code = -1
    elif handle.fd >= 0:
        code = allocate_range(handle.fd, <int>arg.mode, <int64_t>arg.offset, <int64_t>arg.length)
        written_note(&known.written, (<const fuse_in_header *>message).nodeid, arg.offset, arg.length)
        if code in (ENOSPC, EDQUOT) and handle.served and handle.writable:
            code = -1  # as a WRITE without space
    handles_return(&known.handles, handle)
    return code


cdef inline int seek_file(Known *known, const uint8_t *message, fuse_lseek_out *answer) noexcept nogil:
    """LSEEK: 0, an errno, or -1: there is no descriptor to seek in."""
    cdef fuse_lseek_in *arg = <fuse_lseek_in *>(message + sizeof(fuse_in_header))
    cdef int64_t found
    cdef Handle *handle = handles_borrow(&known.handles, arg.fh)
    if handle == NULL:
        return EBADF
    if handle.fd < 0:
        handles_return(&known.handles, handle)
        return -1
    found = seek_content(handle.fd, arg.offset, arg.whence)
    handles_return(&known.handles, handle)
    answer.offset = <uint64_t>found
    return 0 if found >= 0 else <int>-found
