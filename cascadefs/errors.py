"""Every exception that cascadefs raises on purpose.

Owns: the exception types. A UserError carries one line that says what, why and what to do; the command line prints it and
exits 1. Errors of a file operation are plain OSError with an errno: the mount hands the errno on.
"""

import errno
import os
import sqlite3

GONE = (FileNotFoundError, NotADirectoryError)  # there is no such file; what was its folder may be one by now


class UserError(Exception):
    """The user can put it right; str() is one line."""


class ConfigError(UserError):
    """A setting is unknown, impossible or unreadable."""


class StoreError(UserError):
    """The store cannot be opened: missing, in use, or of another format."""


class CorruptRecord(OSError):
    """Bytes read back are not the bytes written. An OSError with EIO, so that the caller of read() gets EIO."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.EIO, what)


def os_error(code: int, what: object = "") -> OSError:
    """An OSError of the right subclass with the usual text."""
    return OSError(code, os.strerror(code), os.fsdecode(what) if isinstance(what, bytes) else str(what))


class UnreadableCopy(OSError):
    """The copy that a block is flushed from cannot be read; the extents are not to blame. `bid` is the block."""

    def __init__(self, e: OSError, bid: int) -> None:
        super().__init__(e.errno, f"a copy cannot be read: {e}")
        self.bid = bid


_ERRNOS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_NOMEM: errno.ENOMEM,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_CANTOPEN: errno.EIO,
    sqlite3.SQLITE_CORRUPT: errno.EIO,
    sqlite3.SQLITE_NOTADB: errno.EIO,
}


def from_sqlite(e: sqlite3.Error) -> OSError | None:
    """What SQLite says of a medium, as the medium says it: a full disk stays ENOSPC. None: no error of a medium."""
    code = getattr(e, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # the low byte is the kind, the rest its variety
    return OSError(_ERRNOS[code], str(e)) if code in _ERRNOS else None
