"""`.cascade/` at the root of the mount: what the filesystem knows, as files. Not listed, for root and the owner only.

Owns: their inode numbers and texts. Invariants: (1) numbers from FIRST on are never those of real inodes. (2) Nothing here
can be changed or removed through the mount. (3) The bytes of by-hash/ are those of an object: verified, never staged ones.
"""

import errno
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from cascadefs.config import Configuration
from cascadefs.errors import os_error
from cascadefs.metadata.namespace import ROOT
from cascadefs.stats import metrics, status
from cascadefs.store import Store
from cascadefs.types import Inode, Object

NAME = b".cascade"
FIRST = 1 << 60  # by-hash/<address>: FIRST + object number
FOLDER, BY_HASH = 1 << 61, (1 << 61) + 1
TEXTS = (b"stats", b"tiers", b"config", b"metrics", b"flush")
FLUSH = BY_HASH + len(TEXTS)  # its fsync makes everything durable
FLUSH_TEXT = b"fsync of this file makes everything durable: cascadefs flush\n"


def is_virtual(ino: int) -> bool:
    """Whether an inode number belongs here."""
    return ino >= FIRST


class Virtual:
    """The folder of one mount. `facts` is what only the mount knows (its mode, for instance)."""

    def __init__(self, store: Store, configuration: Configuration, facts: Callable[[], dict[str, Any]]) -> None:
        self.store, self.configuration, self.facts = store, configuration, facts
        self._since = time.time_ns()

    def lookup(self, parent: int, name: bytes) -> Inode | None:
        """The inode of a name in one of the folders here, or of the folder itself in the root."""
        if name in (b".", b".."):
            return self.inode(parent if name == b"." or parent != BY_HASH else FOLDER)
        if parent == ROOT:
            return self.inode(FOLDER) if name == NAME else None
        if parent == FOLDER:
            return next((inode for _, entry, inode in self.listing(FOLDER, 0) if entry == name), None)
        found = self.store.index.by_address(os.fsdecode(name)) if parent == BY_HASH else None
        return self.inode(FIRST + found.oid) if found else None

    def listing(self, parent: int, after: int) -> Iterator[tuple[int, bytes, Inode]]:
        """(cookie, name, inode) as Namespace.listing()."""
        names = [*TEXTS, b"by-hash"] if parent == FOLDER else [os.fsencode(a) for a in self.store.index.addresses()]
        for at, name in enumerate(names[after:], after + 1):
            inode = self.inode(BY_HASH + at) if parent == FOLDER and name in TEXTS else None
            inode = inode or (self.inode(BY_HASH) if parent == FOLDER else self.lookup(parent, name))
            if inode is not None:
                yield at, name, inode

    def inode(self, ino: int) -> Inode:
        """Attributes; texts have size 0 as in /proc, because they are made when opened."""
        is_folder = ino in (FOLDER, BY_HASH)
        # The owner may write to the folder only so that the kernel lets its attribute drop-memory through.
        folder_mode = 0o700 if ino == FOLDER else 0o500
        mode, size = (stat.S_IFDIR | folder_mode, 0) if is_folder else (stat.S_IFREG | 0o400, 0)
        if FIRST < ino < FOLDER:
            size = self.object(ino).size_bytes
        links, now = 2 if is_folder else 1, self._since
        return Inode(ino, mode, os.getuid(), os.getgid(), links, 0, size, now, now, now, 0, None, None, None, 0)

    def object(self, ino: int) -> Object:
        """The object behind a by-hash number."""
        found = self.store.index.find_oid(ino - FIRST)
        if found is None:
            raise os_error(errno.ESTALE)
        return found

    def text(self, ino: int) -> bytes:
        """The content of one of TEXTS, now."""
        if ino == FLUSH:
            return FLUSH_TEXT
        document = status(self.store, self.facts())
        name = TEXTS[ino - BY_HASH - 1]
        if name == b"metrics":
            return metrics(document)
        settings, origins = asdict(self.configuration.settings), self.configuration.origins
        config = {key: {"value": str(value), "origin": origins[key]} for key, value in settings.items()}
        shown = {b"stats": document, b"tiers": document["tiers"], b"config": config}[name]
        return (json.dumps(shown, indent=2) + "\n").encode()

    async def read(self, ino: int, offset: int, size: int, text: bytes) -> bytes:
        """Bytes of an open file here; `text` is what was made at open()."""
        if ino > FOLDER:
            return text[offset : offset + size]
        found = self.object(ino)
        return await self.store.streams.read_object(found.oid, offset, min(size, max(0, found.size_bytes - offset)))
