"""A new index from the extents alone, for when the old one is lost or damaged beyond healing.

Owns: replaying manifests, lost+found, the exchange of the index files. Knows no FUSE. Invariants:
(1) The old index is renamed, never deleted or changed; the new one is complete and synced before it takes the place.
(2) A file shows the newest content told of it whose blocks are all there; without one it is absent, and said so.
(3) What is whole and has no name, in the extents or in a memory tier, goes to /lost+found; not what a file held before.
"""

import itertools
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cascadefs.config import NAME_MAX
from cascadefs.errors import StoreError
from cascadefs.formats.manifest import Listed, Manifest, Told, decode
from cascadefs.formats.name_ring import Change, Created, Moved, Removed, pending_changes
from cascadefs.formats.record import MANIFEST, align_up, record_bytes
from cascadefs.media import file_io
from cascadefs.media.file_io import ALIGN
from cascadefs.metadata.namespace import ROOT
from cascadefs.metadata.objects import digest_of
from cascadefs.metadata.offline import NewIndex
from cascadefs.metadata.sqlite import Database, claim, read_identity
from cascadefs.tiers import scan
from cascadefs.tiers.extents import ColdTier
from cascadefs.tiers.owner import tier_of
from cascadefs.tiers.patch_log import FOLDER, path_of, read_header
from cascadefs.tiers.scan import Found
from cascadefs.types import EMPTY_OID, Home, Location

Progress = Callable[[int, int], None]  # bytes done, bytes in all
LOST = b"lost+found"
INDEX_FILES = ("index.db", "index.db-wal", "index.sums")
Key = tuple[bytes, int]  # fingerprint and length of a block


@dataclass
class Rebuilt:
    """What came back. `absent`: paths of files of which no version is whole; `kept`: where the old index is now."""

    files: int = 0
    folders: int = 0
    lost_and_found: int = 0
    absent: list[str] = field(default_factory=list)
    kept: str = ""


@dataclass
class Content:
    """An object that is whole: its size and its blocks in order."""

    size_bytes: int
    keys: list[Key]


class Replay:
    """What the manifests say, applied in order."""

    def __init__(self, manifests: Iterable[Manifest], blocks: dict[Key, Found], block_bytes: int) -> None:
        self.inodes: dict[int, Told] = {}
        self.versions: dict[int, list[bytes]] = {}
        self.contents: dict[bytes, Content] = {}
        self.gone: dict[int, Told] = {}  # as they were told last, in the order in which they went
        listed: set[Key] = set()
        for manifest in manifests:
            if manifest.snapshot:
                self.inodes.clear()
            for ino in manifest.gone:
                if ino in self.inodes:
                    self.gone[ino] = self.inodes.pop(ino)
            for told in manifest.inodes:
                self.inodes.pop(told.ino, None)  # they stand in the order in which they were told last
                self.inodes[told.ino] = told
                if told.digest is not None:
                    self.versions.setdefault(told.ino, []).append(told.digest)
            for found in manifest.objects:
                keys = _keys(found, block_bytes)
                listed.update(keys)
                if all(key in blocks for key in keys):
                    self.contents[found.digest] = Content(found.size_bytes, keys)
        for fingerprint, length in set(blocks) - listed:
            self.contents[digest_of(length, [fingerprint])] = Content(length, [(fingerprint, length)])

    def content_of(self, told: Told) -> bytes | None:
        """The digest of the newest whole version."""
        if told.digest is None:
            return None
        whole = [digest for digest in self.versions[told.ino] if digest in self.contents]
        return whole[-1] if whole else None

    def is_absent(self, told: Told) -> bool:
        """A file of which nothing is left."""
        return stat.S_ISREG(told.mode) and told.digest is not None and self.content_of(told) is None


def _keys(found: Listed, block_bytes: int) -> list[Key]:
    last, step = len(found.fingerprints) - 1, found.step or block_bytes
    return [(f, step if i < last else found.size_bytes - step * last) for i, f in enumerate(found.fingerprints)]


class Tree:
    """Who is in which folder, with every inode reachable from the root."""

    def __init__(self, replay: Replay, staged: Iterable[int]) -> None:
        self.replay, self.staged = replay, set(staged)
        self.entries: dict[tuple[int, bytes], int] = {}
        self.inodes = {i: t for i, t in replay.inodes.items() if i in self.staged or not replay.is_absent(t)}
        now = time.time_ns()
        root = Told(ROOT, stat.S_IFDIR | 0o755, os.getuid(), os.getgid(), 0, now, now, now, None, None)
        self.inodes.setdefault(ROOT, root)
        self._next = max({*self.inodes, *self.staged}) + 1
        self._lost = 0
        for told in reversed(list(self.inodes.values())):  # who was told last has the name
            for parent, name in told.names:
                if self._is_folder(parent) and 0 < len(name) <= NAME_MAX and (parent, name) not in self.entries:
                    self.entries[parent, name] = told.ino
        self.entries = dict(reversed(self.entries.items()))
        self._bring_back()
        self._attach_the_unreachable()

    def _bring_back(self) -> None:
        """A power loss may leave a manifest without the bytes before it. Who was replaced by a file that is absent for that has
        its name again, if its own bytes are there: they are punched only when those of the new one are durable."""
        absent = {place for told in self.replay.inodes.values() if told.ino not in self.inodes for place in told.names}
        for told in reversed(list(self.replay.gone.values())):
            if not self.replay.is_absent(told) and told.ino not in self.inodes:
                for place in told.names:
                    if place in absent and place not in self.entries and self._is_folder(place[0]):
                        self.entries[place] = told.ino
                        self.inodes[told.ino] = told

    def _is_folder(self, ino: int) -> bool:
        return ino in self.inodes and stat.S_ISDIR(self.inodes[ino].mode)

    def _attach_the_unreachable(self) -> None:
        """A folder whose chain of parents does not end at the root, and what has no name, goes to lost+found."""
        parents = {ino: parent for (parent, _), ino in self.entries.items() if self._is_folder(ino)}
        good = {ROOT}
        for ino in [i for i in self.inodes if self._is_folder(i)]:
            chain, at = list[int](), ino
            while at not in good and at not in chain and at in parents:
                chain.append(at)
                at = parents[at]
            if at in good:
                good.update(chain)
            else:
                top = at
                self.entries = {place: child for place, child in self.entries.items() if child != top}
                parents.pop(top, None)
                self.add_lost(top, b"inode-%d" % top)
                good.update({top, *chain})
        named = set(self.entries.values()) | {ROOT}
        for told in list(self.inodes.values()):
            if told.ino not in named:
                digest = self.replay.content_of(told)
                self.add_lost(told.ino, digest.hex().encode() if digest else b"inode-%d" % told.ino)

    def entered_later(self, pending: Sequence[Change]) -> set[int]:
        """Inodes whose names the next mount enters, from the ring in memory: there is room for them, or will be by then."""
        free = {(one.folder, one.name) for one in pending if isinstance(one, Moved | Removed)}
        made = [one for one in pending if isinstance(one, Created) and self._is_folder(one.folder)]
        return {one.ino for one in made if (one.folder, one.name) not in self.entries or (one.folder, one.name) in free}

    def new_inode(self, digest: bytes | None, ino: int | None = None) -> int:
        """A file that no manifest told of."""
        if ino is None:
            ino, self._next = self._next, self._next + 1
        self._next = max(self._next, ino + 1)
        now = time.time_ns()
        self.inodes[ino] = Told(ino, stat.S_IFREG | 0o600, os.getuid(), os.getgid(), 0, now, now, now, None, digest)
        if digest is not None:
            self.replay.versions[ino] = [digest]
        return ino

    def add_lost(self, ino: int, name: bytes) -> None:
        """A name in /lost+found."""
        if not self._lost:
            known = self.entries.get((ROOT, LOST))
            if known is not None and self._is_folder(known):
                self._lost = known
            else:
                self._lost, self._next = self._next, self._next + 1
                now = time.time_ns()
                mode = stat.S_IFDIR | 0o700
                self.inodes[self._lost] = Told(self._lost, mode, os.getuid(), os.getgid(), 0, now, now, now, None, None)
                self.entries[ROOT, LOST if known is None else b"lost+found-%d" % self._lost] = self._lost
        while (self._lost, name) in self.entries:
            name += b"~"
        self.entries[self._lost, name] = ino

    @property
    def in_lost_and_found(self) -> int:
        """Number of names there that this rebuild gave."""
        return sum(parent == self._lost for parent, _ in self.entries) if self._lost else 0

    def links(self) -> dict[int, int]:
        """nlink of each inode."""
        counts = {ino: 2 if self._is_folder(ino) else 0 for ino in self.inodes}
        for (parent, _), ino in self.entries.items():
            if self._is_folder(ino):
                counts[parent] += 1
            else:
                counts[ino] += 1
        return counts


class Rebuilder:
    """One run over one store."""

    def __init__(self, store: Path, shm_dir: Path, progress: Progress) -> None:
        self.store, self.progress = store, progress
        self.identity = read_identity(store / "store.json")
        self.memory = tier_of(store, shm_dir, self.identity.store_id) or store / "rebuilding"  # which has none
        self.blocks: dict[Key, Found] = {}
        self.manifests: list[tuple[Manifest, Found]] = []
        self.sizes: dict[int, int] = {}

    def run(self) -> Rebuilt:
        """See the invariants. StoreError when the store is in use or is none."""
        lock = claim(self.store)
        try:
            self._scan()
            self._seal_extents()
            self.manifests.sort(key=lambda pair: pair[0].seq)
            replay = Replay((manifest for manifest, _ in self.manifests), self.blocks, self.identity.block_bytes)
            tree, homes = self._tree(replay)
            result = Rebuilt(absent=self._absent_paths(replay, tree))
            self._write(tree, homes)
            result.kept = self._exchange()
            result.folders = sum(stat.S_ISDIR(told.mode) for told in tree.inodes.values()) - 1
            result.files = len(tree.inodes) - result.folders - 1
            result.lost_and_found = tree.in_lost_and_found
            return result
        finally:
            os.close(lock)

    def _scan(self) -> None:
        found = scan.extents(self.store / "extents")
        total, before = sum(path.stat().st_size for _, path in found), 0
        for number, path in found:
            for record in scan.records(path, number, self.identity.secret):
                if isinstance(record, int):
                    self.progress(before + record, total)
                elif record.header.kind == MANIFEST:
                    manifest = decode(record.payload)
                    if manifest is not None:
                        self.manifests.append((manifest, record))
                else:
                    self.blocks[record.header.fingerprint, record.header.length] = record
            before += path.stat().st_size

    def _seal_extents(self) -> None:
        """An index that knows the extents only from outside must not append to them: the open one gets its footer. So does one
        whose footer lacks a record that is needed again: it was dead when the extent was sealed."""
        cold = ColdTier(self.store / "extents", self.identity.store_id, self.identity.secret)
        found = [*self.blocks.values(), *(record for _, record in self.manifests)]
        for number, path in scan.extents(cold.folder):
            size = path.stat().st_size
            fd = file_io.open_file(path, os.O_RDONLY)
            try:
                known = scan.footer(fd, size)
            finally:
                os.close(fd)
            headers = sorted((r.header for r in found if r.extent == number), key=lambda h: h.offset)
            if known is not None and known[1] >= {header.offset for header in headers}:
                self.sizes[number] = size
                continue
            end = known[0] if known is not None else align_up(max(size, ALIGN))
            self.sizes[number] = cold.seal(number, end, [(h.fingerprint, h.offset, h.length) for h in headers])

    def _tree(self, replay: Replay) -> tuple[Tree, dict[int, Home]]:
        """The tree, and where the inodes that have staged bytes have them."""
        homes: dict[int, Home] = {}
        tiers = ((self.store / "parking", Home.COLD), (self.memory, Home.MEMORY))
        for folder, home in tiers:
            if (folder / "staged").is_dir():
                homes |= {int(name): home for name in os.listdir(folder / "staged") if name.isdigit()}
        pending = pending_changes(self.memory)
        copies = self._copies(replay, tiers)
        for told in replay.inodes.values():  # what the extents do not have whole, but a tier has
            if told.digest in copies and told.ino not in homes:
                homes[told.ino] = self._adopt(told.digest, copies, told.ino)
        owned = {told.digest for told in replay.inodes.values()}
        tree = Tree(replay, homes)
        shown = {replay.content_of(told) for told in tree.inodes.values()}
        for ino in set(homes) - tree.inodes.keys() - tree.entered_later(pending):
            if self._is_spare(ino, homes[ino]):
                del homes[ino]
            else:
                tree.add_lost(tree.new_inode(None, ino), b"inode-%d" % ino)
        older = {digest for ino in replay.inodes for digest in replay.versions.get(ino, ())}  # replaced, not lost
        for digest in replay.contents:
            if digest not in shown and digest not in older:
                tree.add_lost(tree.new_inode(digest), digest.hex().encode())
        for digest in set(copies) - owned:
            ino = tree.new_inode(None)
            homes[ino] = self._adopt(digest, copies, ino)
            tree.add_lost(ino, digest.hex().encode())
        return tree, homes

    def _is_spare(self, ino: int, home: Home) -> bool:
        """Empty and known to nobody: it was made ahead, for a name that never came. The next mount removes it."""
        folder = self.memory if home == Home.MEMORY else self.store / "parking"
        return not os.lstat(folder / "staged" / str(ino)).st_size

    def _copies(self, replay: Replay, tiers: Iterable[tuple[Path, Home]]) -> dict[bytes, tuple[Path, Home]]:
        """Whole copies of objects that the extents do not have."""
        found: dict[bytes, tuple[Path, Home]] = {}
        for folder, home in tiers:
            for name in os.listdir(folder / "objects") if (folder / "objects").is_dir() else ():
                if len(name) == 32 and bytes.fromhex(name) not in replay.contents:
                    found[bytes.fromhex(name)] = (folder, home)
        return found

    def _adopt(self, digest: bytes, copies: dict[bytes, tuple[Path, Home]], ino: int) -> Home:
        """The copy becomes the staged bytes of an inode: the next mount seals and flushes it."""
        folder, home = copies[digest]
        file_io.make_folder(folder / "staged")
        file_io.link(folder / "objects" / digest.hex(), folder / "staged" / str(ino))
        return home

    def _absent_paths(self, replay: Replay, tree: Tree) -> list[str]:
        where = {ino: place for place, ino in tree.entries.items()}

        def path(parent: int, name: bytes) -> str:
            parts = [name]
            while parent in where:
                parent, folder = where[parent]
                parts.append(folder)
            return "/" + "/".join(os.fsdecode(part) for part in reversed(parts))

        gone = [told for told in replay.inodes.values() if told.ino not in tree.inodes]
        return sorted(path(*place) for told in gone for place in told.names if place not in tree.entries)

    # --- the new index

    def _write(self, tree: Tree, homes: dict[int, Home]) -> None:
        folder = self.store / "rebuilding"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        fd = file_io.open_file(folder / "store.json", os.O_WRONLY | os.O_CREAT)
        try:
            file_io.write_fully(fd, (self.store / "store.json").read_bytes(), 0)
        finally:
            os.close(fd)
        database = Database(folder)
        try:
            with database.transaction():
                index = NewIndex(database.connection)
                oids = self._write_contents(index, tree)
                self._write_names(index, tree, homes, oids)
                index.count_references()
        finally:
            database.close()

    def _write_contents(self, index: NewIndex, tree: Tree) -> dict[bytes, int]:
        """Objects, blocks, extents, manifests; the numbers of the objects."""
        replay = tree.replay
        shown = [replay.content_of(told) for told in tree.inodes.values()]
        digests = sorted({digest for digest in shown if digest is not None})
        oids = {digest: oid for oid, digest in enumerate(digests, 1)}
        bids, live = dict[Key, int](), dict.fromkeys(self.sizes, 0)
        for digest, oid in oids.items():
            content = replay.contents[digest]
            index.add_object(oid, digest, content.size_bytes)
            for seq, key in enumerate(content.keys):
                if key not in bids:
                    bids[key] = len(bids) + 1
                    at = location(self.blocks[key])
                    index.add_block(bids[key], key, at)
                    live[at.extent] += record_bytes(at.length)
                index.add_block_of(oid, seq, bids[key])
        index.add_extents((number, size, live[number]) for number, size in self.sizes.items())
        for manifest, record in self._current_manifests():
            index.add_manifest(manifest.seq, location(record), record.header.fingerprint, manifest.snapshot)
        return oids

    def _current_manifests(self) -> list[tuple[Manifest, Found]]:
        starts = [at for at, (manifest, _) in enumerate(self.manifests) if manifest.snapshot]
        return self.manifests[starts[-1] if starts else 0 :]

    def _write_names(self, index: NewIndex, tree: Tree, homes: dict[int, Home], oids: dict[bytes, int]) -> None:
        links = tree.links()
        for ino, told in tree.inodes.items():
            digest, home = tree.replay.content_of(told), homes.get(ino, Home.NONE)
            oid = oids[digest] if digest is not None else None
            size = tree.replay.contents[digest].size_bytes if digest is not None else len(told.target or b"")
            state = (told.mode, told.uid, told.gid, links[ino], told.rdev, size, told.atime_ns, told.mtime_ns, told.ctime_ns)
            is_empty = told.digest is None and ino in tree.replay.inodes and stat.S_ISREG(told.mode)
            index.add_inode(ino, state, home, (None if home else oid, EMPTY_OID if is_empty else oid), told.target)
            index.add_xattrs(ino, told.xattrs)
        index.add_entries((parent, at, name, ino) for at, ((parent, name), ino) in enumerate(tree.entries.items(), 1))
        index.add_logs(self._logs(tree))

    def _logs(self, tree: Tree) -> list[tuple[int, int]]:
        """(inode, number) of the logs of patches that the next mount puts on top of what their inodes show."""
        logs = [told for told in tree.inodes.values() if told.log and tree.replay.content_of(told) == told.digest]
        headers = {told.ino: read_header(path_of(self.store / FOLDER, told.ino, told.log)) for told in logs}
        return [(ino, header.number) for ino, header in headers.items() if header and header.base == tree.inodes[ino].digest]

    def _exchange(self) -> str:
        """The new index takes the place of the old one. index.db comes last: until then the store says that it has none."""
        new, mark, kept = self.store / "rebuilding", self._free_mark(), ""
        for name in INDEX_FILES:
            if (self.store / name).exists():
                file_io.rename(self.store / name, self.store / f"{name}.before-{mark}")
                kept = f"index.db.before-{mark}"
        file_io.sync_folder(self.store)
        for name in ("index.sums", "index.db"):
            file_io.rename(new / name, self.store / name)
        file_io.sync_folder(self.store)
        shutil.rmtree(new)
        return kept

    def _free_mark(self) -> str:
        """The time, and a number if an index was kept in this second already."""
        now = time.strftime("%Y%m%d-%H%M%S")
        marks = (f"{now}-{number}" if number else now for number in itertools.count())
        return next(mark for mark in marks if not any((self.store / f"{name}.before-{mark}").exists() for name in INDEX_FILES))


def location(record: Found) -> Location:
    """Where a record that was found lies."""
    return Location(record.extent, record.header.offset, record.header.length)


def rebuild(store: Path, shm_dir: Path, progress: Progress) -> Rebuilt:
    """Make a new index for an unmounted store."""
    if not (store / "store.json").exists():
        raise StoreError(f"{store} is no cascadefs store: store.json is missing")
    return Rebuilder(store, shm_dir, progress).run()


def as_json(result: Rebuilt) -> str:
    """For --json."""
    return json.dumps(result.__dict__, indent=2)
