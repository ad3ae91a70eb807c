"""An independent recount of a closed store: references, extents and files counted anew from the rows and the folders.

Owns: the counting. Knows the schema of FORMAT.md and nothing of the code that keeps it. Every function returns complaints.
"""

import os
import sqlite3
from pathlib import Path

ALIGN, HEADER = 4096, 64
REFERENCES = """SELECT inodes.oid AS o FROM inodes WHERE inodes.oid IS NOT NULL
    UNION ALL SELECT durable_oid FROM inodes WHERE durable_oid IS NOT NULL"""
# durable_oid 0 stands for "durable and empty": no object.
COUNTS = {
    "objects.refs": f"""SELECT oid, refs, (SELECT count(*) FROM ({REFERENCES}) r WHERE r.o=objects.oid) AS n
        FROM objects WHERE refs<>n""",
    "objects without references": "SELECT oid FROM objects WHERE refs<=0",
    "dangling inodes.oid": f"SELECT o FROM ({REFERENCES}) WHERE o<>0 AND o NOT IN (SELECT oid FROM objects)",
    "blocks.refs": """SELECT bid, refs, (SELECT count(*) FROM object_blocks b WHERE b.bid=blocks.bid) AS n
        FROM blocks WHERE refs<>n""",
    "dangling object_blocks": "SELECT oid, bid FROM object_blocks WHERE bid NOT IN (SELECT bid FROM blocks)",
    "blocks of no object": "SELECT oid FROM object_blocks WHERE oid NOT IN (SELECT oid FROM objects)",
    "sizes of objects": """SELECT oid, size, (SELECT coalesce(sum(length), 0) FROM object_blocks b JOIN blocks k ON k.bid=b.bid
        WHERE b.oid=objects.oid) AS n FROM objects WHERE size<>n""",
    "durable without a place": """SELECT o.oid FROM objects o JOIN object_blocks b ON b.oid=o.oid JOIN blocks k ON k.bid=b.bid
        WHERE o.durable=1 AND k.extent IS NULL""",
    "places in no extent": """SELECT bid FROM blocks WHERE extent IS NOT NULL
        AND extent NOT IN (SELECT number FROM extents WHERE size>0)""",
    "nlink of files": """SELECT ino, nlink, (SELECT count(*) FROM entries e WHERE e.ino=inodes.ino) AS n FROM inodes
        WHERE mode & 61440 <> 16384 AND nlink<>n""",
    "nlink of folders": """SELECT ino, nlink, 2 + (SELECT count(*) FROM entries e JOIN inodes c ON c.ino=e.ino
        WHERE e.parent=inodes.ino AND c.mode & 61440 = 16384) AS n
        FROM inodes WHERE mode & 61440 = 16384 AND nlink>0 AND nlink<>n""",
    "dangling entries": """SELECT name FROM entries
        WHERE ino NOT IN (SELECT ino FROM inodes) OR parent NOT IN (SELECT ino FROM inodes)""",
    "attributes of no inode": "SELECT ino FROM xattrs WHERE ino NOT IN (SELECT ino FROM inodes)",
}


def record_bytes(length: int) -> int:
    return -(-(HEADER + length) // ALIGN) * ALIGN


def rows(db: sqlite3.Connection) -> list[str]:
    """Counts and references inside the database."""
    complaints = [f"{what}: {found[:3]}" for what, query in COUNTS.items() if (found := db.execute(query).fetchall())]
    live = dict(db.execute("SELECT number, live FROM extents WHERE size>0"))
    counted = dict.fromkeys(live, 0)
    for extent, length in db.execute("SELECT extent, length FROM blocks WHERE extent IS NOT NULL"):
        counted[extent] = counted.get(extent, 0) + record_bytes(length)
    if live != counted:
        complaints.append(f"live bytes of extents: {live}, counted {counted}")
    return complaints


def files(db: sqlite3.Connection, memory: Path, store: Path) -> list[str]:
    """Every file of the tiers is known, every content that is nowhere else has its file."""
    complaints = []
    digests = {digest.hex() for (digest,) in db.execute("SELECT digest FROM objects")}
    for home, folder in ((1, memory), (2, store / "parking")):
        staged = {str(ino) for (ino,) in db.execute("SELECT ino FROM inodes WHERE home=?", (home,))}
        found = set(os.listdir(folder / "staged")) if folder.exists() else set()
        if staged != found:
            complaints.append(f"{folder}/staged: unknown {sorted(found - staged)[:5]}, missing {sorted(staged - found)[:5]}")
        if folder.exists() and (unknown := set(os.listdir(folder / "objects")) - digests):
            complaints.append(f"{folder}/objects: unknown {sorted(unknown)[:5]}")
    numbers = {f"{number:08d}.cfx" for (number,) in db.execute("SELECT number FROM extents WHERE size>0")}
    if (extents := set(os.listdir(store / "extents"))) != numbers:
        complaints.append(f"extents: unknown {sorted(extents - numbers)}, missing {sorted(numbers - extents)}")
    return complaints


def recount(store: Path, memory: Path) -> list[str]:
    """All complaints about a store that nobody has open."""
    db = sqlite3.connect(store / "index.db")
    try:
        return rows(db) + files(db, memory, store)
    finally:
        db.close()
