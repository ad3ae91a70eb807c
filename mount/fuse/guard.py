"""The one guard: what a handler may raise, and what becomes of it.

pyfuse3 ends the session, and with it the mount, on any exception but FUSEError. Invariant: a handler wrapped by `guarded`
raises FUSEError or is cancelled, nothing else; what was not expected is logged with its traceback and becomes EIO.
"""

import errno
import functools
import logging
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pyfuse3

from cascadefs.crash import point
from cascadefs.errors import from_sqlite

log = logging.getLogger(__name__)
R = TypeVar("R")
OF_THE_DISK = (errno.ENOTCONN, errno.ECONNABORTED)  # a FUSE mount below the store died; from ours they would say that we did


def guarded(handler: Callable[..., Awaitable[R]]) -> Callable[..., Awaitable[R]]:
    """Wrap one handler. It sees the files that the transport has made. The answers of others are delivered before its own is
    written: the socket always has room. What somebody took out of memory is no error of a handler's."""

    @functools.wraps(handler)
    async def run(operations: Any, *args: Any) -> R:
        try:
            operations.answered.prepare(handler.__name__)
            result: R = await operations.store.loss.retried(functools.partial(handler, operations, *args))
            return result
        except pyfuse3.FUSEError:
            raise
        except Exception as e:
            raise pyfuse3.FUSEError(errno_of(handler.__name__, e)) from e
        finally:
            point("answer")
            operations.transport.take_replies()

    return run


def errno_of(handler: str, e: Exception) -> int:
    """What the kernel is told of an exception that is being handled. The log has what the kernel's caller cannot know."""
    if isinstance(e, OSError):
        code = errno.EIO if e.errno in OF_THE_DISK else e.errno or errno.EIO
        if code == errno.EIO:  # a full disk is one line in the log, written by health.py
            log.error("%s: %s", handler, e)
        return code
    if isinstance(e, sqlite3.Error):
        found = from_sqlite(e)
        log.error("%s: %s", handler, e, exc_info=found is None)
        return found.errno if found and found.errno else errno.EIO
    log.exception("%s failed", handler)
    return errno.EIO


def guard_all(cls: type[Any]) -> type[Any]:
    """Class decorator: guard every handler that pyfuse3 calls."""
    for name in dir(pyfuse3.Operations):
        handler = cls.__dict__.get(name)
        if not name.startswith("_") and name not in ("init", "stacktrace") and callable(handler):
            setattr(cls, name, guarded(handler))
    return cls
