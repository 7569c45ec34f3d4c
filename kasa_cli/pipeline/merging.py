"""OPERATE, for merges: every tensor that adapters change, from its bytes and theirs, rounded once.

One tensor of the base is in memory at a time (a worker), with what the adapters say about it. Three steps, any of
which may be left out: a replacement of the whole, replacements of rows, and changes (`methods.terms`).
"""

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor

from kasa_cli.checkpoint.adapter import Adapter, Replacement, TokenRows
from kasa_cli.checkpoint.adapter_places import Placed
from kasa_cli.checkpoint.adapter_value_places import PlacedValue
from kasa_cli.checkpoint.container import Reader
from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.checkpoint.peft import PEFT_VERSION
from kasa_cli.errors import InvalidInput, UsageError
from kasa_cli.methods import adapters as kinds
from kasa_cli.methods.terms import Change, Term, factors, transposed, weighted
from kasa_cli.pipeline.cuts import Cuts
from kasa_cli.pipeline.facts import Facts
from kasa_cli.pipeline.operation import Operation, View
from kasa_cli.pipeline.patches import IN_FILE, is_stack, module_of
from kasa_cli.pipeline.streamed import Streamed
from kasa_cli.pipeline.weights import Matrix, read_target
from kasa_cli.report import Piece

NONE: Mapping[str, str] = MappingProxyType({})
KEPT = 4
"""Patches of fused experts whose changes are kept: each is asked for once an expert."""


@dataclass(frozen=True)
class Merging:
    """One adapter, where its patches and values go, and its weight.

    `cuts_base`: KaSA's cut is still to be made; `cuts` is what is known of it.
    """

    adapter: Adapter
    placed: tuple[Placed, ...]
    values: tuple[PlacedValue, ...]
    weight: float
    cuts_base: bool
    cuts: Cuts


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
class Orders:
    """All that is to be done to one tensor on disk."""

    edits: list[Edit] = field(default_factory=list)
    biases: list[Edit] = field(default_factory=list)
    replacement: tuple[Adapter, PlacedValue] | None = None
    rows: list[tuple[Adapter, TokenRows]] = field(default_factory=list)
    modules: dict[str, None] = field(default_factory=dict)

    @property
    def adds_terms(self) -> bool:
        """Whether all that is done may be to add terms that are known without the weight."""
        whole = self.biases or self.rows or self.replacement
        kinds_of = [kinds.KINDS[edit.place.patch.kind] for edit in self.edits]
        return not whole and not any(kind.needs_weight for kind in kinds_of)

    @property
    def num_terms(self) -> int:
        """How many adapters' words are in it."""
        return len(self.edits) + len(self.biases) + len(self.rows) + (self.replacement is not None)


def orders_of(mergings: Sequence[Merging]) -> dict[str, Orders]:
    """By tensor on disk what is to be done to it.

    Raises:
        InvalidInput: two adapters replace the same tensor, or a whole value is weighted or lies in pieces.
    """
    orders: defaultdict[str, Orders] = defaultdict(Orders)
    for merging in mergings:
        for place in merging.placed:
            _order_patch(orders, merging, place)
        for value in merging.values:
            _order_value(orders, merging, value)
    for name, order in orders.items():
        _check_rows(name, order)
    return dict(orders)


def _order_patch(orders: dict[str, Orders], merging: Merging, place: Placed) -> None:
    for number, parts in enumerate(place.matrices):
        for part in parts:
            edit = Edit(merging, place, number, part.piece.index, (part.start, part.stop))
            orders[part.piece.name].edits.append(edit)
            orders[part.piece.name].modules[place.patch.module] = None
    if place.bias is not None:
        whole = Edit(merging, place, 0, None, (0, place.shape[0]))
        orders[place.bias].biases.append(whole)
        orders[place.bias].modules[place.patch.module] = None


def _order_value(orders: dict[str, Orders], merging: Merging, value: PlacedValue) -> None:
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


def _check_rows(name: str, order: Orders) -> None:
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


class Merger:
    """Who merges: the orders for each tensor, and how to carry them out. It holds the adapters' files open."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        orders: Mapping[str, Orders],
        facts: Facts,
        round_off: str,
        sources: Mapping[str, str] = NONE,
    ) -> None:
        """`sources`: tensors that the base does not have, with those of it that they are made from."""
        self.checkpoint, self.orders, self.facts, self.round_off = checkpoint, orders, facts, round_off
        self.sources = sources
        self._stacks: dict[int, list[Change]] = {}
        self._readers: dict[Path, Reader] = {}
        self._files = ExitStack()
        self._lock, self._reading = threading.Lock(), threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

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
        X = _with_rows(_replaced(before, orders, name), orders)
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
        place, weight = edit.place, edit.merging.weight
        found = (
            self._stack(edit)[edit.number]
            if len(place.matrices) > 1 or is_stack(place)
            else self._one(edit, W)
        )
        return _cut_out(weighted(found, weight), edit)

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

    def _view(self, name: str, X: Tensor, index: int | None, edits: Sequence[Edit]) -> "View":
        matrix = X if index is None else X[index]
        turned = edits[0].is_turned
        W = matrix.T if turned else matrix
        cuts = self._truncation(name, index, turned, edits)
        return View(index, turned, (*cuts, *(self.change(edit, W) for edit in edits)))

    def _one(self, edit: Edit, W: Tensor | None) -> Change:
        patch = edit.place.patch
        return kinds.change(patch.kind, self._tensors(edit), module_of(edit.place), W)

    def _stack(self, edit: Edit) -> list[Change]:
        """The changes of all experts of a patch, made once for as long as they are asked for."""
        with self._lock:
            key = id(edit.place)
            if key not in self._stacks:
                place = edit.place
                # `placed` has settled which side is which, by the version that wrote the file
                made = kinds.experts(self._tensors(edit), module_of(place), len(place.matrices), PEFT_VERSION)
                while len(self._stacks) >= KEPT:
                    self._stacks.pop(next(iter(self._stacks)))
                self._stacks[key] = made
            return self._stacks[key]

    def _tensors(self, edit: Edit) -> dict[str, Tensor]:
        """A patch's tensors. The file stays open: an adapter of many experts has a header that takes long to read."""
        container = edit.merging.adapter.container
        with self._reading:
            if container.path not in self._readers:
                self._readers[container.path] = self._files.enter_context(Reader(container))
            reader = self._readers[container.path]
            return {short: reader.tensor(name) for short, name in edit.place.patch.tensors.items()}

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


def _replaced(before: Tensor, orders: Orders, name: str) -> Tensor:
    if orders.replacement is None:
        return before
    adapter, value = orders.replacement
    with Reader(adapter.container) as reader:
        found = reader.tensor(value.value.tensor)
        for copy in value.value.copies if isinstance(value.value, Replacement) else ():
            if not torch.equal(found, reader.tensor(copy)):
                raise InvalidInput(f"not what {value.value.tensor} is, which it repeats", copy)
    found = found.T if value.is_turned else found
    if found.shape[1:] != before.shape[1:] or (found.shape != before.shape and not value.vocabulary):
        what = f"of shape {tuple(found.shape)}, in the base {tuple(before.shape)}"
        raise InvalidInput(what, name, "is this the base that it was trained on?")
    return found.contiguous()


def _with_rows(X: Tensor, orders: Orders) -> Tensor:
    for adapter, one in orders.rows:
        with Reader(adapter.container) as reader:
            found = reader.tensor(one.tensor)
        wider = torch.promote_types(X.dtype, found.dtype)  # rounded with all else, and not before
        X = X.to(wider, copy=True)
        X[torch.tensor(one.indices)] = found.to(wider)
    return X
