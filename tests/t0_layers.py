"""Layers import downwards only: the order of ARCHITECTURE.md, read from the source."""

import ast
from pathlib import Path

import cascadefs

ROOT = Path(cascadefs.__file__).parent
ORDER = [
    ["ext"],
    ["errors", "types", "config", "crash"],
    ["descriptors"],
    ["doors"],
    ["record", "manifest", "name_ring"],
    ["media", "health"],
    ["reserve", "sums", "patch_log"],
    ["policies", "scheduler", "database"],
    ["xattrs"],
    ["namespace", "index"],
    ["bulk"],
    ["tiers"],
    ["scan"],
    ["rebuild", "fsck"],
    ["written"],
    ["live", "gaps"],
    ["healing", "staged", "holes"],
    ["residency"],
    ["owners", "read_ahead", "adrift"],
    ["files"],
    ["patched"],
    ["sealing", "streams", "recovery", "outgrown"],
    ["journal", "extent", "loss"],
    ["fsyncs", "patches", "straight"],
    ["mover"],
    ["verifier"],
    ["store"],
    ["stats", "library"],
    ["bench"],
    ["mount"],
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def imported(path):
    """Names directly under cascadefs that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cascadefs"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]


def test_imports_point_downwards():
    seen = 0
    for name, level in LEVEL.items():
        folder = ROOT.parent / "mount" if name == "mount" else ROOT / name
        files = folder.rglob("*.py") if folder.is_dir() else [ROOT / f"{name}.py"]
        for file in (f for f in files if f.exists()):
            for target in imported(file):
                assert target in LEVEL and LEVEL[target] <= level, f"{file} imports {target}"
                seen += 1
    assert seen > 10


def test_architecture_tells_the_same_order():
    told = (ROOT / "ARCHITECTURE.md").read_text().partition("`ext -> ")[2].partition("`")[0]
    assert [level.split(", ") for level in " ".join(told.split()).split(" -> ")] == ORDER[1:]
