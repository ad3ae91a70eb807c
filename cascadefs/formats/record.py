"""Bytes <-> values of the cold tier's files: extent header, record header, footer, logs of patches. FORMAT.md draws the same
bytes.

Owns: the layout and its checksums. Does no I/O. Invariants:
(1) Every struct is little-endian, starts with a magic and a version and ends with XXH3-64 over what precedes it.
(2) A record starts at a multiple of ALIGN and takes `record_bytes(length)`, also a multiple of ALIGN.
(3) A decoder answers None for anything that is not exactly what an encoder wrote: never a guess.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import xxhash

from cascadefs.media.file_io import ALIGN

FORMAT_VERSION = 1
HEADER_BYTES = 64

_EXTENT = struct.Struct("<4sI16sQ")  # magic, version, store id, extent number
_RECORD = struct.Struct("<4sI16sQQ16s")  # magic, version, fingerprint, payload length, offset of this record, padding
_FOOT_HEAD = struct.Struct("<4sIQQ")  # magic, version, extent number, number of entries
_FOOT_ENTRY = struct.Struct("<16sQQ")  # fingerprint, offset, payload length
_TAIL = struct.Struct("<4sIQQ")  # magic, version, footer offset, footer length
_LOG = struct.Struct("<4sI16sQQ16s")  # magic, version, store id, inode, number of the log, digest of what is patched
# magic, version, fingerprint, number of the log, place in it, size, mtime, ctime, number of ranges, payload length
_PATCH = struct.Struct("<4sI16sQQQqqQQ")
_RANGE = struct.Struct("<QQ")  # offset and length, of bytes of the file
_SUM = struct.Struct("<Q")
PATCH_HEADER_BYTES = _PATCH.size + _SUM.size
RANGE_BYTES = _RANGE.size
BLOCK, MANIFEST = b"CFRC", b"CFMN"  # kinds of records, told by their magic; framed and checked alike


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """What a record says of itself: fingerprint (16 bytes) of the payload, payload length, own offset in the extent, kind."""

    fingerprint: bytes
    length: int
    offset: int
    kind: bytes = BLOCK


def _sealed(body: bytes) -> bytes:
    return body + _SUM.pack(xxhash.xxh3_64_intdigest(body))


def _opened(data: bytes, body_bytes: int, magic: bytes) -> bytes | None:
    """The body if its checksum, magic and version are right."""
    if len(data) < body_bytes + _SUM.size:
        return None
    body = bytes(data[:body_bytes])
    if _SUM.unpack_from(data, body_bytes)[0] != xxhash.xxh3_64_intdigest(body):
        return None
    found, version = struct.unpack_from("<4sI", body)
    return body if found == magic and version == FORMAT_VERSION else None


def align_up(n: int) -> int:
    """The next multiple of ALIGN that is >= n."""
    return -(-n // ALIGN) * ALIGN


def record_bytes(length: int) -> int:
    """Bytes that a record with a payload of `length` bytes takes in an extent."""
    return align_up(HEADER_BYTES + length)


def encode_extent_header(store_id: bytes, number: int) -> bytes:
    """ALIGN bytes that open an extent."""
    return _sealed(_EXTENT.pack(b"CFXT", FORMAT_VERSION, store_id, number)).ljust(ALIGN, b"\0")


def decode_extent_header(data: bytes) -> tuple[bytes, int] | None:
    """(store id, extent number), or None."""
    body = _opened(data, _EXTENT.size, b"CFXT")
    if body is None:
        return None
    _, _, store_id, number = _EXTENT.unpack(body)
    return store_id, number


def encode_record_header(header: RecordHeader) -> bytes:
    """HEADER_BYTES bytes that stand directly before the payload."""
    return _sealed(_RECORD.pack(header.kind, FORMAT_VERSION, header.fingerprint, header.length, header.offset, bytes(16)))


def decode_record_header(data: bytes) -> RecordHeader | None:
    """The header, or None when these are not the first bytes of a record."""
    kind = bytes(data[:4])
    body = _opened(data, _RECORD.size, kind) if kind in (BLOCK, MANIFEST) else None
    if body is None:
        return None
    _, _, fingerprint, length, offset, padding = _RECORD.unpack(body)
    return None if any(padding) else RecordHeader(fingerprint, length, offset, kind)


def encode_footer(number: int, offset: int, entries: list[RecordHeader]) -> bytes:
    """The footer of a sealed extent, to be written at `offset`: entries, zeros, and a tail in the last bytes."""
    body = _FOOT_HEAD.pack(b"CFFT", FORMAT_VERSION, number, len(entries))
    body = _sealed(body + b"".join(_FOOT_ENTRY.pack(e.fingerprint, e.offset, e.length) for e in entries))
    tail = _sealed(_TAIL.pack(b"CFTL", FORMAT_VERSION, offset, len(body)))
    return body.ljust(align_up(len(body) + len(tail)) - len(tail), b"\0") + tail


TAIL_BYTES = _TAIL.size + _SUM.size


def decode_tail(data: bytes) -> tuple[int, int] | None:
    """(footer offset, footer length) from the last TAIL_BYTES of an extent, or None when it is not sealed."""
    body = _opened(data, _TAIL.size, b"CFTL")
    if body is None:
        return None
    _, _, offset, length = _TAIL.unpack(body)
    return offset, length


def decode_footer(data: bytes) -> tuple[int, list[RecordHeader]] | None:
    """(extent number, entries) from the footer's own bytes, or None."""
    body = _opened(data, len(data) - _SUM.size, b"CFFT") if len(data) >= _FOOT_HEAD.size + _SUM.size else None
    if body is None:
        return None
    _, _, number, count = _FOOT_HEAD.unpack_from(body)
    if len(body) != _FOOT_HEAD.size + count * _FOOT_ENTRY.size:
        return None
    found = _FOOT_ENTRY.iter_unpack(body[_FOOT_HEAD.size :])
    return number, [RecordHeader(fingerprint, length, offset) for fingerprint, offset, length in found]


# --- logs of patches


@dataclass(frozen=True, slots=True)
class LogHeader:
    """Of which inode, and on top of which durable content, named by its digest; `number` is used once."""

    ino: int
    number: int
    base: bytes


@dataclass(frozen=True, slots=True)
class PatchHeader:
    """What changed: so many ranges, which stand in front of their bytes; both together are the payload. The file's size and
    times afterwards. `place`: the how manieth of log `number` it is."""

    fingerprint: bytes
    number: int
    place: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    ranges: int
    length: int


def patch_bytes(length: int) -> int:
    """Bytes that a patch with a payload of `length` bytes takes in its log."""
    return align_up(PATCH_HEADER_BYTES + length)


def encode_log_header(store_id: bytes, header: LogHeader) -> bytes:
    """ALIGN bytes that open a log."""
    body = _LOG.pack(b"CFPL", FORMAT_VERSION, store_id, header.ino, header.number, header.base)
    return _sealed(body).ljust(ALIGN, b"\0")


def decode_log_header(data: bytes) -> tuple[bytes, LogHeader] | None:
    """(store id, header), or None."""
    body = _opened(data, _LOG.size, b"CFPL")
    if body is None:
        return None
    _, _, store_id, ino, number, base = _LOG.unpack(body)
    return store_id, LogHeader(ino, number, base)


def encode_patch_header(header: PatchHeader) -> bytes:
    """PATCH_HEADER_BYTES bytes that stand directly before the payload."""
    h = header
    values = (h.number, h.place, h.size_bytes, h.mtime_ns, h.ctime_ns, h.ranges, h.length)
    return _sealed(_PATCH.pack(b"CFPT", FORMAT_VERSION, h.fingerprint, *values))


def decode_patch_header(data: bytes) -> PatchHeader | None:
    """The header, or None when these are not the first bytes of a patch."""
    body = _opened(data, _PATCH.size, b"CFPT")
    if body is None:
        return None
    found = PatchHeader(*_PATCH.unpack(body)[2:])
    return found if found.ranges * RANGE_BYTES <= found.length else None


def encode_ranges(ranges: Iterable[tuple[int, int]]) -> bytes:
    """(offset, length) of each, one behind the other."""
    return b"".join(_RANGE.pack(*one) for one in ranges)


def decode_ranges(data: bytes | memoryview) -> list[tuple[int, int]]:
    """What encode_ranges() wrote."""
    return list(_RANGE.iter_unpack(data))
