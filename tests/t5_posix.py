"""The POSIX cases on folders: tmpfs proves the cases, a live mount in each mode has to pass the same.

Owns the choice of folders and of what the tmpfs of an old kernel cannot do; the cases know nothing of either.
A mode needs a fixture mount_<mode>, a folder on a live mount. Any folder: python -m tests.posix FOLDER [WORD...]
"""

import importlib
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# The cases are tests.posix, because plain `posix` is a module of Python itself; pytest adds only tests/ to the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# Before the import, so that a failing assert of a case shows its values.
pytest.register_assert_rewrite("tests.posix")
posix = importlib.import_module("tests.posix")

KERNEL = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
# tmpfs learned user attributes, O_DIRECT and stable folder positions in Linux 6.6.
NEW_IN_TMPFS = re.compile(r"^xattrs/|direct|attribute_|listing_while|positions_|open_a_hundred")

# What the mount does otherwise, with the reason; the README lists it. Strict: a case that passes must leave the list.
DIFFERENT = {
    "times/times_far_ahead": "times are 64-bit nanoseconds: clamped at the year 2262",
}

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="the cases change users and make device nodes: they need root"),
]


@pytest.fixture(scope="module")
def tmpfs() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="posix-cases-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(params=["tmpfs", "passthrough", "portable"], scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    if request.param == "tmpfs":
        return Path(request.getfixturevalue("tmpfs"))
    return Path(request.getfixturevalue(f"mount_{request.param}"))


@pytest.mark.parametrize("name", posix.CASES)
def test_posix(name: str, folder: Path, request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["folder"] == "tmpfs" and KERNEL < (6, 6) and NEW_IN_TMPFS.search(name):
        pytest.skip("the tmpfs of this kernel cannot judge this case")
    if request.node.callspec.params["folder"] != "tmpfs" and name in DIFFERENT:
        request.applymarker(pytest.mark.xfail(reason=DIFFERENT[name], strict=True))
    posix.run_case(name, posix.CASES[name], folder)
