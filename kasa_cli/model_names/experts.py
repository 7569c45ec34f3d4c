"""Finds the bytes on disk of a weight in memory: experts are separate tensors on disk and one parameter in memory.

The grouping is that of transformers' own conversion. Singular values are invariant under row permutation and
transposition; conversions that do only that are followed, and others are refused by name.
"""

from collections.abc import Mapping
from typing import NamedTuple

from kasa_cli.checkpoint import Piece

Shapes = Mapping[str, tuple[int, ...]]
Matrices = tuple[tuple[Piece, ...], ...]

MERGE, JOIN_ROWS = "MergeModulelist(dim=0)", "Concatenate(dim=1)"
FOLLOWED = frozenset(
    {
        (2, ()),
        (2, ("Concatenate(dim=0)",)),
        (2, ("PermuteForRope",)),
        (2, ("Transpose(0, 1)",)),
        (3, ()),
        (3, (MERGE,)),
        (3, (MERGE, JOIN_ROWS)),
        (3, (JOIN_ROWS,)),
        (3, ("Interleave(dim=1)",)),
        (3, ("Transpose(1, 2)",)),
    }
)
"""Dimensions in memory, and operations that stack the rows of each matrix, reorder them, or transpose it."""


class NotAssembled(Exception):
    """The tensors on disk do not make up the weight; the message says why."""


class Composition(NamedTuple):
    """The tensors on disk that a parameter is made of, and how.

    `sources` has one group a pattern of transformers' conversion, each in the loader's order.
    """

    sources: tuple[tuple[str, ...], ...] = ()
    operations: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor on disk that the parameter is made of."""
        return tuple(name for group in self.sources for name in group)


def matrices(shape: tuple[int, ...], made_of: Composition, on_disk: Shapes) -> Matrices:
    """The pieces of every matrix of a weight of that shape in memory, each matrix its pieces stacked by rows.

    Raises `NotAssembled` when a tensor is absent, of another shape, or changed in a way that is not followed.
    """
    if not made_of.sources:
        raise NotAssembled("no tensor on disk holds it by itself")
    if (len(shape), made_of.operations) not in FOLLOWED:
        raise NotAssembled(f"transformers makes it by {', '.join(made_of.operations)}: not followed")
    parts = grouped(shape, made_of, on_disk)
    for pieces in parts:
        check_sides(pieces, shape[-2:], made_of, on_disk)
    return parts


def grouped(shape: tuple[int, ...], made_of: Composition, on_disk: Shapes) -> Matrices:
    """The pieces of every matrix, by the number of the expert if there are several."""
    if len(shape) == 2:
        return (tuple(Piece(name) for name in made_of.names),)
    if MERGE in made_of.operations:
        return apart(shape[0], made_of)
    for name in made_of.names:
        check_count(on_disk[name][0], shape[0])
    return tuple(tuple(Piece(name, e) for name in made_of.names) for e in range(shape[0]))


def apart(num_experts: int, made_of: Composition) -> Matrices:
    """The pieces of experts that are separate tensors on disk."""
    numbered = [{number_in(name): name for name in group} for group in made_of.sources]
    for group, named in zip(made_of.sources, numbered, strict=True):
        absent = next((e for e in range(num_experts) if e not in named), None)
        if absent is not None:
            raise NotAssembled(f"expert {absent} of {num_experts} is not whole on disk")
        check_count(len(group), num_experts)
    return tuple(tuple(Piece(named[e]) for named in numbered) for e in range(num_experts))


def check_count(on_disk: int, in_memory: int) -> None:
    """Refuse a number of experts on disk that differs from the number in memory."""
    if on_disk != in_memory:
        raise NotAssembled(f"{on_disk} experts on disk, {in_memory} in memory")


def number_in(name: str) -> int | None:
    """The number of the expert that a tensor belongs to.

    >>> number_in("model.layers.3.experts.11.w1.weight"), number_in("embed.weight")
    (11, None)
    """
    return next((int(part) for part in reversed(name.split(".")) if part.isdecimal()), None)


def check_sides(
    pieces: tuple[Piece, ...], sides: tuple[int, ...], made_of: Composition, on_disk: Shapes
) -> None:
    """Refuse pieces that do not stack to a matrix of these sides."""
    may_turn = any(operation.startswith("Transpose") for operation in made_of.operations)
    shapes = shapes_of(pieces, on_disk)
    if stacked(shapes) not in ({sides, sides[::-1]} if may_turn else {sides}):
        listed = " and ".join(str(list(shape)) for shape in shapes[:4])
        raise NotAssembled(f"{listed} on disk, {list(sides)} in memory")


def is_turned(pieces: tuple[Piece, ...], sides: tuple[int, ...], on_disk: Shapes) -> bool:
    """Whether the files hold the transpose of the matrix in memory."""
    return stacked(shapes_of(pieces, on_disk)) != sides


def shapes_of(pieces: tuple[Piece, ...], on_disk: Shapes) -> list[tuple[int, ...]]:
    """The sides of each piece: the first of three dimensions is the expert's."""
    return [on_disk[piece.name][piece.index is not None :] for piece in pieces]


def stacked(shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of matrices stacked by rows, None if they cannot be.

    >>> stacked([(2, 5), (3, 5)]), stacked([(2, 5), (2, 6)])
    ((5, 5), None)
    """
    widths = {shape[1:] for shape in shapes}
    return (sum(shape[0] for shape in shapes), *widths.pop()) if len(widths) == 1 and all(shapes) else None
