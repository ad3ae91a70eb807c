"""`user.cascade.*`: facts about a file as extended attributes. Read-only, answered on request, never listed.

Not listed, so that `cp -a` and `rsync -X` do not try to copy them.
"""

import errno
import json
import stat
from contextlib import suppress
from typing import Any

from cascadefs.errors import os_error
from cascadefs.store import Store

PREFIX = b"user.cascade."
TRIES = 5


async def fact(store: Store, ino: int, name: bytes) -> bytes:
    """The value of one of tier, hash, sha256, refs, blocks, info (all of them as JSON); ENODATA for other names."""
    key = name[len(PREFIX) :].decode("ascii", "replace")
    if key not in ("tier", "hash", "sha256", "refs", "blocks", "info") or not stat.S_ISREG(store.namespace.get(ino).mode):
        raise os_error(errno.ENODATA, name)
    if key == "tier":
        return store.tier(store.namespace.get(ino)).encode()
    known = await _info(store, ino)
    if key == "info":
        return json.dumps(known).encode()
    value = known["references" if key == "refs" else key]
    if value is None:
        raise os_error(errno.ENODATA, name)
    return str(value).encode()


async def _info(store: Store, ino: int) -> dict[str, Any]:
    """EAGAIN for a file that is changed each time before its address is computed."""
    for _ in range(TRIES):
        with suppress(LookupError):  # the object is no more
            return await store.info(ino)
    raise os_error(errno.EAGAIN, f"inode {ino}")
