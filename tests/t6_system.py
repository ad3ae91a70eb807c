"""What building needs is looked for itself: without dpkg and apt, with a piece missing, the answer is one true line."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "system.sh"
TOOLS = ("bash", "cc", "gcc", "pkg-config", "fusermount3", "id", "cut", "cat", "env")
DNF, ZYPPER = "xxhash-devel sqlite-devel", "xxhash-devel sqlite3-devel"


@pytest.fixture
def path(tmp_path):
    """A PATH with what building needs and no package manager."""
    for tool in TOOLS:
        if (found := shutil.which(tool)) is None:
            pytest.skip(f"this machine has no {tool}")
        (tmp_path / tool).symlink_to(found)
    (tmp_path / "python3").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    return tmp_path


def look(path, **more):
    environ = {"PATH": str(path), "HOME": str(path), **more}
    return subprocess.run([SCRIPT, "build"], env=environ, capture_output=True, text=True, check=False, timeout=120)


def test_it_needs_no_package_manager(path):
    done = look(path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("manager", "advice"),
    [
        (None, f"install libxxhash-dev libsqlite3-dev (apt), {DNF} (dnf), {ZYPPER} (zypper)"),
        ("dnf", f"run: sudo dnf install -y {DNF}"),
        ("zypper", f"run: sudo zypper install -y {ZYPPER}"),
    ],
)
def test_what_is_missing_is_named_in_one_line(path, manager, advice):
    """A compiler that finds no header stands for a system without them."""
    if manager:
        shutil.copy(shutil.which("true"), path / manager)
    done = look(path, CC="gcc -nostdinc")
    assert done.returncode == 1 and done.stderr == f"missing: xxhash.h, sqlite3.h - {advice}\n"


def test_a_missing_tool_is_named(path):
    (path / "pkg-config").unlink()
    done = look(path)
    assert done.returncode == 1
    assert done.stderr.startswith("missing: pkg-config, fuse3.pc - install pkg-config libfuse3-dev (apt)")
    assert done.stderr.count("\n") == 1
