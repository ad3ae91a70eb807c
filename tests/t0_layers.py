"""Layers import downwards only: the order of the folders in ARCHITECTURE.md, read from the source."""

import ast
import graphlib
from pathlib import Path

import cascadefs

ROOT = Path(cascadefs.__file__).parent
ORDER = [
    ["ext"],
    ["errors", "types", "crash", "locks", "config"],
    ["media"],
    ["formats"],
    ["metadata", "tiers"],
    ["placement"],
    ["contents"],
    ["writeback"],
    ["integrity"],
    ["store"],
    ["stats", "library"],
    ["bench"],
    ["mount"],
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
BESIDE = {"metadata": "tiers", "tiers": "metadata"}  # neither knows the other


def sources():
    """(module below cascadefs, file) of all that is imported from Python."""
    for top, folder in ((ROOT, ""), (ROOT.parent / "mount", "mount.")):
        for file in top.rglob("*.py"):
            parts = file.relative_to(top).with_suffix("").parts
            yield folder + ".".join(part for part in parts if part != "__init__"), file


def imported(file, modules):
    """Modules below cascadefs that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cascadefs"):
            base = node.module.removeprefix("cascadefs").lstrip(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}".lstrip(".")
                yield whole if whole in modules else base


def imported_packages(file):
    """First names of everything that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def graph():
    modules = dict(sources())
    return {name: set(imported(file, modules)) - {name} for name, file in modules.items()}


def folder_of(module):
    return module.partition(".")[0]


def test_folders_import_downwards():
    seen = 0
    for name, targets in graph().items():
        here = folder_of(name)
        for target in targets:
            there = folder_of(target)
            assert LEVEL[there] <= LEVEL[here] and there != BESIDE.get(here), f"{name} imports {target}"
            seen += 1
    assert seen > 300


def test_modules_import_in_no_circle():
    order = list(graphlib.TopologicalSorter(graph()).static_order())  # CycleError names the circle
    assert order.index("media.file_io") < order.index("store")


def calls(file, names):
    """Whether a method of one of these names is called."""
    calls = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
    return any(isinstance(call.func, ast.Attribute) and call.func.attr in names for call in calls)


def test_sql_stands_in_metadata_and_fsck_only():
    homes = {name for name, file in sources() if calls(file, ("execute", "executemany", "executescript"))}
    assert homes and all(name.startswith(("metadata.", "integrity.fsck")) for name in homes), homes


def test_pyfuse3_is_known_below_mount_fuse_only():
    importers = {name for name, file in sources() if "pyfuse3" in imported_packages(file)}
    assert importers and all(name.startswith("mount.fuse.") for name in importers), importers


def test_every_module_has_a_layer():
    assert {folder_of(name) for name in graph()} - {""} <= LEVEL.keys()


def test_architecture_tells_the_same_order():
    told = (ROOT / "ARCHITECTURE.md").read_text().partition("`ext -> ")[2].partition("`")[0]
    assert [level.split(", ") for level in " ".join(told.split()).split(" -> ")] == ORDER[1:]


def test_no_object_is_given_a_callable_of_another_one_from_outside():
    """What hears of something is given when the object is made, or joins by a method: `a.b = self.c` hides who calls whom."""
    hung = []
    for name, file in sources():
        tree = ast.parse(file.read_text())
        methods = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and any(is_of_another(target) for target in node.targets):
                hung += [f"{name}:{node.lineno}" for value in parts(node.value) if is_callable(value, methods)]
    assert not hung, hung


def parts(node):
    return node.elts if isinstance(node, ast.Tuple) else [node]


def is_of_another(target):
    """An attribute, but not of `self` itself."""
    return any(isinstance(one, ast.Attribute) and not isinstance(one.value, ast.Name) for one in parts(target)) or any(
        isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name) and one.value.id != "self" for one in parts(target)
    )


def is_callable(value, methods):
    return isinstance(value, ast.Lambda) or (
        isinstance(value, ast.Attribute)
        and isinstance(value.value, ast.Name)
        and value.value.id == "self"
        and value.attr in methods
    )
