"""What is left of an unmounted daemon: a shell that sleeps until the memory tier that stays may go, and drops it then.

Owns: that process. Invariant: it decides nothing; `cascadefs drop --expired` looks anew at what is there. If the shell is
killed (a service manager that ends all of a service), the next `cascadefs list` or `drop --expired` does it.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from cascadefs.tiers import owner

STEP_S = 60  # it ends so soon after the tier has gone
SCRIPT = """while [ "$1" -gt 0 ] && [ -e "$2" ]; do sleep "$3"; set -- $(($1 - 1)) "$2" "$3" "$4" "$5"; done
[ ! -e "$2" ] || exec "$4" -m cascadefs.mount.cli drop --expired --shm-dir "$5" """


def start(store: Path) -> None:
    """If the tier of a store stays for a time."""
    memory = owner.read_memory(store)
    found = owner.read_owner(Path(memory.folder)) if memory is not None else None
    if memory is None or found is None or not found.until or not found.is_durable:
        return
    left_s = max(0.0, found.until - time.time()) + 1
    step_s = min(STEP_S, left_s)
    steps = int(left_s / step_s) + 1
    record = Path(memory.folder).joinpath(*owner.RECORD)
    words = [str(steps), str(record), str(step_s), sys.executable, str(record.parent.parent.parent)]
    subprocess.Popen(
        ["/bin/sh", "-c", SCRIPT, "cascadefs-memory", *words],
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
