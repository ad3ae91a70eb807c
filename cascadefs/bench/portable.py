"""The portable path: 1, 2 and 4 processes at once read and write, each a file of its own.

Owns: these measures and their goals. Does not know how a mount serves them. Invariant: every process moves the same number of
bytes, so that more processes are more work, and a rate that grows is a gain.
"""

from collections.abc import Sequence
from functools import partial

from cascadefs.bench import io
from cascadefs.bench.io import MIB, READ, WRITE, Figures, Kit, Measure, Place
from cascadefs.bench.lines import Goal
from cascadefs.bench.targets import EXAMPLE, PORTABLE

CLIENTS = (1, 2, 4)
FULL_BYTES, QUICK_BYTES, WARM_UP_BYTES = 128 * MIB, 16 * MIB, 4 * MIB
READS, WRITES = 2.0, 3.0  # times the example
METHOD = (
    "1, 2, 4 processes, each with a file of its own, start at one moment: bytes of all over the time from the first start to"
    " the last end, in 1 MiB calls. The cascadefs mount is made with --no-passthrough; the example is pyfuse3's passthroughfs"
    " with its default options over a huge tmpfs, in a session of its own as a daemon is. Both are read after a reopening, so"
    " the kernel asks for the bytes again.",
    "One run, all places one after the other, the order rotating with the repeat; medians over the repeats.",
)


def name(verb: str, clients: int, size: int) -> str:
    """The row of so many clients."""
    return f"{clients} {'process' if clients == 1 else 'processes'} {verb} {io.size_text(size)} each"


def _clients(clients: int, size: int, place: Place, kit: Kit) -> Figures:
    with io.scratch(place) as folder:
        paths = [folder / str(number) for number in range(clients)]
        wrote = io.together(WRITE, paths, size)
        place.settle()
        read = io.together(READ, paths, size)
    return {name(WRITE, clients, size): wrote, name(READ, clients, size): read}


def measures(size: int) -> list[Measure]:
    """For each number of clients."""
    return [
        Measure({name(verb, clients, size): io.RATE_GB for verb in (WRITE, READ)}, partial(_clients, clients, size))
        for clients in CLIENTS
    ]


def goals(size: int) -> list[Goal]:
    """So many times the example, and never less with more clients."""
    return [*_beside_example(size), *_growing(size, CLIENTS)]


def _beside_example(size: int) -> list[Goal]:
    wanted = ((WRITE, WRITES), (READ, READS))
    return [Goal(name(verb, n, size), limit, True, EXAMPLE, PORTABLE) for verb, limit in wanted for n in CLIENTS]


def _growing(size: int, clients: Sequence[int]) -> list[Goal]:
    steps = list(zip(clients, clients[1:], strict=False))
    return [
        Goal(name(verb, more, size), 1.0, True, PORTABLE, PORTABLE, over=name(verb, fewer, size))
        for verb in (WRITE, READ)
        for fewer, more in steps
    ]
