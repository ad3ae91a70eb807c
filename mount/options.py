"""What may stand behind -o, for mount(8), /etc/fstab and the command line: pure.

Owns: the words and what they mean. Knows no kernel call. Invariant: a word is a flag, a setting of ours, a word of mount(8)'s
own that means nothing here, or an error: none is dropped because it was not understood.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from cascadefs.config import Settings
from cascadefs.errors import UserError

# sys/mount.h. The second of each pair takes the first one back; the last word given counts.
FLAGS = {
    "ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "sync": 16, "remount": 32, "dirsync": 128, "nosymfollow": 256,
    "noatime": 1024, "nodiratime": 2048, "silent": 32768, "relatime": 1 << 21, "strictatime": 1 << 24, "lazytime": 1 << 25,
}  # fmt: skip
OPPOSITES = {
    "rw": "ro", "suid": "nosuid", "dev": "nodev", "exec": "noexec", "async": "sync", "symfollow": "nosymfollow",
    "atime": "noatime", "diratime": "nodiratime", "loud": "silent", "norelatime": "relatime", "nostrictatime": "strictatime",
    "nolazytime": "lazytime",
}  # fmt: skip
# For mount(8) alone. "user" and its kin come with the flags that they imply.
FOREIGN = {"defaults", "auto", "noauto", "user", "nouser", "users", "nousers", "owner", "noowner", "group", "nogroup", "nofail",
           "_netdev", "nostrictmount"}  # fmt: skip
# The last two stand in the kernel's list of a mount, from where mount(8) takes them when it is told to remount.
FOREIGN_KEYS = ("x-", "X-", "comment=", "user=", "uhelper=", "helper=", "fsname=", "subtype=", "user_id=", "group_id=")
# Of the kernel's FUSE or of security modules: handed on as they are. default_permissions is always set.
KERNEL = {"default_permissions", "allow_other"}
KERNEL_KEYS = ("max_read=", "context=", "fscontext=", "defcontext=", "rootcontext=")
SETTINGS = tuple(f.name for f in fields(Settings))
_WORD = re.compile(r'(?:"[^"]*"|[^,"])+')  # as libmount: a comma inside quotes separates nothing


@dataclass(frozen=True)
class Options:
    """`flags`: names of FLAGS; `data`: for the kernel; `settings`: ours; `fails_softly`: nofail was given."""

    flags: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    fails_softly: bool = False

    @property
    def mask(self) -> int:
        """For mount(2)."""
        return sum(FLAGS[name] for name in self.flags)

    @property
    def words(self) -> tuple[str, ...]:
        """Flags and data, as parse() takes them."""
        return self.flags + self.data


def parse(given: Iterable[str], sloppy: bool = False) -> Options:
    """Options from lists with commas. UserError names a word that is not known, unless `sloppy` (mount -s) drops it."""
    flags, data, settings, soft = dict[str, None](), dict[str, None](), dict[str, str](), False
    for word in (word for text in given for word in _WORD.findall(text)):
        key, equals, value = word.partition("=")
        if word in FLAGS:
            flags[word] = None
        elif word in OPPOSITES:
            flags.pop(OPPOSITES[word], None)
        elif word in KERNEL or word.startswith(KERNEL_KEYS):
            data[word] = None
        elif equals and key in SETTINGS:
            settings[key] = value.replace('"', "")
        elif word in FOREIGN or word.startswith(FOREIGN_KEYS):
            soft = soft or word == "nofail"
        elif not sloppy:
            raise UserError(f"the option {word} is not known{_meant(key)}")
    return Options(tuple(flags), tuple(data), settings, soft)


def _meant(key: str) -> str:
    near = difflib.get_close_matches(key, [*FLAGS, *OPPOSITES, *FOREIGN, *KERNEL, *SETTINGS], 1)
    if not near:
        return "; see: man 8 mount, cascadefs config show"
    return f"; did you mean {near[0]}{'=...' if near[0] in SETTINGS and near[0] not in FLAGS else ''}?"


@dataclass(frozen=True)
class Helped:
    """What mount(8) asks of its helper."""

    store: str
    mountpoint: str
    options: tuple[str, ...]
    sloppy: bool
    fake: bool


def parse_helper(words: list[str]) -> Helped:
    """mount.cascadefs STORE MOUNTPOINT [-sfnvrw] [-o options] [-t type] [-N namespace] (see "external helpers" of mount(8))."""
    rest, options, letters, left = list[str](), list[str](), set[str](), list(words)
    while left:
        word = left.pop(0)
        if len(word) < 2 or not word.startswith("-"):
            rest.append(word)
            continue
        for at, letter in enumerate(word[1:], 2):
            if letter not in "sfnvrwotN":
                raise UserError(f"mount.cascadefs does not know {word}")
            letters.add(letter)
            if letter in "otN":  # with a value: the rest of this word, or the next one
                if not word[at:] and not left:
                    raise UserError(f"-{letter} needs a value")
                value = word[at:] or left.pop(0)
                options += [value] if letter == "o" else []
                break
    if len(rest) != 2:
        raise UserError("usage: mount.cascadefs STORE MOUNTPOINT [-o options]")
    if "N" in letters:
        raise UserError("-N is not possible here: enter the namespace first (nsenter --mount)")
    options += [{"r": "ro", "w": "rw"}[letter] for letter in "wr" if letter in letters]
    return Helped(rest[0], rest[1], tuple(options), "s" in letters, "f" in letters)
