"""Which folders may serve one mount together: pure, over resolved paths. Knows no kernel.

Invariant: what a daemon reads and writes is never reached through its own mountpoint: it would wait for itself for ever.
"""

import re
from pathlib import Path

from cascadefs.errors import UserError

MEMORY_FOLDER = re.compile(r"cascadefs-[0-9a-f]{16}")  # in shm_dir, one for each store


def check_apart(mountpoint: Path, store: Path, shm_dir: Path) -> None:
    """UserError when the mount would hide its own store or memory tier, or lie in one of them."""
    for what, folder, option in (("store", store, "--store"), ("memory tier", shm_dir, "shm_dir")):
        if _is_below(folder, mountpoint):
            where = "is" if folder == mountpoint else f"would hide {folder}, which is"
            raise UserError(f"the mountpoint {mountpoint} {where} the {what}; give another mountpoint or another {option}")
    if _is_below(mountpoint, store):
        raise UserError(f"the mountpoint {mountpoint} lies in the store {store}; give one outside of it")
    if _is_below(mountpoint, shm_dir) and MEMORY_FOLDER.fullmatch(mountpoint.relative_to(shm_dir).parts[0]):
        raise UserError(f"the mountpoint {mountpoint} lies in a memory tier; give one outside of {shm_dir}")


def _is_below(path: Path, folder: Path) -> bool:
    """At `folder`, or below it."""
    return path == folder or folder in path.parents
