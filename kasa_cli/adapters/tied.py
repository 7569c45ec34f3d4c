"""Whether an adapter keeps tied weights equal, and the tensors that each of its parts changes.

PEFT wraps tied modules separately. In training each module uses the shared tensor and its own wrapper; only PEFT's
merge, which works in place, applies the change of one module to all of them.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kasa_cli.adapters.adapter import Adapter, Replacement, TokenRows
from kasa_cli.adapters.base import Part
from kasa_cli.adapters.parameter_placement import PlacedValue
from kasa_cli.adapters.placement import Placed
from kasa_cli.checkpoint import Reader
from kasa_cli.errors import InvalidInput
from kasa_cli.files import enumerated
from kasa_cli.model_names import Group, ModuleKind

PlacedItem = Placed | PlacedValue
Own = Mapping[str, list[PlacedItem]]
"""The parts of an adapter by tied parameter."""
TURNED = {"lora_embedding_A": "lora_B", "lora_embedding_B": "lora_A"}
"""The factors of an embedding by those of a head, which are their transposes."""


@dataclass(frozen=True)
class TiedItems:
    """The parts of an adapter, each with the tied parameters that it changes, if any.

    `apart` are the groups of tied weights that the adapter makes different.
    """

    items: tuple[tuple[PlacedItem, tuple[str, ...]], ...]
    apart: tuple[Group, ...]

    def placed_at(self, names: Mapping[str, str]) -> tuple[tuple[Placed, ...], tuple[PlacedValue, ...]]:
        """All parts, placed on the tensors of `names`, by tied parameter. A parameter without a tensor shares one."""
        items = [
            member
            for item, ends in self.items
            for member in (_placed_at(item, ends, names) if ends else [item])
        ]
        places = tuple(item for item in items if isinstance(item, Placed))
        return places, tuple(item for item in items if isinstance(item, PlacedValue))


def tied_items(adapter: Adapter, items: Sequence[PlacedItem], groups: Iterable[Group]) -> TiedItems:
    """The tied parameters that each part of an adapter changes, and the groups that it unties.

    Raises:
        InvalidInput: the values of the other tied parameters are unknown.
    """
    ends: defaultdict[int, tuple[str, ...]] = defaultdict(tuple)
    dropped, apart = set(), []
    for group in groups:
        own = {end: [item for item in items if end in touched(item)] for end in group.ends}
        shared, repeated = _shared(adapter, own)
        rest = {end: [part for part in parts if part not in shared + repeated] for end, parts in own.items()}
        _require_known(adapter, group, shared, rest)
        if not _all_same(adapter, [*rest.values()]):
            apart.append(group)
        dropped |= {id(member) for member in repeated}
        for member in shared:
            ends[id(member)] = tuple(
                end for end in group.ends if not (_is_base(member) and _replaces(rest[end]))
            )
        for end, parts in rest.items():
            for member in parts:
                ends[id(member)] += (end,)
    return TiedItems(
        tuple((member, ends[id(member)]) for member in items if id(member) not in dropped), tuple(apart)
    )


def touched(item: PlacedItem) -> tuple[str, ...]:
    """The parameters in memory that a part changes."""
    if isinstance(item, PlacedValue):
        return (item.value.parameter,)
    weight, bias = f"{item.patch.module}.{item.patch.parameter}", f"{item.patch.module}.bias"
    return (weight, bias) if item.bias else (weight,)


def _shared(adapter: Adapter, own: Own) -> tuple[list[PlacedItem], list[PlacedItem]]:
    """The parts that apply to all tied parameters, and their repetitions.

    Such parts are a base in the file, and rows of the embedding, which PEFT applies to the tied modules too.
    """
    values = [item for parts in own.values() for item in parts if isinstance(item, PlacedValue)]
    bases: list[PlacedItem] = [value for value in values if _is_base(value)]
    rows: list[PlacedItem] = [value for value in values if isinstance(value.value, TokenRows)]
    is_tied = len(rows) == 1 and isinstance(rows[0], PlacedValue) and rows[0].kind is ModuleKind.EMBEDDING
    is_one = _all_same(adapter, [[base] for base in bases])
    return [*(bases[:1] if is_one else []), *(rows if is_tied else [])], bases[1:] if is_one else []


def _is_base(item: PlacedItem) -> bool:
    """Whether a part is the weight under the adapter, and not its trained value."""
    if isinstance(item, Placed) or isinstance(item.value, TokenRows):
        return False
    return item.value.why == "resized" or (item.value.is_base and bool(item.vocabulary))


def _replaces(items: Sequence[PlacedItem]) -> bool:
    return any(isinstance(item, PlacedValue) and isinstance(item.value, Replacement) for item in items)


def _require_known(adapter: Adapter, group: Group, shared: Sequence[PlacedItem], rest: Own) -> None:
    has_rows = any(isinstance(item, PlacedValue) and isinstance(item.value, TokenRows) for item in shared)
    if has_rows and any(rest.values()):
        problem = (
            f"trained rows of tied weights, and other changes of one of them: {enumerated([*group.ends])}"
        )
        raise InvalidInput(
            problem, str(adapter.container.path), "merge it with PEFT, and compare the tied weights"
        )


def _all_same(adapter: Adapter, lists: Sequence[Sequence[PlacedItem]]) -> bool:
    """Whether all lists hold equal parts."""
    ordered = [sorted(items, key=_order) for items in lists]
    return all(
        len(other) == len(ordered[0]) and all(map(_same, [adapter] * len(other), ordered[0], other))
        for other in ordered[1:]
    )


def _order(item: PlacedItem) -> str:
    return type(item.value).__name__ if isinstance(item, PlacedValue) else f"{item.patch.kind} patch"


def _same(adapter: Adapter, item: PlacedItem, other: PlacedItem) -> bool:
    if isinstance(item, Placed) and isinstance(other, Placed):
        is_alike = _formula(item) == _formula(other)
        return is_alike and _equal(_factors(adapter, item), _factors(adapter, other))
    if isinstance(item, PlacedValue) and isinstance(other, PlacedValue):
        is_alike = _indices(item) == _indices(other)
        return is_alike and _equal(_value(adapter, item), _value(adapter, other))
    return False


def _formula(item: Placed) -> tuple[Any, ...]:
    return item.patch.kind, item.patch.settings, item.patch.base_change


def _indices(item: PlacedValue) -> tuple[int, ...] | None:
    return item.value.indices if isinstance(item.value, TokenRows) else None


def _factors(adapter: Adapter, item: Placed) -> dict[str, Tensor]:
    with Reader(adapter.container) as reader:
        tensors = {short: reader.tensor(name) for short, name in item.patch.tensors.items()}
    return {
        TURNED.get(short, short): tensor.T if short in TURNED else tensor for short, tensor in tensors.items()
    }


def _value(adapter: Adapter, item: PlacedValue) -> dict[str, Tensor]:
    with Reader(adapter.container) as reader:
        return {"": reader.tensor(item.value.tensor)}


def _equal(item: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return item.keys() == other.keys() and all(torch.equal(item[name], other[name]) for name in item)


def _placed_at(item: PlacedItem, ends: Sequence[str], names: Mapping[str, str]) -> list[PlacedItem]:
    if isinstance(item, PlacedValue):
        return [replace(item, matrices=_at(item, names[end])) for end in ends if end in names]
    weight = touched(item)[0]
    if weight in ends and weight not in names:
        return []
    if weight in ends:
        item = replace(item, matrices=_at(item, names[weight]))
    bias = names.get(f"{item.patch.module}.bias", item.bias)
    return [replace(item, bias=bias) if item.bias else item]


def _at(item: PlacedItem, name: str) -> tuple[tuple[Part, ...], ...]:
    """The single piece of a weight, under another name."""
    (part,) = item.matrices[0]
    return ((replace(part, piece=replace(part.piece, name=name)),),)
