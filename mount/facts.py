"""`user.cascade.*`: facts about a file as extended attributes. Read-only, answered on request, never listed.

Not listed, so that `cp -a` and `rsync -X` do not try to copy them.
"""

import errno
import json
import stat

from cascadefs.errors import os_error
from cascadefs.store import Store

PREFIX = b"user.cascade."


async def fact(store: Store, ino: int, name: bytes) -> bytes:
    """The value of one of tier, hash, sha256, refs, blocks, info (all of them as JSON); ENODATA for other names."""
    key = name[len(PREFIX) :].decode("ascii", "replace")
    if key not in ("tier", "hash", "sha256", "refs", "blocks", "info") or not stat.S_ISREG(store.namespace.get(ino).mode):
        raise os_error(errno.ENODATA, name)
    if key == "tier":
        return store.tier(store.namespace.get(ino)).encode()
    known = await store.info(ino)
    if key == "info":
        return json.dumps(known).encode()
    value = known["references" if key == "refs" else key]
    if value is None:
        raise os_error(errno.ENODATA, name)
    return str(value).encode()
