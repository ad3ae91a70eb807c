"""cascadefs beside other stores of KV blocks: `cascadefs bench compare`.

adapter: what a system must offer; kv: the data; host: the ranks; runner: one measurement after the other; presets: how
much; rows: figures and who leads; show, plots: for people. Adding a system is one file in systems/, such as:

    from pathlib import Path
    from cascadefs.bench.compare.adapter import Safety, StorageAdapter, register, split

    @register
    class Folder(StorageAdapter):                       # one rank's client; serve() starts what all ranks share
        name, title, durable, safety = "folder", "my folder", "page cache", Safety.KERNEL
        def initialize(self, address, rank, shape): self.folder = Path(address)
        def put(self, block_id, key, value): (self.folder / block_id).write_bytes(b"".join((key, value)))
        def get(self, block_id, sink):
            return split(memoryview((self.folder / block_id).read_bytes())) if self.contains(block_id) else None
        def contains(self, block_id): return (self.folder / block_id).exists()
        def clear(self): [path.unlink() for path in self.folder.iterdir()]

flush() and serve() have defaults; missing() says why a system cannot run here. tests/t5_compare.py holds every system to
the contract, this one, too. Imports nothing here: host is also run as a program.
"""
