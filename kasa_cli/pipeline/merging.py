"""OPERATE, for merges: every tensor that adapters change, from its bytes and theirs, rounded once.

One tensor of the base is in memory at a time (a worker), with what the adapters say about it. Three steps, any of
which may be left out: a replacement of the whole, replacements of rows, and changes (`methods.terms`).
"""

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from kasa_cli.checkpoint.adapter import Replacement
from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.checkpoint.open_files import OpenFiles
from kasa_cli.errors import InvalidInput
from kasa_cli.methods.terms import Change, Term, factors, transposed, weighted
from kasa_cli.pipeline.facts import Facts
from kasa_cli.pipeline.operation import Operation, View
from kasa_cli.pipeline.orders import Edit, Orders
from kasa_cli.pipeline.patches import IN_FILE, change_of, expert_changes, is_stack, module_of
from kasa_cli.pipeline.streamed import Streamed
from kasa_cli.pipeline.weights import Matrix, read_target
from kasa_cli.report import Piece

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

    def takes(self, name: str) -> bool:
        """Whether an adapter says anything about a tensor."""
        return name in self.orders

    def prepare(self, name: str) -> Operation | Streamed:
        """Make the changes of a tensor, and read it, unless all that they do is to add terms."""
        orders, source = self.orders[name], self.sources.get(name, name)
        if orders.adds_terms and self.round_off == "nearest":
            changes = [(edit, self.change(edit, None)) for edit in orders.edits]
            if all(change.is_low_rank for _, change in changes):
                return Streamed(self.checkpoint, source, self._terms(source, changes))
        before = read_target(self.checkpoint, source)
        X = self._with_rows(self._replaced(before, orders, name), orders)
        biases = [self.change(edit, None) for edit in orders.biases]
        if X.ndim < 2 or biases:
            return Operation(name, before, X, [], biases, self.round_off)
        views = []
        for index in dict.fromkeys(edit.index for edit in orders.edits):
            own = [edit for edit in orders.edits if edit.index == index]
            views.append(self._view(source, X, index, own))
        return Operation(name, before, X, views, biases, self.round_off)

    def change(self, edit: Edit, W: Tensor | None) -> Change:
        """What an adapter does to the part of a weight that is here, W seen as (out, in)."""
        if is_stack(edit.place):
            found = self._stack(edit)[edit.number]
        else:
            found = change_of(self._tensors(edit), edit.place, W)
        return _cut_out(weighted(found, edit.merging.weight), edit)

    def _terms(self, name: str, changes: Sequence[tuple[Edit, Change]]) -> dict[int, Term]:
        """What is added to each matrix of a tensor, in the layout of its file."""
        terms = {}
        for index in dict.fromkeys(edit.index for edit, _ in changes):
            own = [edit for edit, _ in changes if edit.index == index]
            turned = own[0].is_turned
            cuts = self._truncation(name, index, turned, own)
            added = (*cuts, *(change for edit, change in changes if edit.index == index))
            if (term := factors([transposed(one) for one in added] if turned else added)) is not None:
                terms[index or 0] = term
        return terms

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
        found = self.files.tensor(adapter.container, value.value.tensor)
        for copy in value.value.copies if isinstance(value.value, Replacement) else ():
            if not torch.equal(found, self.files.tensor(adapter.container, copy)):
                raise InvalidInput(f"not what {value.value.tensor} is, which it repeats", copy)
        found = found.T if value.is_turned else found
        if found.shape[1:] != before.shape[1:] or (found.shape != before.shape and not value.vocabulary):
            what = f"of shape {tuple(found.shape)}, in the base {tuple(before.shape)}"
            raise InvalidInput(what, name, "is this the base that it was trained on?")
        return found.contiguous()

    def _with_rows(self, X: Tensor, orders: Orders) -> Tensor:
        for adapter, one in orders.rows:
            found = self.files.tensor(adapter.container, one.tensor)
            wider = torch.promote_types(X.dtype, found.dtype)  # rounded with all else, and not before
            X = X.to(wider, copy=True)
            X[torch.tensor(one.indices)] = found.to(wider)
        return X

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
        matrix = Matrix(name, (Piece(name, index),), is_transposed=turned)
        term = edit.merging.cuts.term(self.checkpoint, self.facts, matrix, edit.place.patch.module, rank)
        return () if term is None else (Change(terms=(term,)),)


def _rank_to_cut(edit: Edit) -> int:
    """The rank of an adapter whose base is still to be cut; 0 for others."""
    settings = edit.place.patch.settings
    return int(settings["r"]) if edit.merging.cuts_base and settings.get("base_start") != IN_FILE else 0


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
