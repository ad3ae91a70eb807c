"""A program that uses a folder as a cache would, and knows at each moment what the folder must hold. Run as a process:
`python load.py FOLDER JOURNAL STOP SEED`; it ends with 0 when the file STOP exists and nothing was wrong.

Owns: the operations and the model. Does not know what the folder lies on. The journal, one JSON document a line, is written
before an operation ({"next": what the changed names may hold afterwards}) and after ({"done": true}), so that somebody else can
judge the folder when this process and the filesystem have died: see expected().
Invariants: (1) A name has at most one operation under way. (2) Content is drawn from few seeds, so that names share it.
"""

import hashlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

SIZES = (0, 1, 4096, 70_001, 300_000, 4_200_000)
NAMES, SEEDS = 24, 40
ANY = "any"  # an in-place change that was cut short may leave anything between old and new

Changes = dict[str, str | None]  # name -> SHA-256, ANY, or None for absent


def content(seed: int) -> bytes:
    """The bytes of one seed."""
    rng = random.Random(seed)
    return rng.randbytes(SIZES[rng.randrange(len(SIZES))])


def digest(data: bytes) -> str:
    """What the model remembers of bytes."""
    return hashlib.sha256(data).hexdigest()


class Load:
    """The operations; each says what will change before it changes it."""

    def __init__(self, folder: Path, journal: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.files: dict[str, bytes] = {}
        self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.operations: list[Callable[[], None]] = [
            *[self.put] * 6, *[self.get] * 6, self.replace, self.append, self.patch, self.cut, self.link, *[self.unlink] * 3,
            self.move, self.swap, self.folders, self.attributes, self.symbolic, self.unlinked, self.listing,
        ]  # fmt: skip

    def _note(self, document: dict[str, object]) -> None:
        os.write(self._journal, (json.dumps(document) + "\n").encode())

    def step(self) -> None:
        """One operation."""
        self.rng.choice(self.operations)()
        self._note({"done": True})

    def _fresh(self) -> str:
        return f"f{self.rng.randrange(NAMES)}"

    def _known(self) -> str | None:
        return self.rng.choice(sorted(self.files)) if self.files else None

    def put(self) -> None:
        """Write a whole file, sometimes with fsync."""
        name, data = self._fresh(), content(self.rng.randrange(SEEDS))
        self._note({"next": {name: ANY}})
        with open(self.folder / name, "wb", buffering=0) as file:
            write_all(file.fileno(), data)
            if self.rng.random() < 0.1:
                os.fsync(file.fileno())
        self.files[name] = data
        self._note({"next": {name: digest(data)}})

    def get(self) -> None:
        """Read a file and compare."""
        if (name := self._known()) is not None:
            check(self.folder / name, self.files[name])

    def replace(self) -> None:
        """A temporary file, then rename over the name: readers see old or new."""
        name, data = self._fresh(), content(self.rng.randrange(SEEDS))
        old = self.files.get(name)
        self._note({"next": {"t.tmp": ANY}})
        fd = os.open(self.folder / "t.tmp", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        write_all(fd, data)
        os.close(fd)
        self._note({"next": {name: digest(data), "t.tmp": None}, "else": {name: None if old is None else digest(old)}})
        os.replace(self.folder / "t.tmp", self.folder / name)
        self.files[name] = data
        check(self.folder / name, data)

    def _change(self, name: str, data: bytes, how: Callable[[int], None], flags: int) -> None:
        self._note({"next": {name: ANY}})
        fd = os.open(self.folder / name, flags)
        how(fd)
        os.close(fd)
        self.files[name] = data
        self._note({"next": {name: digest(data)}})

    def append(self) -> None:
        """O_APPEND."""
        if (name := self._known()) is not None:
            self._change(name, self.files[name] + b"more", lambda fd: write_all(fd, b"more"), os.O_WRONLY | os.O_APPEND)

    def patch(self) -> None:
        """Bytes in the middle of a file, or beyond its end."""
        if (name := self._known()) is None:
            return
        at, old = self.rng.randrange(200_000), self.files[name]
        data = old[:at].ljust(at, b"\0") + b"patched" + old[at + 7 :]
        self._change(name, data, lambda fd: pwrite_all(fd, b"patched", at), os.O_RDWR)

    def cut(self) -> None:
        """Truncate, both ways."""
        if (name := self._known()) is None:
            return
        size = self.rng.randrange(100_000)
        data = self.files[name][:size].ljust(size, b"\0")
        self._change(name, data, lambda fd: os.ftruncate(fd, size), os.O_RDWR)

    def link(self) -> None:
        """A second name, and away with it."""
        if (name := self._known()) is not None:
            self._note({"next": {"linked": digest(self.files[name])}, "else": {"linked": None}})
            os.link(self.folder / name, self.folder / "linked")
            assert os.stat(self.folder / name).st_nlink == 2
            self._note({"next": {"linked": None}, "else": {"linked": digest(self.files[name])}})
            os.unlink(self.folder / "linked")

    def unlink(self) -> None:
        """Remove a name."""
        if (name := self._known()) is not None:
            self._note({"next": {name: None}, "else": {name: digest(self.files[name])}})
            os.unlink(self.folder / name)
            del self.files[name]
            assert not os.path.exists(self.folder / name)

    def move(self) -> None:
        """Rename to another name, which may exist."""
        name, target = self._known(), self._fresh()
        if name is None or name == target:
            return
        old = {name: digest(self.files[name]), target: digest(self.files[target]) if target in self.files else None}
        self._note({"next": {target: old[name], name: None}, "else": old})
        os.rename(self.folder / name, self.folder / target)
        self.files[target] = self.files.pop(name)

    def swap(self) -> None:
        """Write, close, and read at once by another descriptor."""
        name, data = "swap", self.rng.randbytes(50_000)
        self._note({"next": {name: ANY}})
        (self.folder / name).write_bytes(data)
        check(self.folder / name, data)
        self._note({"next": {name: None}, "else": {name: digest(data)}})
        os.unlink(self.folder / name)

    def folders(self) -> None:
        """A folder comes and goes."""
        os.mkdir(self.folder / "sub")
        os.mkdir(self.folder / "sub/deep")
        os.rename(self.folder / "sub/deep", self.folder / "sub/moved")
        os.rmdir(self.folder / "sub/moved")
        os.rmdir(self.folder / "sub")

    def attributes(self) -> None:
        """Modes, times and extended attributes."""
        if (name := self._known()) is None:
            return
        path = self.folder / name
        os.setxattr(path, "user.k", b"v")
        assert os.getxattr(path, "user.k") == b"v"
        os.removexattr(path, "user.k")
        os.chmod(path, 0o640)
        os.utime(path, ns=(5, 7))
        assert os.stat(path).st_mtime_ns == 7 and os.stat(path).st_mode & 0o777 == 0o640

    def symbolic(self) -> None:
        """A symbolic link comes and goes."""
        os.symlink("target", self.folder / "symbolic")
        assert os.readlink(self.folder / "symbolic") == "target"
        os.unlink(self.folder / "symbolic")

    def unlinked(self) -> None:
        """A file without a name stays usable."""
        self._note({"next": {"ghost": ANY}})
        with open(self.folder / "ghost", "w+b", buffering=0) as file:
            write_all(file.fileno(), b"a" * 100_000)
            os.unlink(self.folder / "ghost")
            assert os.pread(file.fileno(), 10, 99_995) == b"a" * 5
            assert os.fstat(file.fileno()).st_nlink == 0
        self._note({"next": {"ghost": None}})

    def listing(self) -> None:
        """The names are those of the model."""
        found = set(os.listdir(self.folder))
        assert found == set(self.files), (sorted(found), sorted(self.files))


def write_all(fd: int, data: bytes) -> None:
    """No short write is accepted: a cache's client does not, either."""
    if data:
        done = os.write(fd, data)
        assert done == len(data), (done, len(data))


def pwrite_all(fd: int, data: bytes, offset: int) -> None:
    """The same at a place."""
    done = os.pwrite(fd, data, offset)
    assert done == len(data), (done, len(data))


def check(path: Path, data: bytes) -> None:
    """One read gives all bytes."""
    fd = os.open(path, os.O_RDONLY)
    try:
        found = os.read(fd, len(data) + 1)
    finally:
        os.close(fd)
    assert found == data, f"{path}: {len(found)} bytes instead of {len(data)}, or other ones"


def _lines(journal: Path) -> Iterator[dict[str, Changes]]:
    for line in journal.read_text().splitlines() if journal.exists() else ():
        yield json.loads(line)


def expected(journal: Path) -> tuple[dict[str, str], list[Changes]]:
    """({name: digest} for certain, what the names of the last operation may hold instead); from a journal."""
    files: Changes = {}
    pending: list[Changes] = []
    for line in _lines(journal):
        if "done" in line:
            pending = []
            continue
        new = line["next"]
        old = line.get("else") or {name: files.get(name) for name in new}
        pending = [new, old]
        files.update(new)
    return {name: found for name, found in files.items() if found is not None}, pending


def main(folder: Path, journal: Path, stop: Path, seed: int) -> None:
    """Operate until told to stop, then verify everything."""
    folder.mkdir(exist_ok=True)
    load = Load(folder, journal, seed)
    while not stop.exists():
        load.step()
    for name, data in load.files.items():
        check(folder / name, data)
    load.listing()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
