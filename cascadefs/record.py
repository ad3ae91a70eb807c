"""Bytes <-> values of the cold tier's files: extent header, record header, footer. FORMAT.md draws the same bytes.

Owns: the layout and its checksums. Does no I/O. Invariants:
(1) Every struct is little-endian, starts with a magic and a version and ends with XXH3-64 over what precedes it.
(2) A record starts at a multiple of ALIGN and takes `record_bytes(length)`, also a multiple of ALIGN.
(3) A decoder answers None for anything that is not exactly what an encoder wrote: never a guess.
"""

import struct
from dataclasses import dataclass

import xxhash

FORMAT_VERSION = 1
ALIGN = 4096  # O_DIRECT needs the logical block size of the device; 4096 suits every disk and Lustre
HEADER_BYTES = 64

_EXTENT = struct.Struct("<4sI16sQ")  # magic, version, store id, extent number
_RECORD = struct.Struct("<4sI16sQQ16s")  # magic, version, fingerprint, payload length, offset of this record, padding
_FOOT_HEAD = struct.Struct("<4sIQQ")  # magic, version, extent number, number of entries
_FOOT_ENTRY = struct.Struct("<16sQQ")  # fingerprint, offset, payload length
_TAIL = struct.Struct("<4sIQQ")  # magic, version, footer offset, footer length
_SUM = struct.Struct("<Q")
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
