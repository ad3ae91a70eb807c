"""What may be on the disk after a power loss: the log of the shim replayed under the rules of POSIX, and no kinder.

Owns: the model of files and folders with what is durable and what is pending. Knows nothing of cascadefs. The rules:
(1) What preceded the last sync of a file is there. Of what came after, any subset is there; a write may be there in part, in
    sectors of 512 bytes, or as zeros (the size reached the disk, the data did not).
(2) A name is there once its folder was synced after it was made; before that it may be, whatever became of the file's bytes.
    Syncing a file does not sync its name.
(3) Operations on one file or folder that are there happened in their order.
"""

import hashlib
import json
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("OPEN", "CREATE", "READ", "WRITE", "TRUNCATE", "SYNC", "RENAME", "UNLINK", "LINK", "MKDIR", "PUNCH", "SEND", "MARK")
OPEN, CREATE, READ, WRITE, TRUNCATE, SYNC, RENAME, UNLINK, LINK, MKDIR, PUNCH, SEND, MARK = range(13)
INDEX = ("index.db-wal", "index.db-journal", "index.db", "index.sums")
PLACES = ("extents/", "patches/", "parking/staged/", "parking/objects/", "parking/boot", *INDEX, "store.")
SECTOR = 512
_ENTRY = struct.Struct("<IIIIQqq")  # struct entry of shim.c


@dataclass(frozen=True)
class Entry:
    """One record of the log."""

    kind: int
    inode: int
    path: str
    data: bytes
    offset: int
    length: int


def entries(log: Path) -> Iterator[Entry]:
    """The log, in order."""
    data, at = log.read_bytes(), 0
    while at < len(data):
        kind, path_bytes, data_bytes, _, inode, offset, length = _ENTRY.unpack_from(data, at)
        at += _ENTRY.size
        path = data[at : at + path_bytes].decode()
        at += path_bytes + data_bytes
        yield Entry(kind, inode, path, data[at - data_bytes : at], offset, length)


@dataclass(eq=False)
class File:
    """Durable bytes, and what happened since the last sync."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[Entry] = field(default_factory=list)

    def sync(self) -> None:
        for entry in self.pending:
            apply(self.durable, entry)
        self.pending.clear()

    def image(self, chance: random.Random) -> bytes | bytearray:
        """One legal content."""
        if not self.pending:
            return self.durable
        image, share = bytearray(self.durable), chance.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        chosen = [entry for entry in self.pending if chance.random() < share]
        if chance.random() < 0.4:  # everything up to some moment: the likeliest crash
            chosen = self.pending[: chance.randint(0, len(self.pending))]
        torn = chance.random() < 0.5
        for entry in chosen:
            last = entry is chosen[-1]
            apply(image, _torn(entry, image, chance) if entry.kind == WRITE and torn and last else entry)
        return image


def apply(image: bytearray, entry: Entry) -> None:
    """Do to the bytes what the operation did to the file."""
    if entry.kind == TRUNCATE:
        del image[entry.length :]
        image.extend(bytes(entry.length - len(image)))
    elif entry.kind == WRITE:
        image.extend(bytes(max(0, entry.offset - len(image))))
        image[entry.offset : entry.offset + len(entry.data)] = entry.data
    elif entry.kind == PUNCH:
        end = min(len(image), entry.offset + entry.length)
        image[entry.offset : end] = bytes(max(0, end - entry.offset))


def _torn(entry: Entry, image: bytearray, chance: random.Random) -> Entry:
    """The write, with only some of its sectors: a beginning, any of them, or none but the size."""
    end, how = entry.offset + len(entry.data), chance.choice(("beginning", "any", "size"))
    old = bytes(image[entry.offset : end]).ljust(len(entry.data), b"\0")
    firsts = range(0, len(entry.data), SECTOR)
    kept = {at for at in firsts if how == "any" and chance.random() < 0.5}
    if how == "beginning":
        kept = set(list(firsts)[: chance.randint(0, len(firsts))])
    parts = (entry.data[at : at + SECTOR] if at in kept else old[at : at + SECTOR] for at in firsts)
    return Entry(WRITE, entry.inode, "", b"".join(parts), entry.offset, entry.length)


Names = dict[str, "File | Folder"]


@dataclass(eq=False)
class Folder:
    """Durable names, and the changes since the last sync: each a few names with what they lead to (None: nothing)."""

    durable: Names = field(default_factory=dict)
    pending: list[dict[str, "File | Folder | None"]] = field(default_factory=list)

    def now(self, changes: list[dict[str, "File | Folder | None"]]) -> Names:
        names: dict[str, File | Folder | None] = dict(self.durable)
        for change in changes:
            names.update(change)
        return {name: found for name, found in names.items() if found is not None}

    def sync(self) -> None:
        self.durable = self.now(self.pending)
        self.pending.clear()

    def image(self, chance: random.Random) -> Names:
        """One legal set of names."""
        share = chance.choice((0.0, 0.5, 1.0, 1.0))
        return self.now([change for change in self.pending if chance.random() < share])


class Disk:
    """Everything below one folder, which exists and is durable."""

    def __init__(self, base: Path) -> None:
        self.base, self.root = str(base), Folder()
        self._folders: dict[str, Folder] = {self.base: self.root}
        self._by_inode: dict[int, File | Folder] = {base.stat().st_ino: self.root}

    def follow(self, entry: Entry) -> None:
        """One more operation happened."""
        if entry.kind in (WRITE, TRUNCATE, PUNCH):
            found = self._by_inode[entry.inode]
            assert isinstance(found, File)
            found.pending.append(entry)
        elif entry.kind == SYNC:
            self._by_inode[entry.inode].sync()
        elif entry.kind in (CREATE, MKDIR):
            made = self._by_inode[entry.inode] = File() if entry.kind == CREATE else Folder()
            self._name(entry.path, made)
            if isinstance(made, Folder):
                self._folders[entry.path] = made
        elif entry.kind == LINK:
            self._name(entry.path, self._by_inode[entry.inode])
        elif entry.kind == UNLINK:
            self._name(entry.path, None)
        elif entry.kind == RENAME:
            self._rename(entry.path, entry.data.decode())

    def _at(self, path: str) -> tuple[Folder, str]:
        folder, _, name = path.rpartition("/")
        return self._folders[folder], name

    def _name(self, path: str, what: "File | Folder | None") -> None:
        folder, name = self._at(path)
        folder.pending.append({name: what})

    def _rename(self, old: str, new: str) -> None:
        folder, name = self._at(old)
        target, new_name = self._at(new)
        assert folder is target, "a rename between folders needs a rule of its own"
        moved = folder.now(folder.pending)[name]
        folder.pending.append({name: None, new_name: moved})

    def image(self, chance: random.Random) -> dict[str, bytes | bytearray | None]:
        """One legal state: path -> bytes, or None for a folder."""
        state: dict[str, bytes | bytearray | None] = {}
        todo: list[tuple[str, Folder]] = [("", self.root)]
        while todo:
            path, folder = todo.pop()
            for name, found in folder.image(chance).items():
                if isinstance(found, Folder):
                    state[f"{path}{name}"] = None
                    todo.append((f"{path}{name}/", found))
                else:
                    state[f"{path}{name}"] = found.image(chance)
        return state


def state_key(state: dict[str, bytes | bytearray | None]) -> bytes:
    """Equal for equal states."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(state):
        data = state[path]
        digest.update(f"{path}\0{-1 if data is None else len(data)}\0".encode())
        digest.update(data or b"")
    return digest.digest()


def mark_of(entry: Entry) -> dict[str, Any] | None:
    """What the recorder said here, if this is a mark."""
    return json.loads(entry.data) if entry.kind == MARK else None


def summary(log: list[Entry]) -> list[str]:
    """Which kinds of change happened to which kinds of file, such as "PUNCH extents/"."""
    paths: dict[int, str] = {}
    found = set()
    for entry in log:
        if entry.kind in (CREATE, LINK, MKDIR):
            paths[entry.inode] = entry.path
        path = entry.path or paths.get(entry.inode, "")
        found.add(f"{KINDS[entry.kind]} {next((place for place in PLACES if place in path), 'folder')}")
    return sorted(found)
