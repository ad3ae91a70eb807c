"""Brings names, contents and copies to agree when a store is opened, whatever happened to the process or to memory.

Owns: the rules of falling back. Runs once, before anything else uses the store; never awaits. Invariants:
(1) Afterwards every staged inode has its file, every dirty object a copy, no file in a tier is unknown to the index.
(2) A content that is gone is replaced by the durable version before it; a file that never had one is absent.
(3) Nothing that could still be read is removed.
"""

import logging
import os
from dataclasses import dataclass

from cascadefs.files import Files
from cascadefs.tiers.files import FileTier
from cascadefs.types import Home, Inode, Object

log = logging.getLogger(__name__)


@dataclass
class Recovered:
    """How many inodes: staged ones found, fallen back to an older version, absent; orphans deleted; files dropped."""

    staged: int = 0
    fallen_back: int = 0
    absent: int = 0
    orphans: int = 0
    dropped_files: int = 0


def recover(files: Files) -> Recovered:
    """See the invariants."""
    result = Recovered()
    with files.database.transaction():
        for ino in files.index.staged_inodes():
            _check_staged(files, files.namespace.get(ino), result)
        for found in files.index.all_dirty():
            _check_dirty(files, found, result)
    for ino in files.namespace.orphans():
        files.delete(files.namespace.get(ino))
        result.orphans += 1
    for tier in (files.residency.memory, files.residency.parking):
        _drop_unknown(files, tier, result)
    files.residency.tidy()
    for digest in files.residency.memory.objects:
        files.residency.policy.touched(digest)
        if (known := files.index.find(digest)) is not None and known.durable:
            files.residency.mark_clean(digest)
    if result.fallen_back or result.absent:
        log.warning("memory was lost: %d files fell back to an older version, %d are absent", result.fallen_back, result.absent)
    return result


def _check_staged(files: Files, inode: Inode, result: Recovered) -> None:
    if files.residency.tier_of(inode.home).has_staged(inode.ino):
        files.to_seal[inode.ino] = 0.0
        result.staged += 1
    else:
        _fall_back(files, inode, result)


def _check_dirty(files: Files, found: Object, result: Recovered) -> None:
    tier = files.residency.holder(found.digest)
    if tier is not None and os.lstat(tier.object_path(found.digest)).st_size == found.size_bytes:
        return
    if tier is not None:
        files.residency.drop(tier, found.digest)
    for ino in files.index.inodes_of(found.oid):
        _fall_back(files, files.namespace.get(ino), result)


def _fall_back(files: Files, inode: Inode, result: Recovered) -> None:
    if inode.durable_oid is None:
        files.index.set_content(inode.ino, Home.NONE, None, 0, keep_fallback=False)
        files.namespace.remove_all_names(inode.ino)
        result.absent += 1
        return
    durable = files.index.object(inode.durable_oid)
    files.index.set_content(inode.ino, Home.NONE, durable.oid, durable.size_bytes)
    files.namespace.update(inode.ino, blocks=-(-durable.size_bytes // 512))
    result.fallen_back += 1


def _drop_unknown(files: Files, tier: FileTier, result: Recovered) -> None:
    for ino in tier.staged():
        inode = files.namespace.find(ino)
        if inode is None or not inode.home or files.residency.tier_of(inode.home) is not tier:
            tier.drop_staged(ino)
            result.dropped_files += 1
