"""Bytes <-> values of a manifest: what a rebuild of the index needs to know beyond the blocks. FORMAT.md draws the document.

Owns: the document inside a record of kind MANIFEST. Does no I/O and knows no table. Invariants:
(1) A manifest says of each inode that it names all there is to say: its names, attributes and content replace what was said
    before. A snapshot names every inode and every durable object.
(2) Manifests are applied in the order of `seq`. decode() answers None for what encode() did not write.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

VERSION = 1
LEVEL = 1  # four times smaller at 100 MB/s; higher levels gain a tenth and cost three times as much
ROWS = 16  # written at once: some 70 us
Pair = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Told:
    """An inode. `names`: (folder's inode, name). `digest`: of its content, None when it has none or is empty. `log`: number of
    the log whose patches belong on top of that, 0: none."""

    ino: int
    mode: int
    uid: int
    gid: int
    rdev: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    target: bytes | None
    digest: bytes | None
    names: list[tuple[int, bytes]] = field(default_factory=list)
    xattrs: list[Pair] = field(default_factory=list)
    log: int = 0


@dataclass(frozen=True, slots=True)
class Listed:
    """An object: its digest, size, and the fingerprints of its blocks in order, `step` long but for the last; 0: usual."""

    digest: bytes
    size_bytes: int
    fingerprints: list[bytes]
    step: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """One document. `gone`: inodes that exist no more."""

    seq: int
    snapshot: bool
    inodes: list[Told]
    gone: list[int]
    objects: list[Listed]


def _text(data: bytes | None) -> str | None:
    """Any bytes as a string of code points below 256: JSON has no bytes, and names need not be UTF-8."""
    return None if data is None else data.decode("latin-1")


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode("latin-1")


def nothing() -> None:
    """After a piece."""


def encode(manifest: Manifest, after_each: Callable[[], None] = nothing) -> bytes:
    """The payload of the record. In pieces: json holds the GIL for as long as one call lasts. `after_each` of them, a thread
    may sleep: compressing a short piece lets the GIL go for less time than another thread needs to wake up and take it."""
    packer, parts = zlib.compressobj(LEVEL), list[bytes]()
    for piece in _pieces(manifest):
        parts.append(packer.compress(piece.encode()))
        after_each()
    return b"".join(parts) + packer.flush()


def _pieces(manifest: Manifest) -> Iterator[str]:
    head = {"version": VERSION, "seq": manifest.seq, "snapshot": manifest.snapshot, "gone": manifest.gone}
    yield json.dumps(head)[:-1] + ', "inodes": ['
    yield from _rows(_row(told) for told in manifest.inodes)
    yield '], "objects": ['
    yield from _rows(_object(found) for found in manifest.objects)
    yield "]}"


def _rows(rows: Iterable[list[object]]) -> Iterator[str]:
    source, comma = iter(rows), ""
    while page := list(islice(source, ROWS)):
        yield comma + json.dumps(page, separators=(",", ":"))[1:-1]
        comma = ","


def _object(found: Listed) -> list[object]:
    step = [found.step] if found.step else []
    return [found.digest.hex(), found.size_bytes, b"".join(found.fingerprints).hex(), *step]


def _row(told: Told) -> list[object]:
    numbers = [told.ino, told.mode, told.uid, told.gid, told.rdev, told.atime_ns, told.mtime_ns, told.ctime_ns]
    names = [(parent, _text(name)) for parent, name in told.names]
    xattrs = [(_text(name), _text(value)) for name, value in told.xattrs]
    log = [told.log] if told.log else []
    return [*numbers, _text(told.target), told.digest.hex() if told.digest else None, names, xattrs, *log]


def decode(payload: bytes) -> Manifest | None:
    """The document of a record whose checksum was right; None when it is of another version."""
    try:
        document = json.loads(zlib.decompress(payload))
        if document["version"] != VERSION:
            return None
        inodes = [_told(row) for row in document["inodes"]]
        objects = [_listed(*row) for row in document["objects"]]
        return Manifest(document["seq"], document["snapshot"], inodes, document["gone"], objects)
    except (zlib.error, ValueError, KeyError, TypeError, AttributeError):
        return None


def _told(row: Any) -> Told:
    ino, mode, uid, gid, rdev, atime_ns, mtime_ns, ctime_ns, target, digest, names, xattrs, *log = row
    return Told(
        *(int(ino), int(mode), int(uid), int(gid), int(rdev), int(atime_ns), int(mtime_ns), int(ctime_ns)),
        target=_bytes(target),
        digest=bytes.fromhex(digest) if digest is not None else None,
        names=[(int(parent), name.encode("latin-1")) for parent, name in names],
        xattrs=[(name.encode("latin-1"), value.encode("latin-1")) for name, value in xattrs],
        log=int(log[0]) if log else 0,
    )


def _listed(digest: str, size_bytes: int, prints: str, step: int = 0) -> Listed:
    return Listed(bytes.fromhex(digest), size_bytes, _cut(bytes.fromhex(prints)), step)


def _cut(joined: bytes) -> list[bytes]:
    return [joined[at : at + 16] for at in range(0, len(joined), 16)]
