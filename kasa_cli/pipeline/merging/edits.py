"""What adapters ask of each tensor on disk, put together before any of it is done."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kasa_cli.adapters.adapter import Adapter, Replacement, TokenRows
from kasa_cli.adapters.parameter_placement import PlacedValue
from kasa_cli.adapters.placement import Placed
from kasa_cli.checkpoint.safetensors_file import Reader
from kasa_cli.errors import InvalidInput, UsageError
from kasa_cli.pipeline.adapter_on_base.patches import needs_weight
from kasa_cli.pipeline.adapter_on_base.truncated_part import Truncations

WHOLE, AS_STORED = 24, 4
"""Bytes an entry of a tensor that is held as it was, as it becomes and in between, and of one that is only read."""


@dataclass(frozen=True)
class Merging:
    """One adapter, where its patches and values go, and its weight.

    `truncates_base`: KaSA's cut is still to be made; `cuts` is what is known of it.
    """

    adapter: Adapter
    placed: tuple[Placed, ...]
    values: tuple[PlacedValue, ...]
    weight: float
    truncates_base: bool
    truncations: Truncations


@dataclass(frozen=True)
class Edit:
    """A change of one matrix on disk: whose, which of the patch's matrices, and the rows of it that are here."""

    merging: Merging
    place: Placed
    number: int
    index: int | None
    span: tuple[int, int]

    @property
    def is_turned(self) -> bool:
        """Whether the file has the matrix the other way round from what the adapter makes."""
        return self.place.is_turned != self.place.is_transposed


@dataclass
class TensorEdits:
    """All that is to be done to one tensor on disk."""

    edits: list[Edit] = field(default_factory=list)
    biases: list[Edit] = field(default_factory=list)
    replacement: tuple[Adapter, PlacedValue] | None = None
    rows: list[tuple[Adapter, TokenRows]] = field(default_factory=list)
    modules: dict[str, None] = field(default_factory=dict)

    def by_matrix(self) -> dict[int | None, list[Edit]]:
        """The edits of each matrix of a stack, by its number; those of a lone one are under None."""
        found: defaultdict[int | None, list[Edit]] = defaultdict(list)
        for edit in self.edits:
            found[edit.index].append(edit)
        return dict(found)

    @property
    def needs_weight(self) -> bool:
        """Whether an edit is known only with the weight."""
        return any(needs_weight(edit.place.patch) for edit in self.edits)

    @property
    def is_whole(self) -> bool:
        """Whether the tensor must be in memory to be changed: few are, and most of them small."""
        is_other = self.replacement is not None or bool(self.rows)
        is_turned = self.replacement is not None and self.replacement[1].is_turned
        return bool(self.biases) or is_turned or (is_other and self.needs_weight)

    def bytes_held(self, num_entries: int, round_off: str) -> int:
        """What a worker holds of a tensor of so many entries, about, beside the rows in work."""
        is_mixed = self.needs_weight and any(edit.is_turned for edit in self.edits)
        if self.is_whole or is_mixed or round_off != "nearest":
            return WHOLE * num_entries
        return AS_STORED * num_entries if self.needs_weight else 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of those adapters, in their order."""
        named = [edit.merging.adapter.kind for edit in (*self.edits, *self.biases)]
        named += [adapter.kind for adapter, _ in self.rows]
        named += [self.replacement[0].kind] if self.replacement else []
        return tuple(dict.fromkeys(named))

    @property
    def num_terms(self) -> int:
        """How many adapters' words are in it."""
        return len(self.edits) + len(self.biases) + len(self.rows) + (self.replacement is not None)


def edits_by_tensor(mergings: Sequence[Merging]) -> dict[str, TensorEdits]:
    """By tensor on disk what is to be done to it.

    Raises:
        InvalidInput: two adapters replace the same tensor, or a whole value is weighted or lies in pieces.
    """
    orders: defaultdict[str, TensorEdits] = defaultdict(TensorEdits)
    for merging in mergings:
        for place in merging.placed:
            _order_patch(orders, merging, place)
        for value in merging.values:
            _order_value(orders, merging, value)
    for name, order in orders.items():
        _check_rows(name, order)
    return dict(orders)


def _order_patch(orders: dict[str, TensorEdits], merging: Merging, place: Placed) -> None:
    for number, parts in enumerate(place.matrices):
        for part in parts:
            edit = Edit(merging, place, number, part.piece.index, (part.start, part.stop))
            orders[part.piece.name].edits.append(edit)
            orders[part.piece.name].modules[place.patch.module] = None
    if place.bias is not None:
        whole = Edit(merging, place, 0, None, (0, place.shape[0]))
        orders[place.bias].biases.append(whole)
        orders[place.bias].modules[place.patch.module] = None


def _order_value(orders: dict[str, TensorEdits], merging: Merging, value: PlacedValue) -> None:
    """A parameter that an adapter holds anew: it stands for itself, so it has no weight."""
    one = value.value
    pieces = [part.piece for parts in value.matrices for part in parts]
    if len(pieces) != 1 or pieces[0].index is not None:
        raise InvalidInput("a parameter that lies in pieces on disk is not replaced", one.tensor)
    is_base = isinstance(one, Replacement) and one.is_base
    if merging.weight != 1 and not is_base:
        raise UsageError("an adapter that replaces parameters has no weight but 1", one.tensor)
    order = orders[pieces[0].name]
    order.modules[one.parameter.rpartition(".")[0]] = None
    if isinstance(one, TokenRows):
        order.rows.append((merging.adapter, one))
    elif order.replacement is None:
        order.replacement = (merging.adapter, value)
    elif not (is_base and _is_repeated(order.replacement, merging.adapter, one)):
        raise InvalidInput("two adapters replace it", one.parameter, "merge one of them")


def _is_repeated(replacement: tuple[Adapter, PlacedValue], adapter: Adapter, other: Replacement) -> bool:
    """Whether two adapters were trained on the same base, saved with each."""
    first, value = replacement
    with Reader(first.container) as one, Reader(adapter.container) as two:
        return torch.equal(one.tensor(value.value.tensor), two.tensor(other.tensor))


def _check_rows(name: str, order: TensorEdits) -> None:
    """Every adapter means the vocabulary that the tensor has in the end."""
    if order.replacement is None or order.replacement[1].vocabulary is None:
        return
    new = order.replacement[1].vocabulary[1]
    for edit in order.edits:
        if edit.place.shape[0] != new:
            what = f"{edit.place.shape[0]} rows, {new} in another adapter"
            raise InvalidInput(
                what, f"{edit.merging.adapter.path}: {name}", "merge adapters of one vocabulary"
            )
    for _, rows in order.rows:
        if rows.indices and max(rows.indices) >= new:
            raise InvalidInput(f"row {max(rows.indices)} of {new}", rows.tensor)
