"""Faults of the media: shim.c (LD_PRELOAD) records and injects; power.py replays crashes; full.py injects at every call.

Owns: building the shim, the environment of a process under it. The files of a store are below `base`, the log beside it.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def built_shim(folder: Path) -> Path:
    """The compiled shim."""
    library = folder / "shim.so"
    if not library.exists():
        partial = folder / f"shim.{os.getpid()}"
        command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", partial, HERE / "shim.c", "-ldl"]
        subprocess.run([*map(str, command), "-lpthread"], check=True)
        partial.rename(library)
    return library


def environment(shim: Path, *roots: Path, **files: Path) -> dict[str, str]:
    """Of a process whose calls below `roots` go through the shim; `files`: log, control."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CASCADEFS_")}
    named = {f"FAULTS_{name.upper()}": str(path) for name, path in files.items()}
    return kept | {"LD_PRELOAD": str(shim), "FAULTS_ROOTS": ":".join(map(str, roots))} | named


def run(module: str, *words: object, env: dict[str, str], limit_s: float = 120) -> str:
    """Output of `python -m tests.faults.<module>`, which must succeed."""
    command = [sys.executable, "-W", "error", "-m", f"tests.faults.{module}", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit_s, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
