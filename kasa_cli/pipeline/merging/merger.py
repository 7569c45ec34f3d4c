"""The new values of every tensor that adapters change, rounded once.

Each worker processes one tensor of the base with the adapters' tensors for it, in up to three steps: it replaces the
tensor, replaces rows, and applies the changes of its matrices (`adapter_kinds.change`).
"""

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor

from kasa_cli.adapters import Adapter, PlacedValue, Replacement
from kasa_cli.checkpoint import (
    TORCH_DTYPES,
    Checkpoint,
    Matrix,
    OpenFiles,
    Orientation,
    Piece,
    Reader,
    TensorEntry,
)
from kasa_cli.errors import InvalidInput
from kasa_cli.methods.adapter_kinds import BaseChange, Change, Term, transposed, weighted
from kasa_cli.pipeline.adapter_on_base import change_of, expert_changes, is_stack, module_of
from kasa_cli.pipeline.measuring import Facts
from kasa_cli.pipeline.merging.by_rows import StoredTensor, StreamedTensor, TrainedRows
from kasa_cli.pipeline.merging.edits import Edit, TensorEdits
from kasa_cli.pipeline.merging.whole_tensor import View, WholeTensor

NONE: Mapping[str, str] = MappingProxyType({})
KEPT = 4
"""Number of patches of fused experts whose changes are cached: each expert uses them once."""


class Merger:
    """Rewrites every tensor that adapters change."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        edits: Mapping[str, TensorEdits],
        facts: Facts,
        files: OpenFiles,
        round_off: str,
        sources: Mapping[str, str] = NONE,
    ) -> None:
        """`sources` maps new tensors to the tensors of the base that they are made from."""
        self.checkpoint, self.edits, self.facts, self.round_off = checkpoint, edits, facts, round_off
        self.files, self.sources = files, sources
        self._stacks: dict[int, list[Change]] = {}
        self._lock = threading.Lock()

    def rewrites(self, name: str) -> bool:
        """Whether an adapter changes a tensor."""
        return name in self.edits

    def prepare(self, name: str) -> WholeTensor | StreamedTensor:
        """The new value of a tensor: by rows if they are independent, otherwise of the whole tensor in memory."""
        edits, source = self.edits[name], self.sources.get(name, name)
        if self.round_off == "nearest" and not edits.is_whole and self._are_floats(source, edits):
            changes = self._changes_of_rows(source, edits)
            if changes is not None:
                return self._streamed(name, source, edits, changes)
        before = self.checkpoint.tensor(source)
        X = self._with_rows(self._replaced(before, edits, name), edits)
        biases = [self.change(edit, None) for edit in edits.biases]
        if X.ndim < 2 or biases:
            return WholeTensor(name, before, X, [], biases, self.round_off)
        views = [self._view(source, X, index, own) for index, own in edits.by_matrix().items()]
        return WholeTensor(name, before, X, views, biases, self.round_off)

    def change(self, edit: Edit, W: Tensor | None) -> Change:
        """The change of an adapter to the rows of a weight that this tensor holds, with W as (out, in)."""
        if is_stack(edit.place):
            change = self._stack(edit)[edit.number]
        else:
            change = change_of(self._tensors(edit), edit.place, W)
        return _of_stored_rows(weighted(change, edit.merging.weight), edit)

    def _changes_of_rows(self, name: str, edits: TensorEdits) -> dict[int, Sequence[Change]] | None:
        """The changes to the rows of each matrix of a tensor, as stored; None if a change mixes stored rows."""
        weight = self.checkpoint.tensor(name) if edits.needs_weight else None
        by_matrix: dict[int, Sequence[Change]] = {}
        for index, own in edits.by_matrix().items():
            turned = own[0].is_turned
            W = weight.T if weight is not None and turned else weight
            truncation = self._truncation(name, index, turned, own)
            changes = (*truncation, *(self.change(edit, W) for edit in own))
            if turned and not all(change.is_low_rank for change in changes):
                return None
            by_matrix[index or 0] = [transposed(change) for change in changes] if turned else changes
        return by_matrix

    def _are_floats(self, source: str, edits: TensorEdits) -> bool:
        dtypes = {self.checkpoint.tensors[source].dtype}
        if edits.replacement is not None:
            adapter, replacement = edits.replacement
            dtypes.add(adapter.container.tensors[replacement.value.tensor].dtype)
        return dtypes <= TORCH_DTYPES.keys()

    def _streamed(
        self, name: str, source: str, edits: TensorEdits, changes: Mapping[int, Sequence[Change]]
    ) -> StreamedTensor:
        entry = self.checkpoint.tensors[source]
        before = StoredTensor(self.checkpoint.shards[self.checkpoint.shard_of(source)], source)
        value = None
        if edits.replacement is not None:
            adapter, replacement = edits.replacement
            require_fit(adapter, replacement, entry.shape, name)
            value = StoredTensor(adapter.container, replacement.value.tensor)
        num_matrices = prod(entry.shape[:-2]) if any(index is not None for index in edits.by_matrix()) else 1
        return StreamedTensor(name, before, num_matrices, value, self._trained(edits), changes)

    def _view(self, name: str, X: Tensor, index: int | None, edits: Sequence[Edit]) -> View:
        matrix = X if index is None else X[index]
        turned = edits[0].is_turned
        W = matrix.T if turned else matrix
        truncation = self._truncation(name, index, turned, edits)
        return View(index, turned, (*truncation, *(self.change(edit, W) for edit in edits)))

    def _stack(self, edit: Edit) -> list[Change]:
        """The changes of all experts of a patch, cached while other experts need them."""
        with self._lock:
            key = id(edit.place)
            if key not in self._stacks:
                place = edit.place
                changes = expert_changes(self._tensors(edit), module_of(place), len(place.matrices))
                while len(self._stacks) >= KEPT:
                    self._stacks.pop(next(iter(self._stacks)))
                self._stacks[key] = changes
            return self._stacks[key]

    def _tensors(self, edit: Edit) -> dict[str, Tensor]:
        return self.files.tensors(edit.merging.adapter.container, edit.place.patch.tensors)

    def _replaced(self, before: Tensor, edits: TensorEdits, name: str) -> Tensor:
        if edits.replacement is None:
            return before
        adapter, value = edits.replacement
        require_fit(adapter, value, before.shape, name)
        stored = self.files.tensor(adapter.container, value.value.tensor)
        return (stored.T if value.is_turned else stored).contiguous()

    def _with_rows(self, X: Tensor, edits: TensorEdits) -> Tensor:
        for trained_rows in self._trained(edits):
            X = trained_rows.put_into(X, 0)
        return X

    def _trained(self, edits: TensorEdits) -> list[TrainedRows]:
        return [
            TrainedRows(torch.tensor(row.indices), self.files.tensor(adapter.container, row.tensor))
            for adapter, row in edits.rows
        ]

    def _truncation(
        self, name: str, index: int | None, turned: bool, edits: Sequence[Edit]
    ) -> tuple[Change, ...]:
        """KaSA's truncation of the base. It is applied once, with the largest rank of all adapters, as in PEFT."""
        ranks = [
            (edit.merging.truncations.rank(name, rank), edit)
            for edit in edits
            if (rank := _truncation_rank(edit))
        ]
        if not ranks:
            return ()
        rank, edit = max(ranks, key=lambda pair: pair[0])
        matrix = Matrix.of(self.checkpoint.tensors, name, (Piece(name, index),), Orientation.of(turned))
        term = edit.merging.truncations.term(
            self.checkpoint, self.facts, matrix, edit.place.patch.module, rank
        )
        return () if term is None else (Change(terms=(term,)),)


def require_fit(adapter: Adapter, value: PlacedValue, before: Sequence[int], name: str) -> None:
    """Refuse a value that has another shape than the parameter it replaces, or that differs from its copies.

    Raises:
        InvalidInput: naming the tensor of the base, or the copy.
    """
    entry = adapter.container.tensors[value.value.tensor]
    shape = entry.shape[::-1] if value.is_turned else entry.shape
    if shape[1:] != tuple(before[1:]) or (shape != tuple(before) and not value.vocabulary):
        problem = f"the adapter's value has shape {shape}, the base's {tuple(before)}"
        raise InvalidInput(problem, name, "give the base that the adapter was trained on")
    for copy in value.value.copies if isinstance(value.value, Replacement) else ():
        other = adapter.container.tensors[copy]
        if (other.dtype, other.shape) != (entry.dtype, entry.shape) or not _are_equal(adapter, entry, other):
            raise InvalidInput(f"differs from {entry.name}, of which it should be a copy", copy)


def _are_equal(adapter: Adapter, source: TensorEntry, other: TensorEntry) -> bool:
    with Reader(adapter.container) as first, Reader(adapter.container) as second:
        pairs = zip(first.chunks(source.name), second.chunks(other.name), strict=True)
        return all(bytes(a) == bytes(b) for a, b in pairs)


def _truncation_rank(edit: Edit) -> int:
    """The rank of an adapter whose base must still be truncated; 0 for others."""
    patch = edit.place.patch
    is_original = edit.merging.truncates_base and patch.base_change is not BaseChange.IN_FILE
    return int(patch.settings["r"]) if is_original else 0


def _of_stored_rows(change: Change, edit: Edit) -> Change:
    """The part of a change for the rows that a piece on disk holds."""
    start, stop = edit.span
    if (start, stop) == (0, edit.place.shape[0]):
        return change
    if change.dense is not None or change.map is not None:
        raise InvalidInput(
            "kasa does not merge this kind of adapter into experts that are stored as separate tensors",
            edit.place.patch.module,
        )
    part = slice(start, stop)
    part_of = partial(_columns if edit.place.is_transposed else _rows, part)
    return Change(terms=tuple(part_of(term) for term in change.terms))


def _rows(part: slice, term: Term) -> Term:
    return Term(term.L[part], term.R)


def _columns(part: slice, term: Term) -> Term:
    return Term(term.L, term.R[:, part])
