"""What is known of the durable version of a file that is open for writing, and whether the writes to it are seen.

Owns: nothing; patches.py keeps it. Invariant: while `base` is set, the file differs from that version, with the patches of the
log on top, at most in what the watcher has seen since the last sync, or in pages whose fingerprints are not those of `prints`.
"""

from dataclasses import dataclass, field

import trio

from cascadefs.tiers.patch_log import PatchLog

Range = tuple[int, int]  # offset and length


@dataclass(eq=False, slots=True)
class Kept:
    """Of one inode. `base`: the durable object, None: not known; `size_bytes` and `mtime_ns`: of the durable
    version, patches included."""

    base: int | None = None
    size_bytes: int = 0
    mtime_ns: int = 0
    log: PatchLog | None = None
    is_seen: bool = False  # by the watcher
    wants_prints: bool = False
    prints: bytearray | None = None  # 16 bytes for each page of the durable version
    lock: trio.Lock = field(default_factory=trio.Lock)
