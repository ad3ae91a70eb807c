"""Every setting and limit, with unit and reason, and where its value came from.

Owns: names, defaults, parsing and bounds. Precedence: flag > environment CASCADEFS_* > TOML file > default.
Does not know what a setting does. Invariant: a Settings object only exists with values inside their bounds.
"""

import difflib
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import humanfriendly

from cascadefs.errors import ConfigError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

NAME_MAX = 255  # what ext4, tmpfs and Lustre allow; clients read it from statfs
FILE_BYTES_MAX = 2 * TIB  # an object lists its blocks: 2 TiB are half a million rows, about a second of the index's time
SYMLINK_MAX = 4095  # PATH_MAX less the terminating zero
XATTR_VALUE_MAX = 64 * KIB  # XATTR_SIZE_MAX of the kernel


YEAR_S = 366 * 86400


def _size(text: str) -> int:
    try:
        return int(humanfriendly.parse_size(text, binary=True))
    except humanfriendly.InvalidSize:
        raise ValueError("write a size such as 512MiB or 4GiB") from None


def absolute(text: str) -> Path:
    """A folder as the caller means it: `~` is a home, a relative one begins in the working folder. The daemon has another.
    Links are followed before `..`, as the kernel does."""
    home = os.path.expanduser(text)
    if not text or home.startswith("~"):
        raise ValueError("write a folder" if not text else "that home folder is not known; write an absolute path")
    try:
        return Path(os.path.realpath(home))
    except FileNotFoundError:
        raise ValueError("the working folder is gone; write an absolute path") from None


def _time(text: str) -> float:
    """0 is at once, infinity never by itself."""
    if text in ("boot", "inf"):
        return math.inf
    try:
        found = float(humanfriendly.parse_timespan(text))
    except humanfriendly.InvalidTimespan:
        raise ValueError("write a time such as 30m or 2h, or boot (until the next boot)") from None
    if not 0 <= found <= YEAR_S:
        raise ValueError("write a time of at most a year, or boot (until the next boot)")
    return found


def _truth(text: str) -> bool:
    if text.lower() not in ("1", "0", "true", "false", "yes", "no", "on", "off"):
        raise ValueError("write true or false")
    return text.lower() in ("1", "true", "yes", "on")


def _sync(text: str) -> str:
    if text not in ("fsync", "close"):
        raise ValueError("write fsync (durable at fsync) or close (durable at close, too)")
    return text


def _dedup(text: str) -> str:
    if text not in ("store", "user", "off"):
        raise ValueError("write store (equal contents once), user (once for each owner) or off")
    return text


def _seal(text: str) -> str:
    if text not in ("auto", "flush"):
        raise ValueError("write auto (hash what was closed, in the background) or flush (only when a flush or fsync asks)")
    return text


def _level(text: str) -> str:
    if text.lower() not in ("debug", "info", "warning", "error"):
        raise ValueError("write debug, info, warning or error")
    return text.lower()


def default_store() -> Path:
    """$SCRATCH/cascadefs on HPC machines, else the user's data folder."""
    if scratch := os.environ.get("SCRATCH"):
        return absolute(scratch) / "cascadefs"
    home = os.path.expanduser("~")  # without HOME: what the user database says; "~" or "" when it says nothing
    if not os.path.isabs(home):
        raise ConfigError("this user has no home folder to keep a store in; give one: --store DIR or CASCADEFS_STORE")
    return Path(home) / ".local/share/cascadefs"


def quarter_of_ram() -> int:
    """Default memory tier: leaves the application three quarters."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def _setting(parse: Callable[[str], Any], default: Any, low: int | None = None, high: int | None = None, **text: str) -> Any:
    how = {"default_factory": default} if callable(default) else {"default": default}
    return field(**how, metadata={"parse": parse, "low": low, "high": high, **text})


@dataclass(frozen=True)
class Settings:
    """All settings. Sizes are bytes, times seconds."""

    store: Path = _setting(absolute, default_store, help="folder of the cold tier and the index")
    shm_size: int = _setting(_size, quarter_of_ram, 16 * MIB, 64 * TIB, help="capacity of the memory tier")
    shm_dir: Path = _setting(absolute, Path("/dev/shm"), help="where the memory tier's folder is made")
    keep_memory: float = _setting(
        _time, 3600.0, help="how long memory waits for the next mount after umount: 0, 30m, 2h, boot (till the next boot)"
    )
    sync: str = _setting(_sync, "fsync", help="fsync: durable at fsync; close: durable at close, too")
    passthrough: bool = _setting(_truth, True, help="let the kernel move the bytes where it can")
    dedup: str = _setting(_dedup, "store", help="who shares equal contents: store (all), user (files of one owner), off")
    extent_size: int = _setting(_size, GIB, 8 * MIB, 64 * GIB, help="an extent is sealed when it reaches this size")
    promote_limit: int = _setting(
        _size, 256 * MIB, 0, TIB, help="a cold file up to this size is brought to memory before open() answers"
    )
    # For writers that cannot spare the processor or the disk: nothing is hashed behind them, nothing written to the cold tier,
    # until flush, fsync, umount or short memory asks. Until then nothing becomes durable by itself.
    seal: str = _setting(_seal, "auto", help="auto: closed files are hashed and flushed behind; flush: when that is asked for")
    # 50 ms: sealing follows a burst of writes instead of competing with it for the same memory bandwidth.
    seal_delay: float = _setting(float, 0.05, 0, 60, help="seconds between the last close and hashing")
    batch_size: int = _setting(_size, 128 * MIB, 4 * MIB, GIB, help="bytes packed into extents per index commit")
    log: str = _setting(_level, "info", help="debug, info, warning or error")


@dataclass(frozen=True)
class Configuration:
    """The settings; for each name one of: flag, environment, file, default; a line for each variable that is ignored."""

    settings: Settings
    origins: Mapping[str, str]
    notes: tuple[str, ...] = ()


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as e:
        raise ConfigError(f"cannot read the configuration {path}: {e.strerror}; give another file with --config") from e
    except ValueError as e:  # also: not UTF-8
        raise ConfigError(f"{path} is not valid TOML: {e}; correct it or give another file") from e


def _parsed(name: str, value: Any, source: str) -> Any:
    """`value` as the type of setting `name`, inside its bounds."""
    meta = next(f.metadata for f in fields(Settings) if f.name == name)
    try:
        result = meta["parse"](str(value))
    except ValueError as e:
        raise ConfigError(f"{name} = {value!r} ({source}) is not understood: {e}") from e
    low, high = meta["low"], meta["high"]
    if (low is not None and result < low) or (high is not None and result > high):
        unit = humanfriendly.format_size if meta["parse"] is _size else lambda n, binary: f"{n:g}"
        raise ConfigError(
            f"{name} = {value} ({source}) is out of bounds: from {unit(low, binary=True)} to {unit(high, binary=True)}"
        )
    return result


# Variables of this name space that are no settings: of the command line, the benchmark and the tests.
NO_SETTINGS = {
    "CASCADEFS_CONFIG", "CASCADEFS_BIN", "CASCADEFS_PASSTHROUGHFS", "CASCADEFS_CLIENT_FOLDER", "CASCADEFS_CRASH_PLAN",
    "CASCADEFS_KILLS", "CASCADEFS_TREE_KILLS", "CASCADEFS_UPGRADE_MIB", "CASCADEFS_MANY_FILES",
}  # fmt: skip


def load(flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None) -> Configuration:
    """Merge the four sources; `flags` with value None are not given, nor is `file`: then CASCADEFS_CONFIG names it. Raises
    ConfigError with one line."""
    names = [f.name for f in fields(Settings)]
    if file is None and (named := environ.get("CASCADEFS_CONFIG")):
        file = Path(os.path.expanduser(named))
    from_file = _read_file(file) if file else {}
    for key in from_file:
        if key not in names:
            raise ConfigError(f"unknown setting {key!r} in {file}; known: {', '.join(names)}")
    values, origins = {}, {}
    for name in names:
        variable = "CASCADEFS_" + name.upper()
        sources = (("flag", flags.get(name)), ("environment", environ.get(variable)), ("file", from_file.get(name)))
        origins[name], given = next(((o, v) for o, v in sources if v is not None), ("default", None))
        if given is not None:
            values[name] = _parsed(name, given, origins[name])
    return Configuration(Settings(**values), origins, _unknown_variables(environ, names))


def _unknown_variables(environ: Mapping[str, str], names: list[str]) -> tuple[str, ...]:
    """A line for each variable of our name space that is not a setting. It is not an error: a platform may have injected it
    (a Kubernetes service called cascadefs gives each container CASCADEFS_PORT and CASCADEFS_SERVICE_HOST)."""
    ours = [key for key in environ if key.startswith("CASCADEFS_") and key not in NO_SETTINGS]
    unknown = [key for key in ours if key[10:].lower() not in names]
    return tuple(f"{key} in the environment is not a setting and is ignored{_meant(key, names)}" for key in sorted(unknown))


def _meant(key: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key[10:].lower(), names, 1)
    return f"; did you mean CASCADEFS_{near[0].upper()}?" if near else ""
