"""Requests that pyfuse3 has no handler for and that the transport puts as GETXATTR (cython_ext/transport/as_others.pxd).

Owns: the names of those attributes. The value of each is, byte for byte, the kernel's answer.
"""

import errno

from cascadefs.errors import os_error
from cascadefs.mount.fuse.attributes import statx_answer
from cascadefs.mount.fuse.mappings import Mappings
from cascadefs.mount.fuse.virtual import Virtual, is_virtual
from cascadefs.store import Store

STATX = b"/statx"
LSEEK = b"/lseek"  # with offset and whence, hexadecimal


class Others:
    """Those of one mount."""

    def __init__(self, store: Store, mappings: Mappings, shown: Virtual) -> None:
        self.store, self.mappings, self.virtual = store, mappings, shown

    async def answer(self, ino: int, name: bytes) -> bytes:
        """What becomes of one."""
        words = name.split()
        if words[0] == LSEEK and not is_virtual(ino):
            found = await self.store.streams.seek(ino, int(words[1], 16), int(words[2], 16))
            return found.to_bytes(8, "little")
        if name == STATX:
            return self._statx(ino)
        raise os_error(errno.EINVAL)

    def _statx(self, ino: int) -> bytes:
        """As getattr(), with the time of birth."""
        if is_virtual(ino):
            return statx_answer(self.virtual.inode(ino), None, is_cached=False)
        files = self.store.files
        return statx_answer(files.attributes(ino), files.namespace.born_ns(ino), True, ino in self.mappings)
