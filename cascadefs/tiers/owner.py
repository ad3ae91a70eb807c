"""Which memory tier belongs to which copy of a store: a record on each side, and a lock.

Owns: STORE/memory.json (which folder, which token), TIER/owner/record (which store folder, which token, what it holds), and the
lock of the tier's folder. Knows no index. Invariants:
(1) A tier is its store's when device and inode of the store's folder and the token agree. Every other tier is a stranger's: it
    is not read, not written, not emptied. So a copy of a store, however it was made, never has its original's memory.
(2) The token is drawn anew each time a store is opened: an older state of a store that was put back does not fit, either.
(3) Who uses a tier shares its lock; who takes one that has no owner, or drops one, has it alone.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cascadefs.errors import StoreError
from cascadefs.media import file_io
from cascadefs.media.private_files import private_folder

MEMORY = "memory.json"  # in the store
RECORD = ("owner", "record")  # in the tier: a folder, so that the tmpfs that is mounted over it cannot be lost to an rmdir
PREFIX = "cascadefs-"
NAME_DIGITS = 16
LOCK_TRIES, LOCK_S = 20, 1.0


@dataclass(frozen=True, slots=True)
class Owner:
    """What a tier says. `store`: where its folder was, for people. `is_durable`: all that is here, the extents have, too.
    `until`: time.time() at which it may be dropped; None: not yet told; 0: never by itself."""

    store: str
    device: int
    inode: int
    store_id: str
    token: str
    is_durable: bool = False
    until: int | float | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """What a store says. `before`: the token that the tier had before this one. `device`, `inode`: of the store's own folder,
    so that a copy knows that it is one. `copy_id`: which copy of this store id it is."""

    folder: str
    token: str
    before: str
    device: int
    inode: int
    copy_id: str


R = TypeVar("R", Owner, Memory)


def read_owner(folder: Path) -> Owner | None:
    """None: there is no record, or none that makes sense."""
    return _known(Owner, folder.joinpath(*RECORD))


def read_memory(store: Path) -> Memory | None:
    """The same of a store."""
    return _known(Memory, store / MEMORY)


def _known(kind: type[R], path: Path) -> R | None:
    """A record of that kind, if it is whole and each field is what it should be."""
    try:
        found = kind(**_read(path))
    except TypeError:
        return None
    return found if all(isinstance(getattr(found, f.name), f.type) for f in fields(kind)) else None  # type: ignore[arg-type]


def _read(path: Path) -> dict[str, Any]:
    try:
        fd = file_io.open_file(path, os.O_RDONLY)
    except OSError:
        return {}
    with os.fdopen(fd, "rb") as file:
        try:
            known = json.loads(file.read(1 << 16))
        except ValueError:
            return {}
    return known if isinstance(known, dict) else {}


def write_owner(folder: Path, owner: Owner) -> None:
    """Whole or not at all: by another name."""
    private_folder(folder / RECORD[0])
    try:
        _write(folder.joinpath(*RECORD), owner, sync=False)
    except OSError as e:
        if e.errno != errno.ENOSPC or not folder.joinpath(*RECORD).exists():
            raise
        _write_in_place(folder.joinpath(*RECORD), owner)


def _write_in_place(path: Path, owner: Owner) -> None:
    """A full tmpfs has no page for a second file; the first one has a whole page."""
    fd = file_io.open_file(path, os.O_WRONLY)
    try:
        file_io.write_fully(fd, json.dumps(asdict(owner)).encode().ljust(os.fstat(fd).st_size), 0)
    finally:
        os.close(fd)


def write_memory(store: Path, memory: Memory) -> None:
    """Durable afterwards."""
    _write(store / MEMORY, memory, sync=True)
    file_io.sync_folder(store)


def _write(path: Path, record: Owner | Memory, sync: bool) -> None:
    partial = path.with_suffix(".new")
    fd = file_io.open_file(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        file_io.write_fully(fd, json.dumps(asdict(record)).encode(), 0)
        if sync:
            file_io.sync_file(fd)
    finally:
        os.close(fd)
    file_io.rename(partial, path)


def lock(folder: Path, alone: bool) -> int | None:
    """A descriptor of a tier's folder with its lock; None: somebody else has it, or there is no such folder."""
    try:
        fd = file_io.open_file(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def is_of(owner: Owner | None, store: Path, memory: Memory | None) -> bool:
    """Invariant 1."""
    if owner is None or memory is None:
        return False
    here = os.stat(store)
    is_here = (owner.device, owner.inode) == (here.st_dev, here.st_ino)
    return is_here and owner.token in (memory.token, memory.before)


def tier_of(store: Path, shm_dir: Path, store_id: str) -> Path | None:
    """The tier of a store that nobody has open. None: it has none."""
    memory = read_memory(store)
    if memory is not None:
        return Path(memory.folder) if is_of(read_owner(Path(memory.folder)), store, memory) else None
    if (store / MEMORY).exists():
        return None  # damaged: nothing tells whether a tier fits
    folder = first_choice(shm_dir, store_id)  # of a version that kept no records
    return folder if folder.is_dir() and not folder.is_symlink() and read_owner(folder) is None else None


def first_choice(shm_dir: Path, store_id: str) -> Path:
    """The folder that a store takes when it is free."""
    return shm_dir / f"{PREFIX}{store_id[:NAME_DIGITS]}"


class LockHeir(Protocol):
    """Holds the lock beside whoever has the store open, and after it."""

    def locked(self, lock_fd: int) -> None:
        """The lock is this one now."""


class Claim:
    """The tier of one store that is being opened or open: found, or begun. `notes`: what is worth a line."""

    def __init__(self, store: Path, shm_dir: Path, store_id: str) -> None:
        self.notes: list[str] = []
        self._store, self._shm_dir, self._store_id = store, shm_dir, store_id
        here = os.stat(store)
        self._place = (here.st_dev, here.st_ino)
        self.memory = read_memory(store)
        self.lock_fd = -1
        self._heirs = list[LockHeir]()
        self.is_copy = self.memory is not None and (self.memory.device, self.memory.inode) != self._place
        self._found = tier_of(store, shm_dir, store_id)
        self._token = secrets.token_hex(16)
        self.folder = self._found or self._begun()
        self._tell()

    def bequeath(self, heir: LockHeir) -> None:
        """From now on it holds the lock, too."""
        self._heirs.append(heir)
        heir.locked(self.lock_fd)

    @property
    def is_elsewhere(self) -> bool:
        """Whether the tier that was found lies in another folder than the setting says."""
        return self._found is not None and self._found.resolve().parent != self._shm_dir.resolve()

    def begin_anew(self) -> None:
        """Not with the tier that was found."""
        self._found, self.folder = None, self._begun()

    @property
    def copy_id(self) -> str:
        """Tells this store from its copies."""
        return self.memory.copy_id if self.memory is not None else ""

    def _begun(self) -> Path:
        """A folder that nobody has: whoever makes it has it. An empty one without an owner, or of ours, will do: a crash came
        before it had one, or its tmpfs was taken away."""
        folder = first_choice(self._shm_dir, self._store_id)
        while True:
            try:
                os.mkdir(folder, 0o700)
                return folder
            except FileExistsError:
                if self._is_nobodys(folder):
                    return folder
                folder = first_choice(self._shm_dir, secrets.token_hex(NAME_DIGITS))
            except OSError as e:
                raise StoreError(f"no memory tier can be made in {self._shm_dir}: {e.strerror}; give another shm_dir") from e

    def _is_nobodys(self, folder: Path) -> bool:
        fd = lock(folder, alone=True)
        if fd is None:
            return False
        try:
            owner = read_owner(folder)
            if os.fstat(fd).st_uid != os.geteuid():
                return False
            return (owner is None or (owner.device, owner.inode) == self._place) and is_empty(folder)
        finally:
            os.close(fd)

    def _tell(self) -> None:
        if self.memory is None or self._found is not None:
            return
        owner = read_owner(Path(self.memory.folder))
        if self.is_copy:
            left = f": {self.memory.folder} is its original's" if owner is not None else ""
            self.notes.append(f"{self._store} is a copy of another store: it has a memory tier of its own{left}")
        elif owner is not None and owner.store_id == self._store_id:
            self.notes.append(f"the memory tier {self.memory.folder} is not of this state of the store; it is left alone")

    def announce(self) -> None:
        """The store says durably which tier it will have. Before anything in the tier is changed."""
        copy_id = secrets.token_hex(16) if self.is_copy or self.memory is None else self.memory.copy_id
        known = read_owner(self.folder) if self._found is not None else None
        before = known.token if known is not None else ""
        self.memory = Memory(os.path.abspath(self.folder), self._token, before, *self._place, copy_id)
        write_memory(self._store, self.memory)

    def take_over(self) -> None:
        """For a later worker of a mount: everything goes on as it was."""
        if self._found is None or self.memory is None:
            self.announce()
        else:
            self._token = self.memory.token

    def begin_again(self) -> None:
        """The folder was taken away, or emptied, by somebody else: the same one is made anew, or where something else has its
        place by now, another one."""
        os.makedirs(self.folder.parent, 0o700, exist_ok=True)
        if os.path.lexists(self.folder) and not self._is_ours():
            self.begin_anew()
        if self.memory is None or self.memory.folder != os.path.abspath(self.folder):
            self.announce()

    def _is_ours(self) -> bool:
        """Whether a folder of this user's has the tier's place, and no other store."""
        found, owner = os.lstat(self.folder), read_owner(self.folder)
        is_others = owner is not None and (owner.device, owner.inode) != self._place
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not is_others

    def sign(self, folder: Path) -> None:
        """The tier says whose it is, and that it may hold what nobody else has."""
        try:
            write_owner(folder, Owner(os.path.abspath(self._store), *self._place, self._store_id, self._token))
        except OSError as e:
            what = f"the memory tier {folder} cannot be used: {e.strerror}"
            raise StoreError(f"{what}; free space there or give another shm_dir") from e

    def hold(self, folder: Path) -> None:
        """Share the lock from now on."""
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
        self.lock_fd = -1
        for _ in range(LOCK_TRIES):
            if (found := lock(folder, alone=False)) is not None:
                break
            time.sleep(LOCK_S / LOCK_TRIES)  # who only asks whether it is used has it for a moment
        if found is None:
            raise StoreError(f"the memory tier {folder} is about to be dropped by another process; mount again")
        self.lock_fd = found
        for heir in self._heirs:
            heir.locked(found)

    def leave(self, folder: Path, is_durable: bool, until: float) -> None:
        """The store is closed and its memory stays. A full tmpfs may refuse: then it says what it said."""
        owner = read_owner(folder)
        if owner is not None and owner.token == self._token:
            with contextlib.suppress(OSError):
                write_owner(folder, replace(owner, is_durable=is_durable, until=until))

    def close(self) -> None:
        """Let go of the lock."""
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
            self.lock_fd = -1


def is_empty(folder: Path) -> bool:
    """Whether a tier has no file but its record."""
    return not any(files for path, _, files in os.walk(folder) if path != str(folder / RECORD[0]))


def unsign(folder: Path) -> None:
    """The record goes, and its folder."""
    for name in ("record", "record.new"):
        file_io.remove(folder / RECORD[0] / name)
    with contextlib.suppress(OSError):
        os.rmdir(folder / RECORD[0])


def tiers_in(shm_dir: Path) -> Iterator[tuple[Path, Owner | None]]:
    """All memory tiers of this user there."""
    try:
        entries = sorted(os.scandir(shm_dir), key=lambda entry: entry.name)
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR):
            return
        raise StoreError(f"{shm_dir} cannot be read: {e.strerror}") from e
    for entry in entries:
        is_named_so = entry.name.startswith(PREFIX) and len(entry.name) == len(PREFIX) + NAME_DIGITS
        if is_named_so and entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.geteuid():
            yield Path(entry.path), read_owner(Path(entry.path))


def new_copy_id(store: Path) -> str:
    """A store that nobody has open, and that may be a copy, is told to be a store of its own; its new copy_id. It keeps its
    memory tier, if it has one."""
    here, known, copy_id = os.stat(store), read_memory(store), secrets.token_hex(16)
    if known is None or (known.device, known.inode) != (here.st_dev, here.st_ino):
        known = Memory(str(store / "no-memory"), secrets.token_hex(16), "", here.st_dev, here.st_ino, copy_id)
    write_memory(store, replace(known, copy_id=copy_id))
    return copy_id
