"""What a store may show after a crash, from the marks of the recorder up to it.

Owns: the rule. Every name in the store is as it was at one moment, not before the last fsync or flush that was answered and
not after the crash; the file behind it shows what it held at its last answered fsync or a later version; if it never had an
answered fsync, any version, or the name is absent.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Version:
    """One file: all its contents in order; those before `kept` are older than what was promised."""

    contents: list[bytes] = field(default_factory=list)
    kept: int | None = None


class Oracle:
    """Hears the marks in order; `trees` are the moments that a crash may show now."""

    def __init__(self) -> None:
        self.trees: list[dict[str, Version]] = [{}]

    def hear(self, mark: Mapping[str, Any]) -> None:
        """One mark."""
        what = mark.get("begin")
        tree = self.trees[-1]
        if what == "write":
            found = tree.get(mark["name"], Version())
            found.contents.append(bytes.fromhex(mark["data"]))
            self.trees.append({**tree, mark["name"]: found})
        elif what == "unlink":
            self.trees.append({name: found for name, found in tree.items() if name != mark["name"]})
        elif what == "rename":
            rest = {name: found for name, found in tree.items() if name != mark["name"]}
            self.trees.append({**rest, mark["target"]: tree[mark["name"]]})
        elif what == "link":
            self.trees.append({**tree, mark["target"]: tree[mark["name"]]})
        elif mark.get("done") in ("fsync", "flush"):
            durable = [tree[mark["name"]]] if mark["done"] == "fsync" else list(tree.values())
            for found in durable:
                found.kept = len(found.contents) - 1
            self.trees = [tree]

    def complaint(self, shown: Mapping[str, bytes]) -> str | None:
        """None when a crash here may show these files; else what is wrong with the likeliest moment."""
        complaints = [self._against(tree, shown) for tree in self.trees]
        return None if None in complaints else complaints[-1]

    def _against(self, tree: Mapping[str, Version], shown: Mapping[str, bytes]) -> str | None:
        for name in shown:
            if name not in tree:
                return f"{name} should not be there"
        for name, found in tree.items():
            if name not in shown:
                if found.kept is not None:
                    return f"{name} was synced and is absent"
            elif shown[name] not in found.contents[found.kept or 0 :]:
                older = shown[name] in found.contents
                return f"{name} {'is older than its fsync' if older else f'holds {len(shown[name])} bytes that it never held'}"
        return None
