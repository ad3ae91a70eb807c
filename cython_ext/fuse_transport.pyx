# The relay between /dev/fuse and pyfuse3, which believes that its end of a socket pair is the device.
#
# Owns: message buffers, the tables, the readers of the device. Borrows both descriptors. Knows nothing of names, tiers or objects:
# Python tells it. A request is answered here when a handle's descriptor is enough (READ, WRITE), when pyfuse3 lacks it (FALLOCATE,
# LSEEK), when nobody waits for its effect (RELEASE, FORGET: Python takes them later, in one go), when Python said beforehand what
# is so (LOOKUP of absent names, GETATTR of folders and files in use, GETXATTR of capabilities that no file has), has made a file
# in advance (CREATE), has granted the opening of an object (OPEN), or will enter what is recorded (UNLINK, RENAME). READDIRPLUS waits for
# Python, which answers past pyfuse3; all else is forwarded, some of it put as something else (as_others.pxd; relay.pxd).
# Of answers only those to INIT, OPEN and CREATE are changed.
# Invariants:
# (1) Every request that has an answer gets exactly one: here, by answer_listing(), or from pyfuse3 after it was forwarded.
# (2) FALLOCATE and LSEEK never get ENOSYS: the kernel would not ask again as long as the mount lives.
# (3) A WRITE that finds no space goes to pyfuse3 untouched.
# (4) The loops touch no Python object. Locks: each is held for a few memory accesses; never two at once but as open_grants.pxd says.

from cython_ext.transport.allocate_ahead cimport ahead_created, ahead_opened, ahead_released, ahead_stop, ahead_watch, gaps_taken
from cython_ext.transport.answers_here cimport files_answered, names_answered
from cython_ext.transport.as_others cimport put_as_other
from cython_ext.transport.attribute_table cimport attributes_drop
from cython_ext.transport.doorbell cimport Doorbell, bell_arm, bell_free, bell_init, bell_ring
from cython_ext.transport.event_queue cimport EventRing, events_count, events_done, events_taken
from cython_ext.fuse_abi cimport *
from cython_ext.transport.handle_table cimport (
    Handle, close_backing, handles_copy, handles_drop, open_backing, pthread_mutex_destroy, pthread_mutex_init)
from cython_ext.transport.kept_writes cimport taken_write
from cython_ext.transport.listing_queue cimport Listing, listings_keep, listings_take
from cython_ext.transport.message_io cimport PAGE, POLLIN, WRITE_HEAD, aligned_buffer, await_ready, count, least_bytes
from cython_ext.transport.name_ring cimport SPARES_MAX, NameRing, allow_removals, spares_put, spares_withdraw
from cython_ext.transport.name_table cimport name_hash, names_add, names_remove, names_tell
from cython_ext.transport.open_grants cimport grants_drop, grants_put
from cython_ext.transport.own_answers cimport Known, known_free, known_init, tell_attributes
from cython_ext.transport.page_pipe cimport PIPE_BYTES, PagePipe, pipe_free, pipe_init
from cython_ext.transport.positioned_io cimport allocate_range
from cython_ext.transport.reader_threads cimport (
    ReaderThread, ReaderThreads, reader_may_read, reader_works, readers_enter, readers_leave, readers_stop)
from cython_ext.transport.reader_scheduling cimport CallerCore, core_to_follow, move_to
from cython_ext.transport.relay cimport INIT_MAX, Relay, drain_replies, forward, replay_unique
from cython_ext.transport.request_memory cimport REQUEST_SLOTS, requests_free, requests_init
from cython_ext.transport.served_io cimport WRITE_DONE, WRITE_GUARDED, WRITE_KEPT, WRITE_KILLS, WRITE_SYNCED, read_served, write_served
from cython_ext.transport.written_ranges cimport Written, written_begin, written_end, written_lose, written_note, written_take
from cython_ext.transport.wire cimport Wire, answer, refuse, send_body, told
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, EINVAL, EIO, ENODEV, ENOENT, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset
from posix.unistd cimport read

from os import strerror

from cascadefs.ext.opcodes import OPCODE_NAMES

cdef enum:
    MIN_MESSAGE = 8192  # FUSE_MIN_READ_BUFFER
    MAX_MESSAGE = 64 << 20

EVENT_RING_BYTES = sizeof(EventRing)
NAME_RING_BYTES = sizeof(NameRing)
SPARES_AT_MOST = SPARES_MAX
FOPEN_DIRECT_IO = OPEN_DIRECT_IO
FOPEN_KEEP_CACHE = OPEN_KEEP_CACHE
FOPEN_NOFLUSH = OPEN_NOFLUSH
FOPEN_PASSTHROUGH = OPEN_PASSTHROUGH
WRITE_IS_DONE, WRITE_IS_SYNCED, WRITE_IS_KEPT = WRITE_DONE, WRITE_SYNCED, WRITE_KEPT
WRITE_TAKES_PRIVILEGES, WRITER_MAY_NOT_KEEP_SETID = WRITE_GUARDED, WRITE_KILLS
LARGEST_SPLICED_READ = PIPE_BYTES - PAGE  # a page is its header's

cdef int check(int code) except -1:
    if code:
        raise OSError(code, strerror(code))
    return 0


cdef class Transport:
    cdef Wire wire
    cdef uint8_t *reply_buffer
    cdef Relay relay
    cdef bint splicing, whole_writes
    cdef bint made, capabilities  # the latter: whether any file may have the xattr security.capability
    cdef Known known
    cdef ReaderThreads readers
    cdef Doorbell bell
    cdef uint8_t[::1] event_memory, ring_memory  # kept alive

    def __cinit__(self, int device_fd, int socket_fd, *, bint passthrough, bint splicing = False, uint8_t[::1] events = None,
                  uint8_t[::1] ring = None, bint whole_writes = True, size_t max_message_bytes = (1 << 20) + (1 << 16)):
        """`events`: EVENT_RING_BYTES of memory that outlives this process, for what was answered and not yet taken.
        `ring`: NAME_RING_BYTES of the memory tier, for names that are made and removed here; without it none is.
        `splicing`: answer large READs through a pipe. Only with a true FUSE device: a socket would cut them into many messages.
        `whole_writes`: whether the socket takes the longest WRITE."""""
        if not MIN_MESSAGE <= max_message_bytes <= MAX_MESSAGE:
            raise ValueError(f"max_message_bytes must be between {MIN_MESSAGE} and {MAX_MESSAGE}")
        self.wire.device_fd, self.wire.socket_fd = device_fd, socket_fd
        self.relay.message_max, self.relay.passthrough_wanted, self.splicing = max_message_bytes, passthrough, splicing
        self.whole_writes, self.reply_buffer = whole_writes, aligned_buffer(max_message_bytes)
        self.event_memory = bytearray(sizeof(EventRing)) if events is None else events
        self.ring_memory = ring
        if <size_t>self.event_memory.shape[0] != sizeof(EventRing):
            raise ValueError("the ring of events has another size")
        if ring is not None and <size_t>ring.shape[0] != sizeof(NameRing):
            raise ValueError("the ring of names has another size")
        if known_init(&self.known, &self.event_memory[0], &ring[0] if ring is not None else NULL):
            raise MemoryError()
        self.made = True
        if bell_init(&self.bell) or requests_init(&self.relay.requests):
            raise MemoryError()
        pthread_mutex_init(&self.readers.mutex, NULL)
        self.capabilities = True

    def __dealloc__(self):
        free(self.reply_buffer)
        requests_free(&self.relay.requests)
        if self.made:
            known_free(&self.known)
            bell_free(&self.bell)
            pthread_mutex_destroy(&self.readers.mutex)

    # --- Python's side -------------------------------------------------------------------------------------------

    def read_requests(self):
        """Relay requests until the mount is gone or stop() was called. One thread each; several may call it.

        OSError when the device or the socket fails. The request at hand then has no answer: the kernel sends it again
        to the next owner of the device (FUSE_NOTIFY_RESEND), or ends it when the last one closes the device.
        """
        cdef uint8_t *buffer = aligned_buffer(self.relay.message_max)
        cdef ReaderThread *reader = readers_enter(&self.readers)
        cdef PagePipe pipe
        cdef int code = EAGAIN
        pipe_init(&pipe, self.splicing)
        with nogil:
            if reader != NULL:
                code = self.request_loop(reader, buffer + PAGE, &pipe)
                readers_leave(&self.readers, reader)
            pipe_free(&pipe)
            free(buffer)
        check(code)

    def take_replies(self):
        """Hand the answers that pyfuse3 has written so far to the kernel; False once it has closed its end. Never waits
        for one. Called in the thread that pyfuse3 runs in: a thread of its own would cost each answer a wake-up."""
        cdef int code
        with nogil:
            code = drain_replies(&self.relay, &self.wire, &self.known, self.reply_buffer)
        if code == ECONNRESET:
            return False
        check(code)
        return True

    def stop(self):
        """Let every read_requests() return before its next request, for good. None that was read is lost."""
        cdef int code
        with nogil:
            ahead_stop(&self.known.ahead)
            code = readers_stop(&self.readers)
        check(code)

    def arm(self):
        """A descriptor that is readable after the next request that `came` does not count yet, or ring()."""
        bell_arm(&self.bell)
        return self.bell.fd

    def ring(self):
        """There is something for whoever sleeps since arm(), if somebody does."""
        bell_ring(&self.bell)

    @property
    def came(self):
        """How many requests have come so far and were not malformed."""
        return self.wire.counters.served + self.wire.counters.forwarded

    def set_handle(self, uint64_t fh, *, int fd = -1, int backing_id = 0, uint32_t open_flags = 0, bint served = False,
                   bint writable = False, bint guarded = False):
        """Insert or replace what is known of `fh`. Afterwards the descriptor known before may be closed.

        fd: for FALLOCATE, LSEEK and, if `served`, READ and, if also `writable`, WRITE. Not O_APPEND, not O_DIRECT.
        guarded: a WRITE, which takes privileges from the file, is marked and forwarded; so is FALLOCATE, as a SETXATTR.
        Without a descriptor LSEEK is forwarded, as a GETXATTR. open_flags: FOPEN_* for the answer to OPEN or CREATE.
        """
        cdef Handle handle
        cdef int code
        handle.fh, handle.fd, handle.backing_id, handle.open_flags = fh, fd, backing_id, open_flags
        handle.served, handle.writable, handle.guarded = served, writable, guarded
        handle.busy = 0
        with nogil:
            code = handles_copy(&self.known.handles, &handle)
        check(code)

    def drop_handle(self, uint64_t fh):
        """Forget `fh`, known or not. Afterwards its descriptor may be closed."""
        with nogil:
            ahead_released(&self.known.ahead, fh, -1)
            handles_drop(&self.known.handles, fh)

    def watch_writers(self):
        """Allocate ahead of writers in other memory cgroups, and see who writes with gaps, until stop(). In a thread."""
        with nogil:
            ahead_watch(&self.known.ahead, &self.known.handles, &self.bell)

    def watch(self, uint64_t ino, uint64_t fh, uint64_t new_in = 0, int fd = -1):
        """Watch a file that is open for writing by a handle that was set. `new_in`: its folder, if it was just made, as `fd`."""
        cdef bint foreign = self.relay.passthrough_agreed and self.known.ahead.any_foreign
        with nogil:
            if new_in:
                ahead_created(&self.known.ahead, new_in, foreign, ino, fh, fd)
            else:
                ahead_opened(&self.known.ahead, ino, fh, foreign)

    def allow_ahead(self, int64_t size_bytes):
        """So much may be allocated ahead from now on."""
        self.known.ahead.room = size_bytes

    def pads(self):
        """Whether anything may have been allocated ahead."""
        return self.known.ahead.any_foreign

    def take_gaps(self):
        """Inodes that turned out to be written with gaps, since the last call."""
        return gaps_taken(&self.known.ahead)

    def begin_written(self, uint64_t ino):
        """Nothing of this file was written so far. False: there are too many such files."""
        return written_begin(&self.known.written, ino)

    def note_written(self, uint64_t ino, uint64_t offset, uint64_t length):
        """Somebody else has written to a file."""
        written_note(&self.known.written, ino, offset, length)

    def lose_written(self, uint64_t ino):
        """A file has changed: what of it, nobody knows."""
        written_lose(&self.known.written, ino)

    def take_written(self, uint64_t ino):
        """[(offset, length)] of what was written since begin_written() or the last call; None: that is not known."""
        cdef Written taken
        cdef uint32_t i
        if not written_take(&self.known.written, ino, &taken):
            return None
        return [(taken.ranges[i].offset, taken.ranges[i].length) for i in range(taken.count)]

    def end_written(self, uint64_t ino):
        written_end(&self.known.written, ino)

    def backing_open(self, int fd):
        """Register a file for passthrough: its backing_id. Best read-only: then this process does not count as a writer."""
        cdef int backing_id
        with nogil:
            backing_id = open_backing(self.wire.device_fd, fd)
        check(errno if backing_id < 0 else 0)
        return backing_id

    def backing_close(self, int backing_id):
        cdef int code
        with nogil:
            code = close_backing(self.wire.device_fd, <uint32_t>backing_id)
        check(errno if code < 0 else 0)

    def replay_init(self, const uint8_t[::1] message):
        """Say INIT to pyfuse3 in the kernel's stead, which says it once in the life of a mount. Before read_requests().

        Its answer stays here; instead the kernel is told to send again what the last worker has not answered. A request that
        was read before that would come twice: read_requests() only when `is_ready`.
        """
        cdef uint8_t copy[INIT_MAX]
        cdef size_t size = <size_t>message.shape[0]
        if not least_bytes(FUSE_INIT) <= size <= INIT_MAX:
            raise ValueError("not an INIT request")
        memcpy(copy, &message[0], size)
        (<fuse_in_header *>copy).unique = replay_unique()
        check(forward(&self.relay, &self.wire, copy, size, EIO))

    @property
    def is_ready(self):
        """Whether INIT was answered, the kernel's or that of replay_init(): other requests are served from here on."""
        return self.relay.ready

    @property
    def init_request(self):
        """The kernel's INIT; empty before it came."""
        return bytes(self.relay.init_message[:self.relay.init_size])

    def request_of(self, uint32_t token):
        """The unique number of a request that `is_told_once`, by what its handler finds where the caller's pid would be.
        The highest bit is set when it was sent again."""
        return self.relay.requests.uniques[token % REQUEST_SLOTS]

    def allocate(self, int fd, int mode, int64_t offset, int64_t length):
        """fallocate(2), with what the transport adds to it. Not for the thread of trio: it may take a while."""
        cdef int code
        with nogil:
            code = allocate_range(fd, mode, offset, length)
        check(code)

    def take_write(self, uint64_t number):
        """The bytes of a WRITE that was told with WRITE_IS_KEPT, once. KeyError: they are not here."""
        found = taken_write(&self.known.kept, number)
        if found is None:
            raise KeyError(number)
        return found

    def pid_of(self, uint32_t token):
        """The caller's pid, which was there."""
        return self.relay.requests.pids[token % REQUEST_SLOTS]

    def events_done(self):
        """All that take_events() gave so far has had its effect."""
        events_done(&self.known.events)

    def events_put(self):
        """How many events there have been; those up to here may be taken once the changes of names before them are known."""
        return events_count(&self.known.events)

    def take_events(self, uint64_t limit):
        """Among the first `limit` and since the last call, in their order: [(handle, inode, request, backing id)] opened by a grant,
        [handle] released, [(inode, lookups)] forgotten. A handle is opened before it is released."""
        return events_taken(&self.known.events, limit)

    def add_spare(self, uint64_t ino, uint64_t fh, int fd, int backing_id):
        """An empty file to answer a CREATE with; its handle `fh` was set, `fd` stays open. False when there are enough."""
        return spares_put(&self.known.ring, ino, fh, fd, backing_id)

    def withdraw_spare(self):
        """The inode of a spare that will not be used; 0 when there is none left."""
        return spares_withdraw(&self.known.ring)

    def allow_removals(self, bint allowed):
        """Whether UNLINK may be answered here: the ring must be able to be entered into the index."""
        allow_removals(&self.known.ring, allowed)

    def number_grants(self, uint64_t first_fh):
        """Handles made from grants have this number and those that follow. Without it no grant is used."""
        self.known.grants.next_fh = first_fh

    def grant(self, uint64_t ino, int fd, int backing_id, uint32_t open_flags, bint served = False):
        """Answer OPEN of this inode for reading from now on. `fd` and the backing id stay open as long as a handle or the
        grant. `served`: as for set_handle()."""
        check(grants_put(&self.known.grants, ino, fd, backing_id, open_flags, served))

    def revoke(self, uint64_t ino):
        """OPEN is Python's again. Those that were answered are among the events by now."""
        grants_drop(&self.known.grants, ino)

    def set_attributes(self, uint64_t ino, const uint8_t[::1] answer, int fd=-1):
        """What GETATTR is answered with: a struct fuse_attr_out, with size and mtime of the staged file `fd`. Zeros: of a spare."""
        if answer.shape[0] != sizeof(fuse_attr_out):
            raise ValueError("not a struct fuse_attr_out")
        check(tell_attributes(&self.known, ino, <const fuse_attr_out *>&answer[0], fd))

    def drop_attributes(self, uint64_t ino):
        """GETATTR of the inode is Python's again. Afterwards its staged file may be closed."""
        attributes_drop(&self.known.attributes, ino)

    def set_capabilities(self, bint exist):
        """Whether any file may have the xattr security.capability; until told otherwise, none is denied."""
        self.capabilities = exist

    def add_name(self, uint64_t folder, const uint8_t[::1] name):
        """Before a name can be found in a folder."""
        check(names_add(&self.known.names, name_hash(folder, &name[0], <size_t>name.shape[0])))

    def remove_name(self, uint64_t folder, const uint8_t[::1] name):
        """After a name can no longer be found."""
        names_remove(&self.known.names, name_hash(folder, &name[0], <size_t>name.shape[0]))

    def tell_name(self, uint64_t folder, const uint8_t[::1] name, uint64_t ino):
        """Whose name it is, which was added: when it is removed here, other files need not be asked of Python meanwhile."""
        names_tell(&self.known.names, name_hash(folder, &name[0], <size_t>name.shape[0]), ino)

    def names_are_complete(self, uint32_t absent_s=0):
        """Every name of the filesystem was added: others do not exist, and the kernel may keep that for so many seconds."""
        self.known.names.absent_s, self.known.names.complete = absent_s, True

    def take_listings(self):
        """From now on next_listing() gives what is asked of folders. A descriptor that is readable when there may be some."""
        self.known.listings.taken_by_python = True
        return self.known.listings.wake_fd

    def next_listing(self):
        """(unique number, folder, handle, position, room in bytes) of a READDIRPLUS that answer_listing() must answer; None: none."""
        cdef Listing one
        if listings_take(&self.known.listings, &one):
            return one.unique, one.folder, one.handle, one.position, one.room

    def answer_listing(self, uint64_t unique, const uint8_t[::1] entries, int code=0):
        """Entries, or the errno `code`. Whether the kernel took them."""
        cdef size_t size = <size_t>entries.shape[0]
        cdef int failed
        with nogil:
            failed = answer(&self.wire, unique, code, NULL, 0) if code else send_body(&self.wire, unique, &entries[0] if size else NULL, size)
        return not failed

    def keep_listing(self, uint64_t folder=0):
        """The kernel has all of that folder, with attributes, and may keep it; 0: it has forgotten some, of whatever folders."""
        listings_keep(&self.known.listings, folder)

    @property
    def negotiated_passthrough(self):
        """Whether the kernel offered passthrough and was told to use it."""
        return self.relay.passthrough_agreed

    def counts(self):
        """Requests by opcode (those that came), bytes served here, what became of the messages, handles known now."""
        return told(&self.wire, OPCODE_NAMES) | {"known_handles": self.known.handles.map.used}

    # --- requests: kernel -> here or pyfuse3 ---------------------------------------------------------------------

    cdef int request_loop(self, ReaderThread *reader, uint8_t *data, PagePipe *pipe) noexcept nogil:
        """0 at the end of the mount or after stop(), else an errno."""
        cdef uint8_t *message = data - WRITE_HEAD
        cdef CallerCore follow
        cdef ssize_t got
        cdef int core, code = 0
        memset(&follow, 0, sizeof(follow))
        while not code and reader_may_read(&self.readers, reader):
            got = read(self.wire.device_fd, message, self.relay.message_max)
            reader_works(reader)
            if got > 0:
                core = -1
                if self.relay.passthrough_agreed:  # else it moves whole contents, and is one of several
                    core = core_to_follow(&follow, (<fuse_in_header *>message).pid)
                code = self.take_request(message, <size_t>got, pipe)
                move_to(&follow, core)
                bell_ring(&self.bell)
            elif got == 0 or errno == ENODEV:
                break
            elif errno == EAGAIN:
                reader_may_read(&self.readers, reader)
                await_ready(self.wire.device_fd, <short>POLLIN)
            elif errno not in (EINTR, ENOENT):  # ENOENT: the request was taken back while it was copied
                code = errno
        reader_works(reader)
        return code

    cdef int take_request(self, uint8_t *message, size_t size, PagePipe *pipe) noexcept nogil:
        """0, or the errno that ends the loop."""
        cdef fuse_in_header *head = <fuse_in_header *>message
        cdef int code
        if size < sizeof(fuse_in_header):
            count(&self.wire.counters.malformed, 1)
            return 0
        count(&self.wire.counters.requests[head.opcode if head.opcode < OPCODE_SLOTS else 0], 1)
        if head.len != size or size < least_bytes(head.opcode):
            count(&self.wire.counters.malformed, 1)
            return refuse(&self.wire, head, EINVAL)
        if head.opcode == FUSE_READ and read_served(&self.known.handles, &self.wire, pipe, message, self.relay.message_max):
            return 0
        if head.opcode == FUSE_WRITE:
            code = write_served(&self.known.handles, &self.known.written, &self.wire, &self.known.kept, message, self.whole_writes, &size)
            return forward(&self.relay, &self.wire, message, size, code) if code else 0
        if names_answered(&self.known, &self.wire, message, size, self.relay.passthrough_agreed, &code):
            return code
        if files_answered(&self.known, &self.wire, message, size, self.capabilities, &code):
            return code
        put_as_other(message)
        return forward(&self.relay, &self.wire, message, head.len, EIO)
