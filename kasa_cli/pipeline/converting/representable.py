"""Checks that a plain LoRA can express an adapter, before any factor is computed."""

from collections.abc import Sequence

import torch

from kasa_cli.adapters import Adapter, Placed, PlacedValue, TokenRows
from kasa_cli.checkpoint import Checkpoint, Reader, read_piece
from kasa_cli.errors import InvalidInput
from kasa_cli.methods.adapter_kinds import BaseChange, Limit

MERGE = "use kasa merge to add it to the base"


def require_nothing_else(adapter: Adapter, values: Sequence[PlacedValue], checkpoint: Checkpoint) -> None:
    """Refuse replaced parameters, which a plain LoRA cannot hold, unless they equal those of the base.

    Raises:
        InvalidInput: naming the parameter.
    """
    for value in values:
        payload = value.value
        if isinstance(payload, TokenRows):
            raise InvalidInput("trained rows, which a plain LoRA cannot hold", payload.parameter, MERGE)
        if not _is_in_base(adapter, value, checkpoint):
            raise InvalidInput(
                f"a replaced parameter ({payload.why}), which a plain LoRA cannot hold",
                payload.parameter,
                MERGE,
            )


def require_form(places: Sequence[Placed], limit: Limit) -> None:
    """Refuse changes of biases and, if the conversion must be exact, kinds that are not sums of low-rank terms.

    Raises:
        InvalidInput: naming the first such module.
    """
    for place in places:
        patch = place.patch
        if place.bias is not None:
            raise InvalidInput("a change of a bias, which a plain LoRA cannot hold", place.bias, MERGE)
        if not limit.is_set and not patch.row.is_low_rank(patch.settings):
            raise no_form(place)


def no_form(place: Placed) -> InvalidInput:
    """The error for a kind that is not a sum of low-rank terms."""
    problem = f"an adapter of kind {place.patch.kind} has no exact low-rank form"
    return InvalidInput(
        problem, place.patch.module, "recompress it with --rank or --energy, or use kasa merge"
    )


def require_own(places: Sequence[Placed]) -> None:
    """Refuse patches that subtract from a tied weight: a LoRA changes only one of its modules.

    Raises:
        InvalidInput: naming both.
    """
    for place in places:
        row = place.patch.row
        if place.tied and (row.truncates_base or row.base is BaseChange.RECOMPUTED):
            problem = f"tied with {place.tied_with}, which a LoRA would leave unchanged"
            raise InvalidInput(
                problem, place.patch.module, "untie the base first: save it with tie_word_embeddings false"
            )


def _is_in_base(adapter: Adapter, value: PlacedValue, checkpoint: Checkpoint) -> bool:
    pieces = [part.piece for parts in value.matrices for part in parts]
    if value.vocabulary or len(pieces) != 1 or pieces[0].index is not None:
        return False
    stored = read_piece(checkpoint, pieces[0])
    with Reader(adapter.container) as reader:
        rows = reader.tensor(value.value.tensor)
    known = stored.T if value.is_turned else stored
    return known.shape == rows.shape and torch.equal(known.to(torch.float64), rows.to(torch.float64))
