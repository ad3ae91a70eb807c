"""fsck: everything that a store holds on disk and in memory, checked by rules of its own, and repaired where that is no guess.

Owns: the order of the checks, the exit code. Runs on a store that nobody has mounted, under its lock. Invariants:
(1) Without `repair` nothing is changed. (2) After a repair everything is checked again: the second report counts.
"""

import contextlib
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from cascadefs.errors import StoreError
from cascadefs.integrity.fsck.extents import Checker
from cascadefs.integrity.fsck.index_files import check_identity, check_index, identity_of
from cascadefs.integrity.fsck.names import check_counts, check_namespace
from cascadefs.integrity.fsck.patches import check_logs
from cascadefs.integrity.fsck.repair import Repairer
from cascadefs.integrity.fsck.report import Finding, Places, Progress, Report
from cascadefs.integrity.fsck.tiers import Copies
from cascadefs.metadata.sqlite import claim
from cascadefs.tiers.owner import tier_of

NO_MEMORY = "no-memory"  # a name that a store never has
CLEAN, REPAIRED, DAMAGED = 0, 1, 2  # exit codes


@dataclass
class Outcome:
    """`before`: what was found; `after`: what is left, the same report when nothing was repaired."""

    before: Report
    after: Report

    @property
    def exit_code(self) -> int:
        """CLEAN, REPAIRED or DAMAGED."""
        if self.after.findings:
            return DAMAGED
        return REPAIRED if self.before.findings else CLEAN


def check(store: Path, shm_dir: Path, progress: Progress) -> tuple[Report, Places]:
    """One pass over everything. The caller holds the lock."""
    report = Report()
    text = check_identity(store / "store.json", report)
    if text is None:
        return report, Places(store, shm_dir)
    store_id, secret, block_bytes = identity_of(text)
    places = Places(store, tier_of(store, shm_dir, store_id) or store / NO_MEMORY)
    progress("index", 0, 1)
    image = check_index(store, report)
    progress("index", 1, 1)
    if image is None:
        return report, places
    with contextlib.closing(image):
        try:
            check_namespace(image, report)
            check_counts(image, report)
            Checker(image, places, store_id, secret, report, progress).run()
            Copies(image, places, secret, block_bytes, report, progress).run()
            check_logs(image, places, secret, report)
        except sqlite3.DatabaseError as e:
            report.add("index.db", f"cannot be read further ({e}): run cascadefs rebuild-index")
    return report, places


def run(store: Path, shm_dir: Path, repair: bool, progress: Progress) -> Outcome:
    """Check, repair if asked, check again. StoreError when the store is in use or is none."""
    before, places = _checked(store, shm_dir, progress)
    tried, after = list[Finding](), before
    while repair and any(finding.heal for finding in after.findings) and after.findings != tried:
        tried = after.findings  # healing one thing may uncover another, such as a count that a dead row had hidden
        _repaired(Repairer(places), tried)
        after, places = _checked(store, shm_dir, progress)
    return Outcome(before, after)


def _repaired(repairer: Repairer, findings: list[Finding]) -> None:
    repairer.files(findings)
    with contextlib.suppress(StoreError):  # the index cannot be opened: the check that follows says why
        repairer.rows_and_records(findings)


def _checked(store: Path, shm_dir: Path, progress: Progress) -> tuple[Report, Places]:
    if not (store / "store.json").exists():
        raise StoreError(f"{store} is no cascadefs store: store.json is missing")
    lock = claim(store, changes=False)
    try:
        return check(store, shm_dir, progress)
    finally:
        os.close(lock)


def document(outcome: Outcome) -> dict[str, object]:
    """For --json."""

    def told(report: Report) -> list[dict[str, object]]:
        found = report.findings
        return [{"check": f.check, "what": f.what, "paths": list(f.paths), "healable": f.heal is not None} for f in found]

    after = outcome.after
    return {
        "exit_code": outcome.exit_code,
        "found": told(outcome.before),
        "left": told(after),
        "notes": after.notes,
        "bytes_read": after.bytes_read,
    }
