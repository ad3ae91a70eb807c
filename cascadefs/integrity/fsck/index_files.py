"""Checks of store.json, index.db, its WAL and index.sums, and the image of the index that the other checks ask.

Owns: the image, put together page by page without SQLite and with single flipped bits put right, so that one damaged page
does not hide what else is wrong. Changes nothing. Sums are computed by another library than the store uses.
"""

import json
import sqlite3
from pathlib import Path

import numpy as np
import xxhash

from cascadefs.ext import index_pages
from cascadefs.integrity.fsck.report import Report
from cascadefs.metadata import page_sums
from cascadefs.metadata.sqlite import identity_is_whole

TABLES = ("inodes", "entries", "objects", "blocks", "extents")
INTEGRITY_LINES = 20
LEGACY_WAL = b"\x01\x01"  # bytes 18 and 19 of the header: an image has no WAL


def fixed_identity(text: bytes) -> str | None:
    """store.json with one bit put right, when exactly one bit explains the wrong sum."""
    found = []
    for bit in range(len(text) * 8):
        tried = bytearray(text)
        tried[bit // 8] ^= 1 << bit % 8
        try:
            candidate = tried.decode("ascii")
        except UnicodeDecodeError:
            continue
        if '"sum"' in candidate and identity_is_whole(candidate):
            found.append(candidate)
    return found[0] if len(found) == 1 else None


def check_identity(path: Path, report: Report) -> str | None:
    """store.json; its text, right or put right, or None."""
    try:
        raw = path.read_bytes()
    except OSError as e:
        report.add("store.json", f"cannot be read: {e.strerror}")
        return None
    text = raw.decode("latin-1")
    if identity_is_whole(text):
        return text
    fixed = fixed_identity(raw)
    if fixed is None:
        report.add("store.json", "is damaged, and more than one bit of it: restore it from a copy")
    else:
        report.add("store.json", "has one flipped bit", (), "rewrite_identity", fixed)
    return fixed


def _check_wal(data: bytes, power_lost: bool, report: Report) -> bytes:
    """The WAL with a flipped bit put right; as it is when nothing can be put right."""
    wal = page_sums.read_wal(data)
    if power_lost and wal.flips and not wal.header_bad:
        report.notes.append("index.db-wal ends in a frame that is wrong by one bit: power was lost while it was written")
        return data
    if len(wal.flips) == 1:
        report.add("index.db-wal", f"byte {wal.flips[0] // 8} has a flipped bit", (), "flip_bit", "index.db-wal", wal.flips[0])
        fixed = bytearray(data)
        fixed[wal.flips[0] // 8] ^= 1 << wal.flips[0] % 8
        return _check_wal(bytes(fixed), power_lost, report)
    if wal.flips or wal.header_bad:
        what = "its header is damaged" if wal.header_bad else f"frame {wal.committed} or one after it has a flipped bit"
        report.add("index.db-wal", f"{what} that cannot be told: the transactions from there on are lost; rebuild-index")
    elif wal.stray:
        report.notes.append(f"index.db-wal: {wal.stray} frames after the last transaction belong to none")
    return data


def _check_pages(data: bytearray, known: page_sums.Sums, page_bytes: int, in_wal: set[int], report: Report) -> None:
    """Compare every page that has no frame in the WAL; put single bits right in `data`."""
    view = memoryview(data)
    for page in range(1, min(len(known), len(data) // page_bytes) + 1):
        content = view[(page - 1) * page_bytes : page * page_bytes]
        if page in in_wal or xxhash.xxh3_64_intdigest(content) == int(known[page - 1]):
            continue
        bit = index_pages.flipped_page_bit(content, int(known[page - 1]))
        if bit < 0:
            report.add("index.db", f"page {page} is damaged, and more than one bit of it: run cascadefs rebuild-index")
        else:
            at = (page - 1) * page_bytes * 8 + bit
            report.add("index.db", f"page {page} has a flipped bit", (), "flip_bit", "index.db", at)
            content[bit // 8] ^= 1 << bit % 8


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def check_index(store: Path, report: Report) -> sqlite3.Connection | None:
    """All of it; an image of the index to ask, or None when there is none."""
    data = bytearray(_bytes(store / "index.db"))
    if not data:
        if list((store / "extents").glob("*.cfx")):
            report.add("index.db", "is missing: run cascadefs rebuild-index")
        return None
    wal = page_sums.read_wal(_check_wal(_bytes(store / "index.db-wal"), page_sums.power_was_lost(store), report))
    frames = wal.last_frames()
    raw = _bytes(store / "index.sums")
    known = page_sums.decode(raw)
    if known is not None:
        page_bytes, expected = known
        _check_pages(data, expected, page_bytes, set(frames), report)
        pages = -(-len(data) // page_bytes)
        if len(data) % page_bytes or (not wal.committed and pages != len(expected)):
            report.add("index.db", f"is {len(data)} bytes long, its checksums say {len(expected) * page_bytes}")
    elif raw:
        report.add("index.sums", "is damaged: its own checksum is wrong", (), "rewrite_sums")
    else:
        report.notes.append("index.sums is missing: the store is from before it had one; the next mount makes it")
    image = _image(data, wal)
    return image if _check_integrity(image, report) else None


def _image(data: bytearray, wal: page_sums.Wal) -> sqlite3.Connection:
    for page, frame in wal.last_frames().items():
        end = page * wal.page_bytes
        if len(data) < end:
            data.extend(bytes(end - len(data)))
        data[end - wal.page_bytes : end] = wal.page(frame)
    if wal.pages_after:
        del data[wal.pages_after * wal.page_bytes :]
    data[18:20] = LEGACY_WAL
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.deserialize(bytes(data))
    return connection


def _check_integrity(image: sqlite3.Connection, report: Report) -> bool:
    """SQLite's own check; whether the tables can be asked at all."""
    try:
        for (line,) in image.execute(f"PRAGMA integrity_check({INTEGRITY_LINES})"):
            if line != "ok":
                report.add("index.db", f"SQLite says: {line}; run cascadefs rebuild-index")
        for table in TABLES:
            image.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone()
    except sqlite3.DatabaseError as e:
        report.add("index.db", f"cannot be read ({e}): run cascadefs rebuild-index")
        return False
    return True


def identity_of(text: str) -> tuple[str, bytes, int]:
    """(store id, secret, block bytes) of a store.json."""
    known = json.loads(text)
    return known["store_id"], bytes.fromhex(known["secret"]), known["block_bytes"]


def sums_of_file(path: Path, page_bytes: int) -> page_sums.Sums:
    """Sums of all pages, by the other library."""
    data = memoryview(path.read_bytes())
    pages = (data[at : at + page_bytes] for at in range(0, len(data), page_bytes))
    return np.array([xxhash.xxh3_64_intdigest(page) for page in pages], np.uint64)
