# The FUSE wire format, as far as the transport looks into it.
#
# Owns: opcodes, flags, message layouts. Source: Linux include/uapi/linux/fuse.h, protocol 7.45. They are spelled out here
# because the header of the oldest distribution served knows 7.38 and nothing of passthrough. Knows no logic.
# Invariants: (1) All fields are in the byte order of the machine. (2) No struct has padding but what is named.
# (3) In a request `body` follows fuse_in_header at once, in a reply fuse_out_header.

from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t

cdef extern from "<fcntl.h>" nogil:
    int O_DSYNC

cdef enum:
    FUSE_LOOKUP = 1
    FUSE_FORGET = 2
    FUSE_GETATTR = 3
    FUSE_SYMLINK = 6
    FUSE_MKNOD = 8
    FUSE_MKDIR = 9
    FUSE_UNLINK = 10
    FUSE_RMDIR = 11
    FUSE_RENAME = 12
    FUSE_LINK = 13
    FUSE_OPEN = 14
    FUSE_READ = 15
    FUSE_WRITE = 16
    FUSE_RELEASE = 18
    FUSE_SETXATTR = 21
    FUSE_GETXATTR = 22
    FUSE_REMOVEXATTR = 24
    FUSE_INIT = 26
    FUSE_OPENDIR = 27
    FUSE_READDIR = 28
    FUSE_RELEASEDIR = 29
    FUSE_FSYNCDIR = 30
    FUSE_CREATE = 35
    FUSE_INTERRUPT = 36
    FUSE_NOTIFY_REPLY = 41
    FUSE_IOCTL = 39
    FUSE_BATCH_FORGET = 42
    FUSE_FALLOCATE = 43
    FUSE_READDIRPLUS = 44
    FUSE_RENAME2 = 45
    FUSE_LSEEK = 46
    FUSE_TMPFILE = 51
    FUSE_STATX = 52
    OPCODE_SLOTS = 64  # opcodes are counted in an array; 7.45 ends at 53

cdef enum:  # fuse_open_out.open_flags
    OPEN_DIRECT_IO = 1 << 0
    OPEN_KEEP_CACHE = 1 << 1
    OPEN_CACHE_DIR = 1 << 3
    OPEN_NONSEEKABLE = 1 << 2
    OPEN_NOFLUSH = 1 << 5
    OPEN_PARALLEL_DIRECT_WRITES = 1 << 6
    OPEN_PASSTHROUGH = 1 << 7
    # With any other flag beside it the kernel answers a passthrough open(2) with EIO (fs/fuse/iomode.c).
    OPEN_WITH_PASSTHROUGH = (1 << 0) | (1 << 5) | (1 << 6) | (1 << 7)

cdef enum:  # fuse_init_in.flags, fuse_init_out.flags; flags2 holds bits 32 to 63
    INIT_WRITEBACK_CACHE = 1 << 16
    INIT_HANDLE_KILLPRIV_V2 = 1 << 28
    INIT_EXT = 1 << 30
    INIT2_DIRECT_IO_ALLOW_MMAP = 1 << 4
    INIT2_PASSTHROUGH = 1 << 5

cdef enum:  # ioctls of /dev/fuse: _IOW(229, 1, struct fuse_backing_map), _IOW(229, 2, uint32_t)
    DEV_IOC_BACKING_OPEN = (1 << 30) | (16 << 16) | (229 << 8) | 1
    DEV_IOC_BACKING_CLOSE = (1 << 30) | (4 << 16) | (229 << 8) | 2

cdef enum:  # what attributes.py says, too
    STAGED_S = 30
    SETTLED_S = 3600
    BLOCK_BYTES = 4096
    FOLDER_BLOCK_BYTES = 131072
    STATX_OUT_BYTES = 288
    MODE_FORMAT = 0o170000
    MODE_FOLDER = 0o040000
    MODE_REGULAR = 0o100000
    MODE_SETGID = 0o2000
    MODE_SETID = 0o6000
    OPEN_ACCMODE = 0o3
    OPEN_FOR_BOTH = 0o2  # O_RDWR
    OPEN_TRUNC = 0o1000

cdef enum:  # fuse_write_in.write_flags
    WRITE_KILL_SUIDGID = 1 << 2  # the writer has not CAP_FSETID

cdef enum:
    NOTIFY_RESEND = 7  # notifications have unique 0 and their code where replies have the error

ctypedef struct fuse_in_header:
    uint32_t len
    uint32_t opcode
    uint64_t unique
    uint64_t nodeid
    uint32_t uid
    uint32_t gid
    uint32_t pid
    uint16_t total_extlen
    uint16_t padding

ctypedef struct fuse_out_header:
    uint32_t len
    int32_t error
    uint64_t unique

ctypedef struct fuse_init_in:
    uint32_t major
    uint32_t minor
    uint32_t max_readahead
    uint32_t flags
    uint32_t flags2  # and eleven unused words

ctypedef struct fuse_init_out:
    uint32_t major
    uint32_t minor
    uint32_t max_readahead
    uint32_t flags
    uint16_t max_background
    uint16_t congestion_threshold
    uint32_t max_write
    uint32_t time_gran
    uint16_t max_pages
    uint16_t map_alignment
    uint32_t flags2
    uint32_t max_stack_depth  # and six more words

ctypedef struct fuse_open_out:  # the end of the answers to OPEN and to CREATE
    uint64_t fh
    uint32_t open_flags
    int32_t backing_id

ctypedef struct fuse_fsync_in:  # FSYNCDIR, too
    uint64_t fh
    uint32_t fsync_flags
    uint32_t padding

ctypedef struct fuse_io_in:  # READ, WRITE, READDIR, READDIRPLUS; the data of a WRITE follow
    uint64_t fh
    uint64_t offset
    uint32_t size
    uint32_t io_flags
    uint64_t lock_owner
    uint32_t open_flags
    uint32_t padding

ctypedef struct fuse_write_out:
    uint32_t size
    uint32_t padding

ctypedef struct fuse_fallocate_in:
    uint64_t fh
    uint64_t offset
    uint64_t length
    uint32_t mode
    uint32_t padding

ctypedef struct fuse_lseek_in:
    uint64_t fh
    uint64_t offset
    uint32_t whence
    uint32_t padding

ctypedef struct fuse_lseek_out:
    uint64_t offset

ctypedef struct fuse_attr:
    uint64_t ino
    uint64_t size
    uint64_t blocks
    uint64_t atime
    uint64_t mtime
    uint64_t ctime
    uint32_t atimensec
    uint32_t mtimensec
    uint32_t ctimensec
    uint32_t mode
    uint32_t nlink
    uint32_t uid
    uint32_t gid
    uint32_t rdev
    uint32_t blksize
    uint32_t flags

ctypedef struct fuse_attr_out:
    uint64_t attr_valid
    uint32_t attr_valid_nsec
    uint32_t padding
    fuse_attr attr

ctypedef struct fuse_rename_in:
    uint64_t newdir

ctypedef struct fuse_open_in:
    uint32_t flags
    uint32_t open_flags

ctypedef struct fuse_create_in:  # the name follows
    uint32_t flags
    uint32_t mode
    uint32_t umask
    uint32_t open_flags

ctypedef struct fuse_create_out:  # struct fuse_entry_out, then struct fuse_open_out
    uint64_t nodeid
    uint64_t generation
    uint64_t entry_valid
    uint64_t attr_valid
    uint32_t entry_valid_nsec
    uint32_t attr_valid_nsec
    fuse_attr attr
    fuse_open_out opened

ctypedef struct fuse_getxattr_in:  # the name follows
    uint32_t size
    uint32_t padding

ctypedef struct fuse_setxattr_in:  # name and value follow
    uint32_t size
    uint32_t flags

ctypedef struct fuse_forget_in:  # behind the header's nodeid
    uint64_t nlookup

ctypedef struct fuse_batch_forget_in:  # `count` of fuse_forget_one follow
    uint32_t count
    uint32_t padding

ctypedef struct fuse_forget_one:
    uint64_t nodeid
    uint64_t nlookup

ctypedef struct fuse_release_in:  # and flags, lock owner
    uint64_t fh

ctypedef struct fuse_backing_map:
    int32_t fd
    uint32_t flags
    uint64_t padding
