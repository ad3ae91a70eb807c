"""Brings names, contents and copies to agree when a store is opened, whatever happened to the process or to memory.

Owns: the rules of falling back. Runs once, before anything else uses the store; never awaits. Invariants:
(1) Afterwards every staged inode has its file, every dirty object a copy, no file in a tier is unknown to the index.
(2) A content that is gone is replaced by the durable version before it; a file that never had one is absent.
(3) Nothing that could still be read is removed.
(4) After a loss of power a staged file in parking is gone, whatever its bytes: nothing can tell whether they are whole. A
    parked copy of an object is kept when its fingerprints say so.
"""

import errno
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from cascadefs.contents.files import Files
from cascadefs.errors import os_error
from cascadefs.ext import hashing
from cascadefs.formats.name_ring import Change, Created, Moved, NameRing, Removed
from cascadefs.integrity.patched import bring_back, is_alone
from cascadefs.metadata.namespace import HOLDER
from cascadefs.tiers import patch_log
from cascadefs.tiers.folder import FileTier
from cascadefs.types import EMPTY_OID, Home, Inode, Object

log = logging.getLogger(__name__)


@dataclass
class Recovered:
    """How many inodes: staged ones found, fallen back to an older version, absent; orphans deleted; files dropped."""

    staged: int = 0
    fallen_back: int = 0
    absent: int = 0
    orphans: int = 0
    dropped_files: int = 0


def enter_pending(files: Files, ring: NameRing, changes: Sequence[Change]) -> None:
    """Enter what the kernel was told just before everything died. What cannot be entered is told, and lost."""
    names = files.namespace
    missing = [one for one in changes if not (one.number and names.is_done(one.folder, one.number))]
    ring.begin(missing, [0] * len(missing))  # before the first of them moves its folder beyond the number of another
    for one in changes:
        if isinstance(one, Created):
            names.keep_clear_of(one.ino)
    for one in missing:
        number = time.time_ns()
        ring.begin([one], [number])
        try:
            _enter_one(files, one, number)
        except OSError as e:
            if e.errno not in (errno.EEXIST, errno.ENOENT, errno.ESTALE):
                raise
            done = {Created: "made", Moved: "moved", Removed: "removed"}[type(one)]
            log.error("a name %s just before a crash cannot be entered: %r in folder %d: %s", done, one.name, one.folder, e)


def _enter_one(files: Files, one: Change, number: int) -> None:
    if isinstance(one, Moved) and _shows(files, one.new_folder, one.new_name, one.ino):
        return  # the index was rebuilt meanwhile, from extents that knew the new name
    if not isinstance(one, Created):
        if not files.namespace.enter([one], [number]):
            raise os_error(errno.ENOENT)
    elif files.namespace.find(one.ino) is None:
        files.namespace.enter([one], [number])
    elif not _shows(files, one.folder, one.name, one.ino):
        log.error("a file made just before a crash is lost: %r in folder %d, inode %d", one.name, one.folder, one.ino)
    # else the index was rebuilt meanwhile, from extents that knew the file


def _shows(files: Files, folder: int, name: bytes, ino: int) -> bool:
    found = files.namespace.lookup(folder, name)
    return found is not None and found.ino == ino


def recover(files: Files, keep_orphans: bool = False) -> Recovered:
    """See the invariants. keep_orphans: those that had a name wait for the kernel to forget them."""
    result = Recovered()
    files.owners.recover(keep_orphans)
    _part_twins(files)
    with files.database.transaction():
        files.index.drop_lost_logs()
        for ino in files.index.staged_inodes():
            _check_staged(files, files.namespace.get(ino), result)
        for found in files.index.all_dirty():
            _check_dirty(files, found, result)
        for ino in [one for one in files.index.logs if is_alone(files, one)]:
            fall_back(files, files.namespace.get(ino), result)
    patch_log.remove_all_but(files.settings.store / patch_log.FOLDER, files.index.logs.items())
    for inode in map(files.namespace.get, files.namespace.orphans()):
        if keep_orphans and inode.target != HOLDER:
            files.lookups[inode.ino] = 1
        else:
            files.delete([inode])
            result.orphans += 1
    for tier in (files.residency.memory, files.residency.parking):
        _drop_unknown(files, tier, result)
    files.residency.take_copies(files.index.copies(durable=True), files.index.copies(durable=False), keep_orphans)
    files.residency.parking.trust()
    if result.fallen_back or result.absent:
        log.warning("memory was lost: %d files fell back to an older version, %d are absent", result.fallen_back, result.absent)
    return result


def _check_staged(files: Files, inode: Inode, result: Recovered) -> None:
    lost = inode.home == Home.COLD and not files.residency.parking.survived
    if inode.ino in files.adrift or (not lost and files.residency.tier_of(inode.home).has_staged(inode.ino)):
        files.to_seal[inode.ino] = 0.0
        result.staged += 1
    else:
        fall_back(files, inode, result)


def _part_twins(files: Files) -> None:
    """A staged file may still have the name of an object: a crash came between the two. It is written to, so it is no copy of
    that object; whoever else shows the object has another copy (owners.py `_part`)."""
    residency = files.residency
    for tier in (residency.memory, residency.parking):
        homes = (files.namespace.get(ino) for ino in files.index.staged_inodes())
        paths = [tier.staged_path(inode.ino) for inode in homes if residency.tier_of(inode.home) is tier]
        found = [os.lstat(path) for path in paths if os.path.lexists(path)]
        twins = {state.st_ino for state in found if state.st_nlink > 1}
        for digest in list(tier.objects) if twins else ():
            if os.lstat(tier.object_path(digest)).st_ino in twins:
                residency.drop(tier, digest)


def _check_dirty(files: Files, found: Object, result: Recovered) -> None:
    while (tier := files.residency.holder(found.digest)) is not None:
        if _is_whole(files, tier, found):
            return
        files.residency.drop(tier, found.digest)
    for ino in files.index.inodes_of(found.oid):
        fall_back(files, files.namespace.get(ino), result)


def _is_whole(files: Files, tier: FileTier, found: Object) -> bool:
    """By its size where writes cannot have been lost, else by its blocks."""
    if tier is files.residency.memory or files.residency.parking.survived:
        return os.stat(tier.object_path(found.digest)).st_size == found.size_bytes
    fd, secret, at = tier.open_object(found.digest), files.database.identity.secret, 0
    buffer = memoryview(bytearray(files.index.block_bytes))
    try:
        if os.fstat(fd).st_size != found.size_bytes:
            return False
        for block in files.index.blocks(found.oid):
            if hashing.read_fingerprint(fd, at, buffer[: block.length], secret) != block.fingerprint:
                return False
            at += block.length
        return True
    finally:
        os.close(fd)


def fall_back(files: Files, inode: Inode, result: Recovered) -> None:
    """The inode shows its durable version, or loses its names."""
    if bring_back(files, inode):
        result.fallen_back += 1
        return
    if inode.durable_oid is None:
        files.index.set_content(inode.ino, Home.NONE, None, 0, keep_fallback=False)
        files.namespace.remove_all_names(inode.ino)
        result.absent += 1
        return
    if inode.durable_oid == EMPTY_OID:
        files.index.set_content(inode.ino, Home.NONE, None, 0)
        files.namespace.update(inode.ino, blocks=0)
        result.fallen_back += 1
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
