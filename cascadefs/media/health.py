"""What is wrong with the media right now, in one line each.

Owns: the list of troubles and their lines in the log: one when a trouble begins or changes, one when it is over. Decides
nothing: who meets an error raises it or tries again; this only remembers it. Safe in any thread: each call is one assignment.
"""

import logging
import os
import time
from dataclasses import dataclass

log = logging.getLogger(__name__)
EFFECTS = {
    "index": "changes are refused, reads go on",
    "cold tier": "new data stay in memory or parking until it works again",
    "memory tier": "it cannot be made anew; durable files are read from the disk, and new ones begin there",
}


@dataclass(frozen=True, slots=True)
class Trouble:
    """The errno and the words of the latest error; time.time() of the first."""

    code: int | None
    reason: str
    since: float


class Health:
    """`part` is a key of EFFECTS."""

    def __init__(self) -> None:
        self.troubles: dict[str, Trouble] = {}

    def failed(self, part: str, e: OSError) -> None:
        """A call on a medium failed."""
        known = self.troubles.get(part)
        reason = f"{os.strerror(e.errno)} ({e})" if e.errno else str(e)
        self.troubles[part] = Trouble(e.errno, reason, known.since if known else time.time())
        if known is None or known.code != e.errno:
            log.error("%s: %s; %s", part, reason, EFFECTS[part])

    def worked(self, part: str) -> None:
        """A call succeeded that would have failed before."""
        if part in self.troubles and (known := self.troubles.pop(part, None)) is not None:
            log.warning("%s: works again after %.1f s", part, time.time() - known.since)

    def lines(self) -> list[str]:
        """One line for each trouble."""
        return [f"{part}: {found.reason}; {EFFECTS[part]}" for part, found in sorted(self.troubles.items())]
