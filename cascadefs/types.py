"""Frozen values that travel between the layers. Owns no behaviour beyond arithmetic; knows no file and no clock."""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple


class Home(IntEnum):
    """Where the staged (mutable) bytes of an inode lie. The numbers are stored in the index: never renumber."""

    NONE = 0
    MEMORY = 1
    COLD = 2


EMPTY_OID = 0  # as durable_oid: the inode falls back to no bytes at all. No object has this number: they count from 1

Print = tuple[bytes, int]  # fingerprint and length of a block


class Location(NamedTuple):
    """Where a record starts: extent number, byte offset of its header, payload length in bytes."""

    extent: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Block:
    """One block of an object. `location` is None until the block is durable in the cold tier."""

    bid: int
    fingerprint: bytes
    length: int
    location: Location | None


@dataclass(frozen=True, slots=True)
class Object:
    """Immutable content: `digest` names it (16 bytes over size and block fingerprints); `durable` when all blocks are cold."""

    oid: int
    digest: bytes
    size_bytes: int
    durable: bool


@dataclass(frozen=True, slots=True)
class Inode:
    """One row of the namespace. Times are nanoseconds since the epoch. `blocks`: allocated, 512 bytes each.

    Content: staged if `home`, else `oid`, else empty."""

    ino: int
    mode: int
    uid: int
    gid: int
    nlink: int
    rdev: int
    size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    home: int
    oid: int | None
    durable_oid: int | None
    target: bytes | None
    blocks: int
