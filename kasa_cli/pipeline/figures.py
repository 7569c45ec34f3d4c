"""From what an adapter does to a weight to a row of figures."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kasa_cli.errors import InvalidInput, NumericalError
from kasa_cli.linalg import quantities
from kasa_cli.linalg.orthogonality import defect
from kasa_cli.methods import learned
from kasa_cli.methods.learned import Factors, Update
from kasa_cli.methods.penalties import CONVENTIONS, Layer
from kasa_cli.pipeline.dropped import Cut, Dropped
from kasa_cli.pipeline.fitting import KASA
from kasa_cli.pipeline.patches import IN_FILE
from kasa_cli.pipeline.updates import Item, Look, Opened
from kasa_cli.report import InCut, ModuleRow, module_type

ENERGY = 0.9


@dataclass(frozen=True)
class Looked:
    """One row, and what KaSA's penalties of that layer are made of."""

    row: ModuleRow
    layer: Layer | None


def rows(opened: Opened, item: Item, cuts: Dropped) -> list[Looked]:
    """A row for each weight that a patch changes; an expert is one.

    Raises:
        InvalidInput, NumericalError: a tensor is not finite, or does not fit; naming module and tensor.
    """
    try:
        look = Look(opened, item, opened.tensors(item.patch))
        pairs, updates, count = look.pairs(), look.updates(), look.num_matrices or 1
        numbers = range(count) if count > 1 else [None]
        return [
            _row(look, number, pair, update, cuts)
            for number, pair, update in zip(numbers, pairs, updates, strict=True)
        ]
    except (InvalidInput, NumericalError) as error:
        if error.where in item.patch.tensors.values():
            raise
        where = f"{item.name}: {error.where}" if error.where else item.name
        raise type(error)(error.what, where, error.remedy) from error


def _row(look: Look, number: int | None, pair: Factors | None, update: Update | str, cuts: Dropped) -> Looked:
    patch, name = look.patch, look.item.name
    settings: Mapping[str, Any] = patch.settings if look.num_matrices is not None else {}
    found, why = (None, update) if isinstance(update, str) else (update, update.why)
    d = learned.diagonal(patch.kind, look.tensors)
    rank = len(pair[0]) if pair else settings.get("r")
    defects = [defect(pair[0].T.contiguous()), defect(pair[1])] if pair else [None, None]
    layer = _layer(look, pair, d, defects)
    in_cut, in_cut_why = _in_cut(look, rank, found, cuts)
    row = ModuleRow(
        name=name if number is None else f"{name}[{number}]",
        module=patch.module,
        module_type=module_type(name),
        parameter=patch.parameter or None,
        expert=number,
        shape=look.shape,
        rank=rank,
        alpha=settings.get("alpha"),
        scaling=learned.scaling(patch.kind, look.tensors, settings),
        norm=found.norm if found else None,
        why=why,
        **_spectral(found),
        **_diagonal(d),
        defect_a=defects[0],
        defect_b=defects[1],
        penalties=_penalties(layer) if layer else None,
        in_cut=in_cut,
        in_cut_why=in_cut_why,
    )
    return Looked(row, layer)


def _spectral(update: Update | None) -> dict[str, Any]:
    """What the singular values say, if they are known."""
    S = update.svd[1] if update and update.svd else None
    names = ("sigma_max", "stable_rank", "effective_rank", "rank_90")
    if S is None:
        return {"singular_values": None, **dict.fromkeys(names)}
    if not len(S):  # every component of an AdaLoRA was pruned
        return {"singular_values": (), **dict.fromkeys(names, 0.0), "rank_90": 0}
    return {
        "singular_values": tuple(S.tolist()),
        "sigma_max": float(S[0]),
        "stable_rank": quantities.stable_rank(S),
        "effective_rank": quantities.effective_rank(S),
        "rank_90": quantities.rank_of_energy(S, ENERGY),
    }


def _diagonal(d: Tensor | None) -> dict[str, Any]:
    """The learned diagonal with its signs; of a dense core, which has none, the singular values."""
    made: dict[str, Any] = dict.fromkeys(("diagonal", "diagonal_signs", "core"))
    if d is None:
        return made
    if d.ndim == 2:
        return made | {"core": tuple(torch.linalg.svdvals(d).tolist())}
    values = tuple(d.tolist())
    return made | {"diagonal": values, "diagonal_signs": learned.signs(values)}


def _layer(look: Look, pair: Factors | None, d: Tensor | None, defects: list[Any]) -> Layer | None:
    if look.patch.kind != KASA or pair is None or d is None or look.shape is None:
        return None
    return Layer(float(d.square().sum()), defects[0], defects[1], look.shape, len(pair[0]))


def _penalties(layer: Layer) -> dict[str, float]:
    return {"l2": layer.l2, **{f"l3_{name}": one.l3(layer) for name, one in CONVENTIONS.items()}}


def _in_cut(
    look: Look, rank: int | None, update: Update | None, cuts: Dropped
) -> tuple[InCut | None, str | None]:
    if update is None or update.svd is None or rank is None or look.shape is None or look.item.is_stack:
        return None, None
    patch = look.patch
    is_kasa = patch.kind == KASA and patch.settings.get("base_start") != IN_FILE
    return cuts.share(Cut(patch.module, is_kasa, rank, look.shape, look.item.matrix), update.svd)
