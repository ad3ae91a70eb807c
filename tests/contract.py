"""What every StorageAdapter must do; a program, because a system may leave threads, MPI or a changed working folder behind.

`python contract.py NAME FOLDER [FILE]` serves the system in FOLDER and holds it to adapter.py's promises; exit code 0: kept.
FILE is run before: it may register the system.
"""

import sys
from pathlib import Path

from cascadefs.bench.compare import kv
from cascadefs.bench.compare.adapter import Room, Shape, all_systems, occupied_bytes, split
from cascadefs.bench.compare.host import block_name
from cascadefs.bench.targets import find_cli

SHAPE = Shape(ranks=2, tokens=1, blocks=4)
RANK = 1


def make_room(base: Path) -> Room:
    """Plain folders: the contract does not care for the medium."""
    folders = [base / name for name in ("disk", "memory", "huge")]
    for folder in folders:
        folder.mkdir()
    return Room(*folders, cli=find_cli(), note=lambda line: sys.exit(f"left behind: {line}"))


def blocks_of(seed):
    """name -> (keys, values), each in buffers of its own."""
    data, found = kv.KvData(), {}
    for number, whole in enumerate(kv.wholes(SHAPE, SHAPE.blocks)):
        data.fill(whole, number, seed)
        found[block_name(RANK, number)] = split(whole)
    return found


def read_back(adapter, blocks, when):
    """Every block comes back whole, also when all of them are held before they are given back."""
    sinks = kv.blocks(SHAPE, len(blocks))
    held = {name: adapter.get(name, sink) for name, sink in zip(blocks, sinks, strict=True)}
    for name, pair in held.items():
        assert pair is not None, f"{name} is gone {when}"
        assert kv.same(pair, blocks[name]), f"{name} came back with other bytes {when}"
    held.clear()
    adapter.recycle()


def check(adapter, service):
    sink, absent = kv.blocks(SHAPE, 1)[0], block_name(RANK, 99)
    blocks = blocks_of(seed=1)
    (first, pair), *others = blocks.items()
    adapter.put(first, *pair)  # without stage(): it is a help, not a duty
    assert adapter.contains(first) and not adapter.contains(others[0][0])
    for name, pair in others:
        adapter.stage(name, *pair)
    for name, pair in others:
        adapter.put(name, *pair)
        read_back(adapter, {name: pair}, "directly after put()")
    assert all(map(adapter.contains, blocks)) and not adapter.contains(absent)
    assert adapter.get(absent, sink) is None
    adapter.flush()
    read_back(adapter, blocks, "after flush()")
    stored = service.stored_bytes()
    assert stored is None or stored >= SHAPE.rank_bytes // 2, f"{stored} bytes cannot hold the blocks"
    if service.cool is not None:
        adapter.cool()
        service.cool()
        assert all(map(adapter.contains, blocks))
        read_back(adapter, blocks, "after cool()")
    adapter.clear()
    assert not any(map(adapter.contains, blocks))
    assert adapter.get(first, sink) is None
    again = blocks_of(seed=2)
    for name, pair in again.items():
        adapter.put(name, *pair)
    read_back(adapter, again, "after clear() and put()")
    adapter.clear()


def main(name: str, base: Path) -> None:
    """Serve, check, close."""
    system, room = all_systems()[name], make_room(base)
    system.load()
    with system.serve(room, SHAPE) as service:
        adapter = system()
        adapter.initialize(service.address, RANK, SHAPE)
        check(adapter, service)
        adapter.close()
    if name.startswith("raw") and room.disk.exists():
        assert occupied_bytes(room.memory) < SHAPE.block_bytes


if __name__ == "__main__":
    for file in sys.argv[3:]:
        exec(compile(Path(file).read_text(), file, "exec"))
    main(sys.argv[1], Path(sys.argv[2]))
