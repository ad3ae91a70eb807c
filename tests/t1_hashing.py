"""hashing: the kernel against a slow Python twin."""

import itertools
import os
import random

import pytest

from cascadefs.ext import hashing

SECRET = bytes(n % 251 for n in range(hashing.SECRET_BYTES))
LENGTHS = [0, 1, 3, 16, 17, 128, 129, 240, 241, 1023, 4096, 100_003]


@pytest.fixture
def file(tmp_path):
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    os.write(fd, os.urandom(200_000))
    yield fd
    os.close(fd)


@pytest.mark.parametrize("length", LENGTHS)
def test_reading_and_hashing_agree_with_hashing_alone(file, length):
    out = bytearray(length)
    found = hashing.read_fingerprint(file, 777, out, SECRET)
    assert out == os.pread(file, length, 777)
    assert found == hashing.fingerprint(bytes(out), SECRET) and len(found) == 16


def test_fingerprints_differ_by_bytes_and_by_secret():
    seen = {hashing.fingerprint(bytes(n), SECRET) for n in LENGTHS}
    assert len(seen) == len(LENGTHS)
    assert hashing.fingerprint(b"x", SECRET) != hashing.fingerprint(b"x", os.urandom(hashing.SECRET_BYTES))
    assert hashing.fingerprint(b"x", SECRET) == hashing.fingerprint(b"x", bytearray(SECRET))


def test_a_secret_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="192"):
        hashing.fingerprint(b"x", b"short")


def test_a_range_past_the_end_is_an_error(file):
    with pytest.raises(OSError, match="Input/output"):
        hashing.read_into(file, 199_999, bytearray(2))


@pytest.mark.parametrize("scratch", [2, 3, 64, 8192])
def test_equal_is_what_python_says(file, tmp_path, scratch):
    data = bytearray(os.pread(file, 200_000, 0))
    other = os.open(tmp_path / "g", os.O_RDWR | os.O_CREAT)
    os.write(other, data)
    assert hashing.equal(file, 5, other, 5, 1000, bytearray(scratch))
    for at in (5, 500, 1004):
        os.pwrite(other, bytes([data[at] ^ 1]), at)
        assert not hashing.equal(file, 5, other, 5, 1000, bytearray(scratch))
        os.pwrite(other, data[at : at + 1], at)
    os.close(other)


def runs_of(data, least):
    """The slow twin."""
    found, at = [], 0
    pages = [not any(data[i : i + 4096]) for i in range(0, len(data) - len(data) % 4096, 4096)]
    for zero, group in itertools.groupby(pages):
        length = len(list(group)) * 4096
        if zero and length >= least:
            found.append((at, at + length))
        at += length
    return found


@pytest.mark.parametrize("least", [4096, 8192, 12288, 65536])
def test_runs_of_zeros_are_what_python_says(least):
    pick = random.Random(least)
    for pages in (0, 1, 2, 40, 41, 200):
        for _ in range(20):
            data = bytearray(pages * 4096 + pick.choice([0, 1, 4095]))
            for _ in range(pick.choice([0, 1, 3, pages // 8, pages])):
                if data:
                    data[pick.randrange(len(data))] = 1
            assert hashing.zero_runs(data, least) == runs_of(data, least)


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 100_003, 200_000])
def test_changed_pages_are_those_that_differ(file, length):
    data = bytearray(os.pread(file, length, 0))
    pages = [bytes(data[at : at + 4096]) for at in range(0, length, 4096)]
    prints = hashing.page_prints(data, SECRET)
    assert prints == b"".join(hashing.fingerprint(page, SECRET) for page in pages)
    assert hashing.changed_pages(file, 0, length, prints, SECRET) == []
    chance = random.Random(length)
    for _ in range(20 if length else 0):
        changed = {chance.randrange(len(pages)) for _ in range(chance.randint(1, 9))}
        known = chance.randrange(len(pages) + 1)  # the pages from there on have no prints
        for page in changed:
            os.pwrite(file, bytes([pages[page][0] ^ 1]), page * 4096)
        found = hashing.changed_pages(file, 0, length, prints[: 16 * known], SECRET)
        bytes_of = {at for offset, n in found for at in range(offset, offset + n, 4096)}
        assert bytes_of == {page * 4096 for page in range(len(pages)) if page in changed or page >= known}
        assert sum(n for _, n in found) == sum(len(pages[at // 4096]) for at in bytes_of)
        for page in changed:
            os.pwrite(file, pages[page][:1], page * 4096)


def test_changed_pages_of_a_file_that_shrinks_are_an_error(file):
    prints = hashing.page_prints(os.pread(file, 200_000, 0), SECRET)
    os.ftruncate(file, 100_000)
    with pytest.raises(OSError, match="Input/output"):
        hashing.changed_pages(file, 0, 200_000, prints, SECRET)
    half = 12 * 4096
    assert hashing.changed_pages(file, half, 100_000 - half, prints[16 * 12 :], SECRET) == [(24 * 4096, 100_000 - 24 * 4096)]
