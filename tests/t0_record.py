"""record.py: what an encoder wrote is read back; anything cut, flipped or longer is refused, never misread."""

import pytest

from cascadefs.formats import record
from cascadefs.formats.record import RecordHeader

STORE = bytes(range(16))
HEADER = RecordHeader(bytes(range(16, 32)), 12345, 8192)
ENTRIES = [RecordHeader(bytes([n]) * 16, 100 + n, 4096 * (n + 1)) for n in range(5)]


def test_round_trips():
    extent = record.encode_extent_header(STORE, 7)
    assert len(extent) == record.ALIGN and record.decode_extent_header(extent) == (STORE, 7)
    header = record.encode_record_header(HEADER)
    assert len(header) == record.HEADER_BYTES and record.decode_record_header(header) == HEADER
    footer = record.encode_footer(7, 65536, ENTRIES)
    offset, length = record.decode_tail(footer[-record.TAIL_BYTES :])
    assert offset == 65536 and len(footer) % record.ALIGN == 0
    assert record.decode_footer(footer[:length]) == (7, ENTRIES)


@pytest.mark.parametrize("length", range(record.HEADER_BYTES))
def test_a_cut_header_is_refused(length):
    assert record.decode_record_header(record.encode_record_header(HEADER)[:length]) is None


def test_every_flipped_bit_of_a_header_is_detected():
    good = record.encode_record_header(HEADER)
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        assert record.decode_record_header(bad) is None


def test_every_flipped_byte_of_a_footer_is_detected():
    footer = record.encode_footer(7, 65536, ENTRIES)
    _, length = record.decode_tail(footer[-record.TAIL_BYTES :])
    for at in range(length):
        bad = bytearray(footer[:length])
        bad[at] ^= 0x40
        assert record.decode_footer(bytes(bad)) is None


@pytest.mark.parametrize("length", [0, 1, 4031, 4032, 4033, 4 << 20])
def test_a_record_is_aligned_and_large_enough(length):
    size = record.record_bytes(length)
    assert size % record.ALIGN == 0 and size - record.ALIGN < length + record.HEADER_BYTES <= size
