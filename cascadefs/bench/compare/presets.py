"""How much is measured under which name. Owns: the shapes of each preset; fitting them into memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cascadefs.bench.compare.adapter import Shape
from cascadefs.errors import UserError

REPEATS = 3
COPIES = 7  # of the data: source, sink, staged, memory tier (also the next version), server, what a client allocates


@dataclass(frozen=True)
class Preset:
    """`help` says what it is for."""

    shapes: tuple[Shape, ...]
    help: str


# 32 tokens are a block of 10 MiB, 256 tokens one of 80 MiB.
PRESETS: Mapping[str, Preset] = {
    "quick": Preset((Shape(ranks=2, tokens=32, blocks=4),), "2 ranks, 10 MiB blocks, 80 MiB in all: under 2 minutes"),
    "seed": Preset((Shape(ranks=16, tokens=32, blocks=4),), "the ancestor's shape: 16 ranks, 10 MiB blocks; 640 MiB"),
    "llama": Preset((Shape(ranks=2, tokens=256, blocks=4),), "2 ranks, 80 MiB blocks (256 tokens); 640 MiB"),
    "scaling": Preset(
        (
            *(Shape(ranks=ranks, tokens=32, blocks=8 // ranks or 1) for ranks in (1, 2, 4, 8)),
            *(Shape(ranks=2, tokens=tokens, blocks=max(2, 128 // tokens)) for tokens in (1, 8, 128)),
        ),
        "1 to 8 ranks with 10 MiB blocks, 2 ranks with blocks of 320 KiB to 40 MiB: the curves of --plot",
    ),
    "dedup": Preset(
        tuple(Shape(ranks=4, tokens=32, blocks=8, duplicates=share) for share in (0.0, 0.5, 0.9)),
        "no, half and nine tenths of the blocks with a content that others have, too",
    ),
}


def adjusted(shapes: Sequence[Shape], tokens: int | None, ranks: int | None, duplicates: float | None) -> tuple[Shape, ...]:
    """The shapes with what the user asked for instead; those that become equal are one."""
    given = {"tokens": tokens, "ranks": ranks, "duplicates": duplicates}
    wanted = {name: value for name, value in given.items() if value is not None}
    return tuple(dict.fromkeys(replace(shape, **wanted) for shape in shapes))  # type: ignore[arg-type]


def fit(shape: Shape, available_bytes: int) -> Shape:
    """Fewer blocks a rank where memory is short."""
    blocks = min(shape.blocks, available_bytes // (COPIES * shape.ranks * shape.block_bytes))
    if not blocks:
        need = COPIES * shape.ranks * shape.block_bytes >> 20
        raise UserError(f"not enough free memory: {shape.ranks} ranks with blocks of {shape.tokens} tokens need {need} MiB")
    return replace(shape, blocks=blocks)
