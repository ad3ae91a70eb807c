"""What `status`, `.cascade/stats` and `.cascade/metrics` tell, gathered from the parts of a store.

Owns: the names of the figures. Changes nothing. Figures are bytes and counts since the store was opened.
"""

import math
import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from cascadefs.store import Store

VERSION = version("cascadefs")


def status(store: Store, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The document behind `cascadefs status --json`; `extra` is what only the mount knows."""
    totals, (files, logical) = store.index.totals(), store.namespace.count_files()
    staged, ahead = _staged(store), store.files.read_ahead
    logical += sum(size - row for size, row, _, _ in staged)
    unique = totals["unique_bytes"] + sum(size for size, _, _, _ in staged)
    return {
        "keeper_pid": None,
        **extra,
        "version": VERSION,
        "store": str(store.settings.store),
        "store_id": store.database.identity.store_id,
        "worker_pid": os.getpid(),
        "files": files,
        "logical_bytes": logical,
        "unique_bytes": unique,
        "dedup_ratio": round(logical / unique, 4) if unique else 1.0,
        "pending_bytes": totals["dirty_bytes"] + sum(blocks * 512 for _, _, blocks, _ in staged),
        "memory_folder": str(store.residency.memory.folder),
        "keep_memory_s": None if math.isinf(store.keep_s) else store.keep_s,  # None: until the next boot
        "memory_notes": store.residency.memory.claim.notes,
        "copy_id": store.residency.memory.claim.copy_id,
        "tiers": tiers(store, totals, staged),
        "damaged_objects": len(store.mover.unflushable),
        "trouble": store.database.health.lines(),
        "damaged_blocks": len(store.residency.healer.still_damaged()),
        "corrupt_reads": store.residency.healer.corrupt_reads,
        "healed_blocks": store.residency.healer.healed,
        "read_ahead": {"fetched": ahead.fetched, "used": ahead.used, "wasted": ahead.wasted},
        "index_notes": store.database.notes,
        "verify": store.verifier.told(),
        "last_error": str(store.mover.last_error) if store.mover.last_error else None,
    }


Staged = list[tuple[int, int, int, bool]]  # size, size in the row, 512-byte blocks, in memory


def _staged(store: Store) -> Staged:
    result = Staged()
    for ino in store.index.staged_inodes():
        row = store.namespace.get(ino)
        now = store.files.with_staged(row)
        if row.nlink:
            result.append((now.size, row.size, now.blocks, store.residency.tier_of(row.home) is store.residency.memory))
    return result


def tiers(store: Store, totals: Mapping[str, int], staged: Staged) -> dict[str, Any]:
    """One entry a tier."""
    residency, space = store.residency, store.database.space()
    dirty_in_memory = sum(size for digest, size in residency.memory.objects.items() if digest not in residency.clean)
    allocated = residency.cold.allocated_bytes()
    return {
        "shm": _tier(
            residency.memory.capacity_bytes,
            residency.memory.used_bytes(),
            dirty_in_memory + sum(blocks * 512 for _, _, blocks, in_memory in staged if in_memory),
            len(residency.memory.objects),
            residency.hits,
            residency.misses,
        ),
        "cold": {
            **_tier(
                allocated + space.f_bavail * space.f_frsize,
                allocated + residency.parking.used_bytes(),
                residency.parking.used_bytes(),
                totals["cold_objects"],
                residency.cold_reads,
                0,
            ),
            "extents": totals["extents"],
            "live_bytes": totals["live_bytes"],
            "dead_bytes": max(0, totals["extent_bytes"] - totals["live_bytes"] - 4096 * totals["extents"]),
        },
    }


def _tier(capacity: int, used: int, dirty: int, objects: int, hits: int, misses: int) -> dict[str, int]:
    names = ("capacity_bytes", "used_bytes", "dirty_bytes", "objects", "hits", "misses")
    return dict(zip(names, (capacity, used, dirty, objects, hits, misses), strict=True))


DAMAGE = ("damaged_blocks", "corrupt_reads", "healed_blocks")


def metrics(document: Mapping[str, Any]) -> bytes:
    """The figures of status() as Prometheus text."""
    registry = CollectorRegistry()
    for name in ("files", "logical_bytes", "unique_bytes", "dedup_ratio", "pending_bytes", "damaged_objects", *DAMAGE):
        Gauge(f"cascadefs_{name}", name.replace("_", " "), registry=registry).set(document[name])
    for name, value in document["read_ahead"].items():
        Gauge(f"cascadefs_read_ahead_{name}", f"objects read ahead, {name}", registry=registry).set(value)
    by_tier: dict[str, Gauge] = {}
    for tier, figures in document["tiers"].items():
        for name, value in figures.items():
            if name not in by_tier:
                by_tier[name] = Gauge(
                    f"cascadefs_tier_{name}", f"{name.replace('_', ' ')} of a tier", ["tier"], registry=registry
                )
            by_tier[name].labels(tier).set(value)
    return generate_latest(registry)
