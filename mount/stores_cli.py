"""Commands about stores that nobody has mounted, and about memory tiers. Owns: what they print and their exit codes.

Invariant: a tier is dropped under its lock, held alone, so never while it is used; what is not durable only by --force.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import humanfriendly

from cascadefs.config import load
from cascadefs.errors import StoreError, UserError
from cascadefs.metadata.sqlite import claim, read_identity
from cascadefs.mount import asking, mountinfo
from cascadefs.mount.fuse import device
from cascadefs.tiers import owner
from cascadefs.tiers.owner import Owner
from cascadefs.tiers.shm import drop_folder

STATES = {
    "in use": "a mount or a program has it",
    "kept": "waits for the next mount of its store",
    "orphan": "its store is gone, moved to another disk, or has another tier",
}


@dataclass(frozen=True)
class Tier:
    """A memory tier. `state`: a key of STATES; `until`: as in its record."""

    folder: str
    store: str
    state: str
    used_bytes: int
    is_durable: bool
    until: float | None


def claimed(store: Path) -> int:
    """A descriptor that holds the lock of a store; StoreError when it is none, or in use."""
    if not (store / "store.json").exists():
        raise StoreError(f"{store} is no cascadefs store: store.json is missing")
    read_identity(store / "store.json")
    return claim(store)


@click.command("new-id")
@click.argument("store", type=click.Path(path_type=Path))
def new_id(store: Path) -> None:
    """Tell a copied STORE that it is a store of its own, to live beside its original."""
    store = mountinfo.resolve(store)
    lock = claimed(store)
    try:
        click.echo(f"{store} is copy {owner.new_copy_id(store)} from now on")
    finally:
        os.close(lock)


# --- what there is


def used_bytes(folder: Path) -> int:
    """Of everything below a folder; a file with two names counts once."""
    sizes: dict[tuple[int, int], int] = {}
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(path, name))
            except FileNotFoundError:
                continue
            sizes[found.st_dev, found.st_ino] = found.st_blocks * 512
    return sum(sizes.values())


def state_of(folder: Path, known: Owner | None) -> str:
    """A key of STATES. Who asks shares the lock for a moment."""
    fd = owner.lock(folder, alone=True)
    if fd is None:
        return "in use"
    os.close(fd)
    if known is None:
        return "orphan"
    try:
        store = Path(known.store)
        is_kept = owner.is_of(known, store, owner.read_memory(store))
    except OSError:
        return "orphan"
    return "kept" if is_kept else "orphan"


def tiers(shm_dirs: list[Path]) -> Iterator[Tier]:
    """Those of this user."""
    for shm_dir in shm_dirs:
        for folder, known in owner.tiers_in(shm_dir):
            told = (known.store, known.is_durable, known.until) if known else ("", False, None)
            state = state_of(folder, known)
            yield Tier(str(folder), told[0], state, used_bytes(folder), told[1] and state != "in use", told[2])


def _mounts() -> Iterator[dict[str, Any]]:
    for path in device.mounts():
        try:
            found = asking.stats(path)
        except UserError as e:
            yield {"mountpoint": str(path), "store": "", "memory_folder": "", "trouble": str(e)}
            continue
        told = {key: found.get(key, "") for key in ("store", "memory_folder")}  # a mount of an older version says less
        yield {"mountpoint": str(path), **told, "trouble": "; ".join(found["trouble"])}


def _shm_dirs(given: Path | None) -> list[Path]:
    found = Path(load({"shm_dir": given}, os.environ, None).settings.shm_dir)
    if given is not None and not found.is_dir():
        raise UserError(f"{given} is not a folder; give the one that memory tiers lie in with --shm-dir")
    return [found]


SHM_DIR = click.option("--shm-dir", type=click.Path(path_type=Path), metavar="DIR", help="Where tiers are (default: /dev/shm).")


@click.command("list")
@SHM_DIR
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def list_all(shm_dir: Path | None, as_json: bool) -> None:
    """Mounts, stores, and memory tiers with their sizes; orphans are tiers whose store is gone."""
    drop_expired(shm_dir)
    mounts = list(_mounts())
    folders = [Path(m["memory_folder"]).parent for m in mounts if m["memory_folder"]]
    found = list(tiers(list(dict.fromkeys([*_shm_dirs(shm_dir), *folders]))))
    names = dict.fromkeys([m["store"] for m in mounts if m["store"]] + [t.store for t in found if t.store])
    stores = [{"store": name, "used_bytes": used_bytes(Path(name))} for name in names if Path(name, "store.json").exists()]
    if as_json:
        click.echo(json.dumps({"mounts": mounts, "stores": stores, "tiers": [asdict(tier) for tier in found]}, indent=2))
        return
    for mount in mounts:
        click.echo(f"mount  {mount['mountpoint']}  {mount['store']}{'  ' if mount['trouble'] else ''}{mount['trouble']}")
    for store in stores:
        click.echo(f"store  {_size(store['used_bytes'])}  {store['store']}")
    for tier in found:
        click.echo(f"tier   {_size(tier.used_bytes)}  {tier.folder}  {tier.state}{_more(tier)}  {tier.store}")


def _size(count: object) -> str:
    return f"{humanfriendly.format_size(count, binary=True):>10}"


def _more(tier: Tier) -> str:
    if tier.state == "in use":
        return ""
    if not tier.is_durable:
        return ", holds what is not durable"
    left_s = max(0.0, tier.until - time.time()) if tier.until else None
    return "" if left_s is None else f" for {humanfriendly.format_timespan(round(left_s))}"


# --- dropping


@click.command()
@click.argument("store", type=click.Path(path_type=Path), required=False)
@click.option("--orphans", is_flag=True, help="All tiers whose store is gone, moved to another disk, or has another tier.")
@click.option("--expired", is_flag=True, help="Those whose time is over (the keep_memory setting).")
@click.option("--force", is_flag=True, help="Also what is not durable: it is lost.")
@SHM_DIR
def drop(store: Path | None, orphans: bool, expired: bool, force: bool, shm_dir: Path | None) -> None:
    """Give back the memory of an unmounted STORE, or of orphans. Never what is in use; only by --force what is not durable."""
    if (store is not None) + orphans + expired != 1:
        raise UserError("say what is to be dropped: a STORE, --orphans or --expired")
    if store is not None:
        _drop_of(mountinfo.resolve(store), shm_dir, force)
    elif orphans:
        _drop_orphans(shm_dir, force)
    else:
        drop_expired(shm_dir)


def _drop_of(store: Path, shm_dir: Path | None, force: bool) -> None:
    lock = claimed(store)
    try:
        folder = owner.tier_of(store, _shm_dirs(shm_dir)[0], read_identity(store / "store.json").store_id)
        if folder is None:
            click.echo(f"{store} has no memory tier")
        elif (why_not := dropped(folder, force)) is not None:
            raise UserError(why_not)
    finally:
        os.close(lock)


def _drop_orphans(shm_dir: Path | None, force: bool) -> None:
    left = list[str]()
    for tier in tiers(_shm_dirs(shm_dir)):
        if tier.state == "orphan" and (why_not := dropped(Path(tier.folder), force)) is not None:
            left.append(why_not)
    if left:
        raise UserError("; ".join(left))


def drop_expired(shm_dir: Path | None) -> None:
    """What is durable and whose time is over."""
    for folder in _shm_dirs(shm_dir):
        for tier, known in owner.tiers_in(folder):
            if known is not None and known.is_durable and known.until and known.until <= time.time():
                dropped(tier, force=False)


def dropped(folder: Path, force: bool) -> str | None:
    """None: it has gone; else why it has not."""
    fd = owner.lock(folder, alone=True)
    if fd is None:
        return f"{folder} is in use"
    try:
        known = owner.read_owner(folder)  # now that nobody can change it
        is_durable = known is not None and known.is_durable
        if not is_durable and not force and not owner.is_empty(folder):
            whose = f" of {known.store}" if known is not None else ""
            return f"{folder}{whose} holds what is not durable: mount that store and flush it, or lose it with --force"
        size = used_bytes(folder)
        drop_folder(folder)
    finally:
        os.close(fd)
    if folder.exists():
        return f"{folder} holds files that are not ours; it is left"
    click.echo(f"dropped {humanfriendly.format_size(size, binary=True)} at {folder}")
    return None
