"""Commands about stores that nobody has mounted, and about memory tiers. Owns: what they print and their exit codes."""

import os
from pathlib import Path

import click

from cascadefs.database import claim, read_identity
from cascadefs.errors import StoreError
from cascadefs.tiers import owner


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
    lock = claimed(store)
    try:
        click.echo(f"{store} is copy {owner.new_copy_id(store)} from now on")
    finally:
        os.close(lock)
