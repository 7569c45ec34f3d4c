"""The places of the parameters that an adapter replaces: the tensors of the base on disk."""

from dataclasses import dataclass, replace

from kasa_cli.adapters.adapter import Adapter, Replacement, TokenRows
from kasa_cli.adapters.base import BaseIndex, Part, StoredPieces, Tensors, pieces_of
from kasa_cli.checkpoint import Piece
from kasa_cli.errors import InvalidInput
from kasa_cli.files import quote
from kasa_cli.model_names import ModuleKind, NameMap, Weight, split_name


@dataclass(frozen=True)
class PlacedValue:
    """The place of a replaced parameter. `shape` is its shape in memory; the pieces are as in `Placed`.

    `vocabulary` is the number of rows (on disk, in the adapter) if the vocabulary was resized. `tied_with` and `tied`
    are as in `Placed`.
    """

    value: Replacement | TokenRows
    kind: ModuleKind
    shape: tuple[int, ...]
    matrices: tuple[tuple[Part, ...], ...]
    is_turned: bool
    vocabulary: tuple[int, int] | None
    tied_with: str | None
    tied: bool


def placed_values(adapter: Adapter, names: NameMap, tensors: Tensors) -> tuple[PlacedValue, ...]:
    """The tensors on disk that the parameters of an adapter replace, completely or by rows.

    Raises:
        InvalidInput: the base lacks a parameter, or its shape differs.
    """
    base = BaseIndex(names, tensors)
    values: tuple[Replacement | TokenRows, ...] = (*adapter.replacements, *adapter.token_rows)
    return tuple(place_value(adapter, base, value) for value in values)


def place_value(adapter: Adapter, base: BaseIndex, value: Replacement | TokenRows) -> PlacedValue:
    """Place one parameter and check its shape. Only an embedding or a head may have another number of rows."""
    weight, touched = parameter_of(base, value), adapter.touched
    stored = pieces_of(base, weight) if len(weight.shape) in (2, 3) else whole(weight)
    new = adapter.container.tensors[value.tensor].shape
    old = weight.shape
    vocabulary = None
    if isinstance(value, TokenRows):
        replacing = [
            replacement.tensor
            for replacement in adapter.replacements
            if replacement.parameter == value.parameter
        ]
        check_rows(value, new, adapter.container.tensors[replacing[0]].shape if replacing else old)
    elif new != old:
        is_vocabulary = value.why != "bias" and len(new) == len(old) and new[1:] == old[1:]
        if not (is_vocabulary and weight.kind in (ModuleKind.EMBEDDING, ModuleKind.HEAD)):
            raise InvalidInput(f"shape {list(new)}, in the base {list(old)}", value.tensor)
        vocabulary = (old[0], new[0])
    # PEFT applies trained rows to the tied module too, but not a whole parameter
    is_alone = (
        isinstance(value, Replacement) and weight.tied_with is not None and weight.tied_with not in touched
    )
    return PlacedValue(
        value, weight.kind, old, stored.matrices, stored.is_turned, vocabulary, weight.tied_with, is_alone
    )


def parameter_of(base: BaseIndex, value: Replacement | TokenRows) -> Weight:
    """The parameter in memory that a value replaces."""
    module, parameter = split_name(value.parameter)
    weight = base.weights.get(value.parameter)
    if weight is None and parameter == "weight":
        weight = base.weight(module)
    name = base.holder(module, parameter) or (value.parameter if value.parameter in base.shapes else None)
    if weight is None and name is not None:
        weight = base.single_tensor(value.parameter, name, base.names.slots[name].kind)
    if weight is None and (other := base.tied(module, parameter)):
        tied_weight = base.single_tensor(
            value.parameter, other, base.weights[module].kind if module in base.weights else ModuleKind.OTHER
        )
        weight = replace(tied_weight, tied_with=base.names.slots[other].module)
    if weight is None:
        problem = f"no such parameter in the base: {quote(value.parameter)}"
        raise InvalidInput(problem, value.tensor, "name the base that it was trained on")
    return weight


def whole(weight: Weight) -> StoredPieces:
    """The piece of a parameter that is not a matrix: it is one tensor on disk."""
    return StoredPieces(
        ((Part(Piece(weight.made_of.names[0]), 0, weight.shape[0] if weight.shape else 1),),), False
    )


def check_rows(value: TokenRows, new: tuple[int, ...], old: tuple[int, ...]) -> None:
    """Check that trained rows are as wide as the embedding, and that it has those rows."""
    if new[1:] != old[1:] or len(new) != len(old):
        raise InvalidInput(f"rows of shape {list(new)} for {list(old)} in the base", value.tensor)
    if value.indices and max(value.indices) >= old[0]:
        raise InvalidInput(f"row {max(value.indices)} is outside the {old[0]} rows of the base", value.tensor)
