"""Reads everything back, in the background of an open store, when it is asked to; heals what has a good copy.

Owns: the pace and the figures of a run. Invariants: (1) At most RATE bytes a second are read, past the page cache, and nothing
while applications open and close files, so that nobody notices. (2) A record that was moved or deleted meanwhile is no damage.
"""

import logging
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import trio

from cascadefs.contents.files import Files
from cascadefs.errors import CorruptRecord
from cascadefs.formats.record import MANIFEST, record_bytes
from cascadefs.placement import decisions
from cascadefs.types import Block
from cascadefs.writeback.mover import Mover

log = logging.getLogger(__name__)
RATE_BYTES_S = 512 << 20  # a quarter of an NVMe disk; a terabyte takes half an hour
PAGE = 64  # blocks looked up at once
PATHS_MAX = 1000


@dataclass
class State:
    """Progress and outcome of the current or last run. `runs`: how many have ended."""

    runs: int = 0
    running: bool = False
    bytes_done: int = 0
    bytes_total: int = 0
    healed_blocks: int = 0
    damaged_blocks: int = 0
    damaged_files: list[str] = field(default_factory=list)


class Verifier:
    """One for each open store; `run()` in a nursery."""

    def __init__(self, files: Files, mover: Mover) -> None:
        self.files, self.mover = files, mover
        self.index, self.cold, self.healer = files.index, files.residency.cold, files.residency.healer
        self.state = State()
        self._asked = trio.Event()

    def request(self) -> None:
        """Start a run, unless one is under way."""
        self._asked.set()

    def told(self) -> dict[str, Any]:
        """For status."""
        return asdict(self.state)

    async def run(self) -> None:
        """Wait for requests, serve them, until cancelled."""
        while True:
            await self._asked.wait()
            self.state = State(runs=self.state.runs, running=True, bytes_total=self.index.totals()["live_bytes"])
            try:
                await self._everything()
            except Exception:  # a failing medium must not end the mount; the run ends, and its outcome says what it saw
                log.exception("verification ended early")
                self.state.damaged_blocks += 1
            self._asked = trio.Event()
            self.state.running, self.state.runs = False, self.state.runs + 1
            log.info("verified %d bytes: %d healed, %d damaged", *_figures(self.state))

    async def _everything(self) -> None:
        extent, offset = 0, 0
        while page := self.index.placed_after(extent, offset, PAGE):
            for block in page:
                started = time.monotonic()
                await self._check(block)
                await self._pause(time.monotonic() - started, record_bytes(block.length))
            last = page[-1].location
            assert last is not None
            extent, offset = last.extent, last.offset
        for seq, at, fingerprint in self.index.manifests():
            try:
                await trio.to_thread.run_sync(partial(self.cold.verify, at, fingerprint, MANIFEST))
            except CorruptRecord as e:
                await self._manifest_damaged(seq, e)

    async def _pause(self, took_s: float, size_bytes: int) -> None:
        self.state.bytes_done += size_bytes
        await trio.sleep(max(0.0, size_bytes / RATE_BYTES_S - took_s))
        waited = 0.0
        while not decisions.background_may_run(self.files.quiet_s(time.monotonic()), waited, False):
            await trio.sleep(decisions.QUIET_S)
            waited += decisions.QUIET_S * 10  # half a second of constant use, then one more block

    async def _check(self, block: Block) -> None:
        assert block.location is not None
        try:
            await trio.to_thread.run_sync(partial(self.cold.verify, block.location, block.fingerprint))
            return
        except CorruptRecord:
            if self.index.block(block.bid) != block:
                return
        if await self.mover.heal(block.bid):
            log.warning("record %d:%d was damaged and has been healed", block.location.extent, block.location.offset)
            self.state.healed_blocks += 1
        elif self.index.block(block.bid) == block:
            self.healer.note_damage(block, False)
            self.state.damaged_blocks += 1
            known = set(self.state.damaged_files)
            new = [path for path in self.healer.paths_of(block.bid) if path not in known]
            self.state.damaged_files += new[: PATHS_MAX - len(known)]

    async def _manifest_damaged(self, seq: int, why: CorruptRecord) -> None:
        """What it said is still in the index: a snapshot says it again."""
        if any(known == seq for known, _, _ in self.index.manifests()):
            log.warning("manifest %d is damaged (%s): a snapshot takes its place", seq, why)
            self.mover.journal.incomplete = True
            await self.mover.tell()
            self.state.healed_blocks += 1


def _figures(state: State) -> tuple[int, int, int]:
    return state.bytes_done, state.healed_blocks, state.damaged_blocks
