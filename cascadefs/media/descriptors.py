"""How many files this process may have open (RLIMIT_NOFILE), and who gets how many of them; how long they may be.

Owns: the shares. Opens nothing. Invariant: the last quarter of the numbers is never given to a program's file, so that
sealing and flushing, which need descriptors to make progress, find some however many files programs have open.
"""

import errno
import resource

from cascadefs.errors import UserError, os_error

# The daemon itself holds about 30 (device, index, sockets); below this too few would be left for programs.
MINIMUM = 128
RESERVE = 4  # one part in so many; a round of each kind of work behind the programs takes at most a quarter of that:
ROUND = 4 * RESERVE


def limit() -> int:
    """Descriptors that this process may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_limit() -> None:
    """As many as the system allows this process. UserError when those are too few to work with."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < MINIMUM:
        raise UserError(f"at most {most} open files are allowed here, cascadefs needs {MINIMUM}; raise it: ulimit -Hn 4096")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def lift_file_size() -> None:
    """Files may be as long as they will: extents, and what programs write in the portable mode, are written by this process.
    UserError when the system does not allow it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft == resource.RLIM_INFINITY:
        return
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):
        what = f"files of at most {soft} bytes may be written here"
        raise UserError(f"{what}; mount without that limit: ulimit -f unlimited") from None


def share(wanted: int, part: int) -> int:
    """`wanted`, or a `part`-th of all if that is less."""
    return max(1, min(wanted, limit() // part))


def keep_reserve(fd: int) -> None:
    """ENFILE when `fd`, which was just opened for a program's file, is of the reserve; the caller closes it then. The kernel
    hands out the lowest free number: a high one tells that few are left, without counting."""
    most = limit()
    if fd >= most - most // RESERVE:
        raise os_error(errno.ENFILE)
