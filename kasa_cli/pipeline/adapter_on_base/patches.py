"""One patch of an adapter: its label, the weight under it, and its change of each matrix."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kasa_cli.adapters import PEFT_VERSION, Patch, Placed
from kasa_cli.checkpoint import Checkpoint, read_piece
from kasa_cli.methods.adapter_kinds import Change, Module, change_by_kind, experts


def label(patch: Patch) -> str:
    """The module, with the name of the parameter if that is not its weight."""
    return patch.module if patch.parameter == "weight" else f"{patch.module}.{patch.parameter}"


def module_of(place: Placed) -> Module:
    """The sides and settings of a module, as input of its kind's formula."""
    outs, ins = place.sides
    return Module(outs, ins, place.patch.settings, place.is_transposed)


def is_stack(place: Placed) -> bool:
    """Whether the patch changes a parameter that holds experts, even a single one."""
    is_part = place.matrices[0][0].piece.index is not None
    return is_part or place.patch.parameter != "weight" or len(place.matrices) > 1


def weight_under(checkpoint: Checkpoint, place: Placed) -> Tensor:
    """The weight under a patch of one matrix, as (out, in)."""
    read = [read_piece(checkpoint, part.piece) for part in place.matrices[0]]
    read = [piece.T for piece in read] if place.is_turned else read
    W = read[0] if len(read) == 1 else torch.cat(read)
    return W.T if place.is_transposed else W


def needs_weight(patch: Patch) -> bool:
    """Whether the change depends on the weight."""
    return patch.row.needs_weight


def changes_of(tensors: Mapping[str, Tensor], place: Placed, weight: Callable[[], Tensor]) -> list[Change]:
    """The change of every matrix of a place; `weight` reads the weight, if the formula depends on it."""
    if is_stack(place):
        return expert_changes(tensors, module_of(place), len(place.matrices))
    return [change_of(tensors, place, weight() if needs_weight(place.patch) else None)]


def change_of(tensors: Mapping[str, Tensor], place: Placed, W: Tensor | None) -> Change:
    """The change of the only matrix of a place; W is needed for kinds whose formula depends on it."""
    return change_by_kind(place.patch.kind, tensors, module_of(place), W)


def expert_changes(tensors: Mapping[str, Tensor], module: Module, num_experts: int) -> list[Change]:
    """The change of every expert of a stack."""
    # `placed` has already decided which factor is which, by the PEFT version that wrote the file
    return experts(tensors, module, num_experts, PEFT_VERSION)
