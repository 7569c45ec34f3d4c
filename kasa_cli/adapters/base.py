"""An index of the base by names in memory: each weight, and the tensors on disk that hold it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kasa_cli.checkpoint import FLOATS, Piece, TensorEntry
from kasa_cli.errors import InvalidInput
from kasa_cli.model_names import (
    Composition,
    ModuleKind,
    NameMap,
    NotAssembled,
    Weight,
    is_turned,
    matrices,
    shapes_of,
    split_name,
)

Tensors = Mapping[str, TensorEntry]
REORDERED = ("PermuteForRope", "Interleave")
"""Operations of transformers that reorder rows: kasa changes no weight that is converted by them."""


@dataclass(frozen=True)
class Part:
    """A piece on disk and the rows [start, stop) of the matrix in memory that it holds."""

    piece: Piece
    start: int
    stop: int


class StoredPieces(NamedTuple):
    """The pieces on disk of a weight in memory; `is_turned` if they hold its transpose."""

    matrices: tuple[tuple[Part, ...], ...]
    is_turned: bool


class BaseIndex:
    """Finds weights and tensors of the base by module and parameter in memory."""

    def __init__(self, names: NameMap, tensors: Tensors) -> None:
        self.names, self.tensors = names, tensors
        self.shapes = {name: entry.shape for name, entry in tensors.items()}
        self.weights = {weight.label: weight for weight in names.weights}
        self.stacks: defaultdict[str, list[Weight]] = defaultdict(list)
        for weight in names.weights:
            if not weight.is_module:
                self.stacks[split_name(weight.label)[0]].append(weight)
        self.holders: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        self.tied_holders: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        for name, slot in names.slots.items():
            self.holders[slot.module, slot.parameter].append(name)
            if slot.tied_with is not None:
                self.tied_holders[slot.tied_with, slot.parameter].append(name)

    def memory_name(self, module: str) -> str:
        """The name of a module in memory. An adapter of an older transformers may have the name on disk."""
        slot = self.names.slots.get(f"{module}.weight")
        if module in self.weights or slot is None or slot.parameter != "weight":
            return module
        weight = self.weights.get(slot.module)
        is_whole = weight is not None and weight.made_of == Composition(((f"{module}.weight",),))
        return slot.module if is_whole or slot.kind is ModuleKind.ROUTER else module

    def weight(self, module: str) -> Weight | None:
        """The matrix of a module: a linear layer, an embedding, a router, or a matrix of an old layout."""
        if module in self.weights and self.weights[module].is_module:
            return self.weights[module]
        name = self.holder(module, "weight")
        if (
            name is not None
            and self.names.slots[name].kind is ModuleKind.ROUTER
            and len(self.shapes[name]) == 2
        ):
            return self.single_tensor(module, name, ModuleKind.ROUTER)
        name = f"{module}.weight"
        return (
            self.single_tensor(module, name, ModuleKind.LINEAR)
            if len(self.shapes.get(name, ())) == 2
            else None
        )

    def holder(self, module: str, parameter: str) -> str | None:
        """The tensor on disk that fills a parameter; None if there are none or several."""
        holders = self.holders.get((module, parameter), [])
        return holders[0] if len(holders) == 1 else None

    def tied(self, module: str, parameter: str) -> str | None:
        """The tensor on disk that fills a parameter because it is tied with that of another module."""
        holders = self.tied_holders.get((module, parameter), [])
        return holders[0] if len(holders) == 1 else None

    def single_tensor(self, module: str, name: str, kind: ModuleKind) -> Weight:
        """A weight that is one tensor on disk."""
        slot = self.names.slots[name]
        made_of = Composition(((name,),))
        return Weight(module, self.shapes[name], kind, True, False, slot.in_block, slot.tied_with, made_of)


def pieces_of(base: BaseIndex, weight: Weight) -> StoredPieces:
    """The pieces of a weight, each with its rows of the weight."""
    try:
        require_known_rows(weight)
        by_matrix = matrices(weight.shape, weight.made_of, base.shapes)
    except NotAssembled as reason:
        raise InvalidInput(str(reason), weight.label) from reason
    check_dtypes(base, weight)
    turned = is_turned(by_matrix[0], weight.shape[-2:], base.shapes)
    return StoredPieces(tuple(parts_of(pieces, base, turned) for pieces in by_matrix), turned)


def require_known_rows(weight: Weight) -> None:
    """Refuse a weight whose rows cannot be located on disk. Raises `NotAssembled`."""
    operations, sides = weight.made_of.operations, weight.shape[-2:]
    reordered = [op for op in operations if op.startswith(REORDERED)]
    if reordered:
        raise NotAssembled(
            f"transformers converts it by {reordered[0]}, which reorders its rows: kasa does not follow this"
        )
    if sides[0] == sides[1] and any(op.startswith("Transpose") for op in operations):
        raise NotAssembled(
            "it is square, and transformers may transpose it when it loads: its orientation is unknown"
        )


def check_dtypes(base: BaseIndex, weight: Weight) -> None:
    """Refuse a weight whose numbers are not floats."""
    for name in weight.made_of.names:
        dtype = base.tensors[name].dtype
        if dtype not in FLOATS:
            raise InvalidInput(f"dtype {dtype} in the base", name, "dequantize the base first")


def parts_of(pieces: Sequence[Piece], base: BaseIndex, turned: bool) -> tuple[Part, ...]:
    """Pieces with the rows that they hold."""
    parts, start = [], 0
    for piece, shape in zip(pieces, shapes_of(tuple(pieces), base.shapes), strict=True):
        stop = start + shape[1 if turned else 0]
        parts.append(Part(piece, start, stop))
        start = stop
    return tuple(parts)
