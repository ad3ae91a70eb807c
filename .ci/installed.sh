#!/bin/bash
# installed.sh FOLDER: what the wheel in FOLDER, made from the sdist in it, can do in an empty environment, far from the sources:
# the commands start, every kernel is there, a store without a mount and (as root) a mount keep what they are given.
set -euo pipefail
sources=$(cd "$(dirname "$0")/.." && pwd)
packages=$(cd "$1" && pwd)
here=$(mktemp -d)
leave() {
  "$here/venv/bin/cascadefs" umount "$here/mnt" --drop-memory >/dev/null 2>&1 || true
  for memory in "$here"/memory/*/; do umount -l "$memory" 2>/dev/null || true; done  # a library keeps its tier
  rm -rf "$here"
}
trap leave EXIT

for kernel in "$sources"/cython_ext/*.pyx "$sources"/cython_ext/*.pxd; do
  tar -tzf "$packages"/cascadefs-*.tar.gz | grep "/cython_ext/$(basename "$kernel")\$" >/dev/null || { echo "not in the sdist: $kernel" >&2; exit 1; }
done
python3 -m venv "$here/venv"
"$here/venv/bin/python" -m pip install -q --disable-pip-version-check "$packages"/cascadefs-*.whl
cd "$here"
mkdir memory
venv/bin/cascadefs --help >/dev/null
for kernel in "$sources"/cython_ext/*.pyx; do
  venv/bin/python -c "import cascadefs.ext.$(basename "$kernel" .pyx) as kernel; assert kernel.__file__.startswith('$here'), kernel"
done
venv/bin/python - <<'PYTHON'
from pathlib import Path

from cascadefs.config import Settings
from cascadefs.library import Library

with Library(Settings(store=Path("library"), shm_dir=Path("memory").absolute(), shm_size=64 << 20)) as store:
    store.put("block", b"key" * 1000)
    found = bytearray(3000)
    store.get_into("block", found)
    assert found == b"key" * 1000
PYTHON
if [ "$(id -u)" = 0 ] && [ -w /dev/fuse ]; then
  venv/bin/cascadefs mount mnt --store store --shm-size 64MiB >/dev/null
  head -c 1000000 /dev/urandom >given
  cp given mnt/kept
  venv/bin/cascadefs flush mnt >/dev/null
  cmp given mnt/kept
  venv/bin/cascadefs umount mnt --drop-memory >/dev/null
else
  echo "not mounted: that needs root and /dev/fuse"
fi
echo "the wheel works: $(basename "$packages"/cascadefs-*.whl)"
