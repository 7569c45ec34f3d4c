"""Figures of an adapter: its update of each weight, from its file and, if necessary, from the base.

Products of factors are never formed. The singular values of a sum of low-rank terms come from the factors; any other
update is computed some rows at a time.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kasa_cli.adapters import UNKNOWN_PARAMETER, Adapter, Patch, Placed
from kasa_cli.checkpoint import Checkpoint, Matrix, OpenFiles
from kasa_cli.errors import InvalidInput, NumericalError
from kasa_cli.linalg import defect, quantities
from kasa_cli.methods import CONVENTIONS, Layer
from kasa_cli.methods.adapter_kinds import (
    BaseChange,
    Factors,
    Module,
    Update,
    is_of_embedding,
    learned,
    sizes_of,
)
from kasa_cli.methods.adapter_kinds import table as kinds
from kasa_cli.pipeline.adapter_on_base import expert_changes, label, needs_weight, weight_under
from kasa_cli.pipeline.inspecting.share_in_cut import TruncatedDirections, TruncatedWeight
from kasa_cli.report import InCut, ModuleRow, module_type

ENERGY = 0.9

NEEDS_BASE = "unknown without the base: give --base"
INITIALISATION_IS_LOST = "its initialisation changed the base by an amount that is not in the file"


@dataclass(frozen=True)
class InspectedPatch:
    """A patch of an adapter and its place on the base, if a base is given."""

    patch: Patch
    place: Placed | None = None

    @property
    def name(self) -> str:
        """The module or its parameter; the path in the file where the parameter is unknown without the base."""
        patch = self.patch
        if patch.parameter == UNKNOWN_PARAMETER:
            return patch.module + ".base_layer" * patch.depth
        return label(patch)

    @property
    def is_stack(self) -> bool:
        """Whether the patch changes a parameter, which may hold several experts; only LoRA does."""
        is_parameter = self.patch.parameter != "weight" and self.patch.row.holds_experts
        return is_parameter or (self.place is not None and len(self.place.matrices) > 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight in float64; 0 if it is not read."""
        return 8 * math.prod(self.place.shape) if self.place and not self.is_stack else 0

    @property
    def matrix(self) -> Matrix | None:
        """The weight in the base; None for experts, and for several pieces that are stored transposed."""
        place = self.place
        if place is None or self.is_stack or (place.is_turned and len(place.matrices[0]) > 1):
            return None
        return place.matrix


@dataclass(frozen=True)
class OpenAdapter:
    """An adapter with its open file, and its base, if one is given."""

    adapter: Adapter
    base: Checkpoint | None
    files: OpenFiles

    def tensors(self, patch: Patch) -> dict[str, Tensor]:
        """The tensors of a patch by their short names.

        Raises:
            InvalidInput: a number in one of them is not finite.
        """
        return self.files.tensors(self.adapter.container, patch.tensors)

    def weight(self, item: InspectedPatch) -> Tensor | None:
        """The weight W under the adapter as (out, in): from the adapter's own file, or from the base."""
        place, patch = item.place, item.patch
        own = f"{patch.module}.weight"
        for replacement in self.adapter.replacements:
            if replacement.parameter == own and replacement.is_base:
                weight = self.files.tensor(self.adapter.container, replacement.tensor)
                is_turned = place.is_transposed if place else is_of_embedding(patch.tensors)
                return weight.T if is_turned else weight
        if place is None or self.base is None or item.is_stack:
            return None
        return weight_under(self.base, place)

    @property
    def has_patterns(self) -> bool:
        """Whether rank or alpha depend on the module."""
        return any(self.adapter.config.get(f"{of}_pattern") for of in ("rank", "alpha"))


@dataclass(frozen=True)
class PatchTensors:
    """One patch with its tensors, while it is measured."""

    source: OpenAdapter
    item: InspectedPatch
    tensors: Mapping[str, Tensor]

    @property
    def patch(self) -> Patch:
        """The patch of the adapter."""
        return self.item.patch

    @cached_property
    def shape(self) -> tuple[int, int] | None:
        """(out, in) of the adapter's update; without a base, None if its tensors do not determine both."""
        if self.item.place:
            return self.item.place.sides
        shapes = {short: tuple(tensor.shape) for short, tensor in self.tensors.items()}
        row = self.patch.row
        return row.sides(sizes_of(row, self.patch.settings, shapes, {}, self.patch.tensors))

    @cached_property
    def num_matrices(self) -> int | None:
        """Number of experts; None where the file alone does not separate this number from the rank."""
        if self.item.place:
            return len(self.item.place.matrices)
        if not self.item.is_stack:
            return 1
        num_rows, r = len(self.tensors["lora_A"]), self.patch.settings["r"]
        return None if self.source.has_patterns or num_rows % r else num_rows // r

    def pairs(self) -> Iterable[Factors | None]:
        """The two factors of each matrix; None for kinds without two factors."""
        if self.num_matrices is None:
            return [None]
        if self.item.is_stack:
            A, B = (self.tensors[f"lora_{letter}"] for letter in "AB")
            return learned.expert_pairs(A, B, self.num_matrices)
        return [learned.pair(self.patch.row, self.tensors, self.shape)]

    def updates(self) -> Iterable[Update | str]:
        """The update of each matrix, or the reason why it is unknown; experts are computed one at a time."""
        if self.num_matrices is None or self.shape is None:
            return [NEEDS_BASE]
        if self.patch.base_change is BaseChange.LOST:
            return [INITIALISATION_IS_LOST] * self.num_matrices
        is_transposed = self.item.place is not None and self.item.place.is_transposed
        shape = self.shape
        module = Module(*shape, self.patch.settings, is_transposed)
        if self.item.is_stack:
            changes = expert_changes(self.tensors, module, self.num_matrices)
            return (learned.update(change, None, shape) for change in changes)
        return [self._update(module)]

    def _update(self, module: Module) -> Update | str:
        """The update of a single weight, which is read only where the update depends on it."""
        needs = needs_weight(self.patch)
        W = self.source.weight(self.item) if needs else None
        if needs and W is None:
            return NEEDS_BASE
        change = kinds.change_by_kind(self.patch.kind, self.tensors, module, W)
        if change.map is not None and W is None:
            W = self.source.weight(self.item)
            if W is None:
                return NEEDS_BASE
        return learned.update(change, W, (module.out_features, module.in_features))


@dataclass(frozen=True)
class MeasuredPatch:
    """One row, and the terms of KaSA's penalties for that layer."""

    row: ModuleRow
    layer: Layer | None


def module_rows(
    source: OpenAdapter, item: InspectedPatch, directions: TruncatedDirections
) -> list[MeasuredPatch]:
    """A row for each weight that a patch changes; each expert is a weight.

    Raises:
        InvalidInput, NumericalError: a tensor is not finite, or does not fit; naming module and tensor.
    """
    try:
        opened_patch = PatchTensors(source, item, source.tensors(item.patch))
        pairs, updates, count = opened_patch.pairs(), opened_patch.updates(), opened_patch.num_matrices or 1
        numbers = range(count) if count > 1 else [None]
        return [
            _row(opened_patch, number, pair, update, directions)
            for number, pair, update in zip(numbers, pairs, updates, strict=True)
        ]
    except (InvalidInput, NumericalError) as error:
        if error.where in item.patch.tensors.values():
            raise
        where = f"{item.name}: {error.where}" if error.where else item.name
        raise type(error)(error.what, where, error.remedy) from error


def _row(
    opened_patch: PatchTensors,
    number: int | None,
    pair: Factors | None,
    update: Update | str,
    directions: TruncatedDirections,
) -> MeasuredPatch:
    patch, name = opened_patch.patch, opened_patch.item.name
    settings: Mapping[str, Any] = patch.settings if opened_patch.num_matrices is not None else {}
    known, why = (None, update) if isinstance(update, str) else (update, update.why)
    d = learned.diagonal(patch.row, opened_patch.tensors)
    rank = len(pair[0]) if pair else settings.get("r")
    defects = [defect(pair[0].T.contiguous()), defect(pair[1])] if pair else [None, None]
    layer = _layer(opened_patch, pair, d, defects)
    in_cut, in_cut_why = _in_cut(opened_patch, rank, known, directions)
    row = ModuleRow(
        name=name if number is None else f"{name}[{number}]",
        module=patch.module,
        module_type=module_type(name),
        parameter=patch.parameter or None,
        expert=number,
        shape=opened_patch.shape,
        rank=rank,
        alpha=settings.get("alpha"),
        scaling=learned.scaling(patch.row, opened_patch.tensors, settings),
        norm=known.norm if known else None,
        why=why,
        **_spectral(known),
        **_diagonal(d),
        defect_a=defects[0],
        defect_b=defects[1],
        penalties=_penalties(layer) if layer else None,
        in_cut=in_cut,
        in_cut_why=in_cut_why,
    )
    return MeasuredPatch(row, layer)


def _spectral(update: Update | None) -> dict[str, Any]:
    """The figures of the singular values; None where they are unknown."""
    S = update.svd[1] if update and update.svd else None
    names = ("sigma_max", "stable_rank", "effective_rank", "rank_90")
    if S is None:
        return {"singular_values": None, **dict.fromkeys(names)}
    if not len(S):  # AdaLoRA has pruned every component
        return {"singular_values": (), **dict.fromkeys(names, 0.0), "rank_90": 0}
    return {
        "singular_values": tuple(S.tolist()),
        "sigma_max": float(S[0]),
        "stable_rank": quantities.stable_rank(S),
        "effective_rank": quantities.effective_rank(S),
        "rank_90": quantities.rank_of_energy(S, ENERGY),
    }


def _diagonal(d: Tensor | None) -> dict[str, Any]:
    """The learned diagonal with its signs; for a dense core, its singular values."""
    figures: dict[str, Any] = dict.fromkeys(("diagonal", "diagonal_signs", "core"))
    if d is None:
        return figures
    if d.ndim == 2:
        return figures | {"core": tuple(torch.linalg.svdvals(d).tolist())}
    values = tuple(d.tolist())
    return figures | {"diagonal": values, "diagonal_signs": learned.signs(values)}


def _layer(
    opened_patch: PatchTensors, pair: Factors | None, d: Tensor | None, defects: list[Any]
) -> Layer | None:
    if not opened_patch.patch.row.truncates_base or pair is None or d is None or opened_patch.shape is None:
        return None
    return Layer(float(d.square().sum()), defects[0], defects[1], opened_patch.shape, len(pair[0]))


def _penalties(layer: Layer) -> dict[str, float]:
    return {
        "l2": layer.l2,
        **{f"l3_{name}": convention.l3(layer) for name, convention in CONVENTIONS.items()},
    }


def _in_cut(
    opened_patch: PatchTensors, rank: int | None, update: Update | None, directions: TruncatedDirections
) -> tuple[InCut | None, str | None]:
    if (
        update is None
        or update.svd is None
        or rank is None
        or opened_patch.shape is None
        or opened_patch.item.is_stack
    ):
        return None, None
    patch = opened_patch.patch
    is_kasa = patch.row.truncates_base and patch.base_change is not BaseChange.IN_FILE
    return directions.share(
        TruncatedWeight(patch.module, is_kasa, rank, opened_patch.shape, opened_patch.item.matrix), update.svd
    )
