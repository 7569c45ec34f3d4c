"""The edits of each tensor on disk, collected from all adapters before any value is computed."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kasa_cli.adapters import Adapter, Placed, PlacedValue, Replacement, TokenRows
from kasa_cli.checkpoint import Reader
from kasa_cli.errors import InvalidInput, UsageError
from kasa_cli.pipeline.adapter_on_base import Truncations, needs_weight

WHOLE, AS_STORED = 24, 4
"""Bytes for each entry of a tensor: with its old, new and exact value in memory, and with its old value alone."""


@dataclass(frozen=True)
class Merging:
    """One adapter, the places of its patches and parameters, and its weight.

    `truncates_base`: the base is still to be truncated for it; `truncations` are the known ones.
    """

    adapter: Adapter
    placed: tuple[Placed, ...]
    values: tuple[PlacedValue, ...]
    weight: float
    truncates_base: bool
    truncations: Truncations


@dataclass(frozen=True)
class Edit:
    """A change of one matrix on disk.

    `number` is that of the matrix within the patch, `index` its number within the tensor, and `span` the rows of the
    matrix that the tensor stores.
    """

    merging: Merging
    place: Placed
    number: int
    index: int | None
    span: tuple[int, int]

    @property
    def is_turned(self) -> bool:
        """Whether the file stores the transpose of the matrix that the adapter changes."""
        return self.place.is_turned != self.place.is_transposed


@dataclass
class TensorEdits:
    """All edits of one tensor on disk."""

    edits: list[Edit] = field(default_factory=list)
    biases: list[Edit] = field(default_factory=list)
    replacement: tuple[Adapter, PlacedValue] | None = None
    rows: list[tuple[Adapter, TokenRows]] = field(default_factory=list)
    modules: dict[str, None] = field(default_factory=dict)

    def by_matrix(self) -> dict[int | None, list[Edit]]:
        """The edits of each matrix of a stack, by its number; the key of a single matrix is None."""
        by_index: defaultdict[int | None, list[Edit]] = defaultdict(list)
        for edit in self.edits:
            by_index[edit.index].append(edit)
        return dict(by_index)

    @property
    def needs_weight(self) -> bool:
        """Whether an edit depends on the weight."""
        return any(needs_weight(edit.place.patch) for edit in self.edits)

    @property
    def is_whole(self) -> bool:
        """Whether the whole tensor must be in memory to be changed. Such tensors are few, and most are small."""
        is_other = self.replacement is not None or bool(self.rows)
        is_turned = self.replacement is not None and self.replacement[1].is_turned
        return bool(self.biases) or is_turned or (is_other and self.needs_weight)

    def bytes_held(self, num_entries: int, round_off: str) -> int:
        """Estimated bytes of a tensor of this size that a worker keeps in memory, without the rows in work."""
        is_mixed = self.needs_weight and any(edit.is_turned for edit in self.edits)
        if self.is_whole or is_mixed or round_off != "nearest":
            return WHOLE * num_entries
        return AS_STORED * num_entries if self.needs_weight else 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the adapters that change the tensor, each once, in the order of the edits."""
        named = [edit.merging.adapter.kind for edit in (*self.edits, *self.biases)]
        named += [adapter.kind for adapter, _ in self.rows]
        named += [self.replacement[0].kind] if self.replacement else []
        return tuple(dict.fromkeys(named))

    @property
    def num_terms(self) -> int:
        """Number of adapter contributions."""
        return len(self.edits) + len(self.biases) + len(self.rows) + (self.replacement is not None)


def edits_by_tensor(mergings: Sequence[Merging]) -> dict[str, TensorEdits]:
    """The edits of each tensor on disk.

    Raises:
        InvalidInput: two adapters replace the same tensor, or a replaced parameter is weighted or split on disk.
    """
    edits: defaultdict[str, TensorEdits] = defaultdict(TensorEdits)
    for merging in mergings:
        for place in merging.placed:
            _add_patch(edits, merging, place)
        for value in merging.values:
            _add_value(edits, merging, value)
    for name, tensor_edits in edits.items():
        _check_rows(name, tensor_edits)
    return dict(edits)


def _add_patch(edits: dict[str, TensorEdits], merging: Merging, place: Placed) -> None:
    for number, parts in enumerate(place.matrices):
        for part in parts:
            edit = Edit(merging, place, number, part.piece.index, (part.start, part.stop))
            edits[part.piece.name].edits.append(edit)
            edits[part.piece.name].modules[place.patch.module] = None
    if place.bias is not None:
        whole = Edit(merging, place, 0, None, (0, place.shape[0]))
        edits[place.bias].biases.append(whole)
        edits[place.bias].modules[place.patch.module] = None


def _add_value(edits: dict[str, TensorEdits], merging: Merging, value: PlacedValue) -> None:
    """A parameter that an adapter replaces; it cannot be weighted."""
    parameter = value.value
    pieces = [part.piece for parts in value.matrices for part in parts]
    if len(pieces) != 1 or pieces[0].index is not None:
        raise InvalidInput("kasa cannot replace a parameter that is split on disk", parameter.tensor)
    is_base = isinstance(parameter, Replacement) and parameter.is_base
    if merging.weight != 1 and not is_base:
        raise UsageError("an adapter that replaces parameters can only have weight 1", parameter.tensor)
    tensor_edits = edits[pieces[0].name]
    tensor_edits.modules[parameter.parameter.rpartition(".")[0]] = None
    if isinstance(parameter, TokenRows):
        tensor_edits.rows.append((merging.adapter, parameter))
    elif tensor_edits.replacement is None:
        tensor_edits.replacement = (merging.adapter, value)
    elif not (is_base and _is_repeated(tensor_edits.replacement, merging.adapter, parameter)):
        raise InvalidInput(
            "two adapters replace the same parameter", parameter.parameter, "merge one of them"
        )


def _is_repeated(replacement: tuple[Adapter, PlacedValue], adapter: Adapter, other: Replacement) -> bool:
    """Whether two adapters were trained on the same base, saved with each."""
    previous, value = replacement
    with Reader(previous.container) as first, Reader(adapter.container) as second:
        return torch.equal(first.tensor(value.value.tensor), second.tensor(other.tensor))


def _check_rows(name: str, tensor_edits: TensorEdits) -> None:
    """Check that every adapter has the vocabulary of the merged tensor."""
    if tensor_edits.replacement is None or tensor_edits.replacement[1].vocabulary is None:
        return
    new = tensor_edits.replacement[1].vocabulary[1]
    for edit in tensor_edits.edits:
        if edit.place.shape[0] != new:
            problem = f"{edit.place.shape[0]} rows, {new} in another adapter"
            raise InvalidInput(
                problem, f"{edit.merging.adapter.path}: {name}", "merge adapters of one vocabulary"
            )
    for _, rows in tensor_edits.rows:
        if rows.indices and max(rows.indices) >= new:
            raise InvalidInput(
                f"row {max(rows.indices)} is outside the {new} rows of the vocabulary", rows.tensor
            )
