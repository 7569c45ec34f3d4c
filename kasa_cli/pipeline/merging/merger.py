"""OPERATE, for merges: every tensor that adapters change, from its bytes and theirs, rounded once.

One tensor of the base is in memory at a time (a worker), with what the adapters say about it. Three steps, any of
which may be left out: a replacement of the whole, replacements of rows, and changes (`methods.terms`).
"""

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor

from kasa_cli.adapters.adapter import Adapter, Replacement
from kasa_cli.adapters.parameter_placement import PlacedValue
from kasa_cli.checkpoint.dtypes import TORCH_DTYPES
from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.checkpoint.matrix import Matrix, Orientation, Piece
from kasa_cli.checkpoint.open_files import OpenFiles
from kasa_cli.checkpoint.safetensors_file import Reader, TensorEntry
from kasa_cli.errors import InvalidInput
from kasa_cli.methods.adapter_kinds.change import Change, Term, transposed, weighted
from kasa_cli.methods.adapter_kinds.kind import BaseChange
from kasa_cli.pipeline.adapter_on_base.patches import change_of, expert_changes, is_stack, module_of
from kasa_cli.pipeline.measuring.facts import Facts
from kasa_cli.pipeline.merging.by_rows import Stored, Streamed, TrainedRows
from kasa_cli.pipeline.merging.edits import Edit, Orders
from kasa_cli.pipeline.merging.whole_tensor import Operation, View

NONE: Mapping[str, str] = MappingProxyType({})
KEPT = 4
"""Patches of fused experts whose changes are kept: each is asked for once an expert."""


class Merger:
    """Who merges: the orders for each tensor, and how to carry them out."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        orders: Mapping[str, Orders],
        facts: Facts,
        files: OpenFiles,
        round_off: str,
        sources: Mapping[str, str] = NONE,
    ) -> None:
        """`sources`: tensors that the base does not have, with those of it that they are made from."""
        self.checkpoint, self.orders, self.facts, self.round_off = checkpoint, orders, facts, round_off
        self.files, self.sources = files, sources
        self._stacks: dict[int, list[Change]] = {}
        self._lock = threading.Lock()

    def rewrites(self, name: str) -> bool:
        """Whether an adapter says anything about a tensor."""
        return name in self.orders

    def prepare(self, name: str) -> Operation | Streamed:
        """What becomes of a tensor, by rows where that can be; else read it."""
        orders, source = self.orders[name], self.sources.get(name, name)
        if self.round_off == "nearest" and not orders.is_whole and self._are_floats(source, orders):
            changes = self._changes_of_rows(source, orders)
            if changes is not None:
                return self._streamed(name, source, orders, changes)
        before = self.checkpoint.tensor(source)
        X = self._with_rows(self._replaced(before, orders, name), orders)
        biases = [self.change(edit, None) for edit in orders.biases]
        if X.ndim < 2 or biases:
            return Operation(name, before, X, [], biases, self.round_off)
        views = [self._view(source, X, index, own) for index, own in orders.by_matrix().items()]
        return Operation(name, before, X, views, biases, self.round_off)

    def change(self, edit: Edit, W: Tensor | None) -> Change:
        """What an adapter does to the part of a weight that is here, W seen as (out, in)."""
        if is_stack(edit.place):
            found = self._stack(edit)[edit.number]
        else:
            found = change_of(self._tensors(edit), edit.place, W)
        return _cut_out(weighted(found, edit.merging.weight), edit)

    def _changes_of_rows(self, name: str, orders: Orders) -> dict[int, Sequence[Change]] | None:
        """What is done to the rows of each matrix of a tensor, as its file has them; None where that mixes rows."""
        weight = self.checkpoint.tensor(name) if orders.needs_weight else None
        found: dict[int, Sequence[Change]] = {}
        for index, own in orders.by_matrix().items():
            turned = own[0].is_turned
            W = weight.T if weight is not None and turned else weight
            cuts = self._truncation(name, index, turned, own)
            changes = (*cuts, *(self.change(edit, W) for edit in own))
            if turned and not all(change.is_low_rank for change in changes):
                return None
            found[index or 0] = [transposed(change) for change in changes] if turned else changes
        return found

    def _are_floats(self, source: str, orders: Orders) -> bool:
        dtypes = {self.checkpoint.tensors[source].dtype}
        if orders.replacement is not None:
            adapter, one = orders.replacement
            dtypes.add(adapter.container.tensors[one.value.tensor].dtype)
        return dtypes <= TORCH_DTYPES.keys()

    def _streamed(
        self, name: str, source: str, orders: Orders, changes: Mapping[int, Sequence[Change]]
    ) -> Streamed:
        entry = self.checkpoint.tensors[source]
        before = Stored(self.checkpoint.shards[self.checkpoint.shard_of(source)], source)
        value = None
        if orders.replacement is not None:
            adapter, one = orders.replacement
            require_fit(adapter, one, entry.shape, name)
            value = Stored(adapter.container, one.value.tensor)
        num_matrices = prod(entry.shape[:-2]) if any(index is not None for index in orders.by_matrix()) else 1
        return Streamed(name, before, num_matrices, value, self._trained(orders), changes)

    def _view(self, name: str, X: Tensor, index: int | None, edits: Sequence[Edit]) -> View:
        matrix = X if index is None else X[index]
        turned = edits[0].is_turned
        W = matrix.T if turned else matrix
        cuts = self._truncation(name, index, turned, edits)
        return View(index, turned, (*cuts, *(self.change(edit, W) for edit in edits)))

    def _stack(self, edit: Edit) -> list[Change]:
        """The changes of all experts of a patch, made once for as long as they are asked for."""
        with self._lock:
            key = id(edit.place)
            if key not in self._stacks:
                place = edit.place
                made = expert_changes(self._tensors(edit), module_of(place), len(place.matrices))
                while len(self._stacks) >= KEPT:
                    self._stacks.pop(next(iter(self._stacks)))
                self._stacks[key] = made
            return self._stacks[key]

    def _tensors(self, edit: Edit) -> dict[str, Tensor]:
        return self.files.tensors(edit.merging.adapter.container, edit.place.patch.tensors)

    def _replaced(self, before: Tensor, orders: Orders, name: str) -> Tensor:
        if orders.replacement is None:
            return before
        adapter, value = orders.replacement
        require_fit(adapter, value, before.shape, name)
        found = self.files.tensor(adapter.container, value.value.tensor)
        return (found.T if value.is_turned else found).contiguous()

    def _with_rows(self, X: Tensor, orders: Orders) -> Tensor:
        for one in self._trained(orders):
            X = one.put_into(X, 0)
        return X

    def _trained(self, orders: Orders) -> list[TrainedRows]:
        return [
            TrainedRows(torch.tensor(one.indices), self.files.tensor(adapter.container, one.tensor))
            for adapter, one in orders.rows
        ]

    def _truncation(
        self, name: str, index: int | None, turned: bool, edits: Sequence[Edit]
    ) -> tuple[Change, ...]:
        """KaSA's cut of the base, once: as many components as the adapter that lacks most of them, as in PEFT."""
        cutting = [
            (edit.merging.cuts.rank(name, rank), edit) for edit in edits if (rank := _rank_to_cut(edit))
        ]
        if not cutting:
            return ()
        rank, edit = max(cutting, key=lambda pair: pair[0])
        matrix = Matrix.of(self.checkpoint.tensors, name, (Piece(name, index),), Orientation.of(turned))
        term = edit.merging.cuts.term(self.checkpoint, self.facts, matrix, edit.place.patch.module, rank)
        return () if term is None else (Change(terms=(term,)),)


def require_fit(adapter: Adapter, value: PlacedValue, before: Sequence[int], name: str) -> None:
    """Refuse a value that is not of the shape of what it replaces, or not what its copies are.

    Raises:
        InvalidInput: naming the tensor of the base, or the copy.
    """
    found = adapter.container.tensors[value.value.tensor]
    shape = found.shape[::-1] if value.is_turned else found.shape
    if shape[1:] != tuple(before[1:]) or (shape != tuple(before) and not value.vocabulary):
        what = f"of shape {shape}, in the base {tuple(before)}"
        raise InvalidInput(what, name, "is this the base that it was trained on?")
    for copy in value.value.copies if isinstance(value.value, Replacement) else ():
        other = adapter.container.tensors[copy]
        if (other.dtype, other.shape) != (found.dtype, found.shape) or not _are_equal(adapter, found, other):
            raise InvalidInput(f"not what {found.name} is, which it repeats", copy)


def _are_equal(adapter: Adapter, one: TensorEntry, other: TensorEntry) -> bool:
    with Reader(adapter.container) as first, Reader(adapter.container) as second:
        pairs = zip(first.chunks(one.name), second.chunks(other.name), strict=True)
        return all(bytes(a) == bytes(b) for a, b in pairs)


def _rank_to_cut(edit: Edit) -> int:
    """The rank of an adapter whose base is still to be cut; 0 for others."""
    patch = edit.place.patch
    is_original = edit.merging.cuts_base and patch.base_change is not BaseChange.IN_FILE
    return int(patch.settings["r"]) if is_original else 0


def _cut_out(change: Change, edit: Edit) -> Change:
    """The part of a change that falls on the rows in memory which a piece holds."""
    start, stop = edit.span
    if (start, stop) == (0, edit.place.shape[0]):
        return change
    if change.dense is not None or change.map is not None:
        raise InvalidInput(
            "this kind of adapter is not merged into experts that are apart on disk", edit.place.patch.module
        )
    part = slice(start, stop)
    cut = partial(_columns if edit.place.is_transposed else _rows, part)
    return Change(terms=tuple(cut(term) for term in change.terms))


def _rows(part: slice, term: Term) -> Term:
    return Term(term.L[part], term.R)


def _columns(part: slice, term: Term) -> Term:
    return Term(term.L, term.R[:, part])
