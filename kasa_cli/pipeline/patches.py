"""One patch of an adapter, read: its tensors, and what it does to each matrix of its place."""

from collections.abc import Callable

from torch import Tensor

from kasa_cli.checkpoint.adapter import Adapter
from kasa_cli.checkpoint.adapter_places import Placed
from kasa_cli.checkpoint.container import Reader
from kasa_cli.checkpoint.peft import PEFT_VERSION
from kasa_cli.methods import adapters as kinds
from kasa_cli.methods.terms import Change

IN_FILE = "file"
"""The adapter's file holds its module's own base, cut already."""


def changes_of(adapter: Adapter, place: Placed, weight: Callable[[], Tensor]) -> list[Change]:
    """The change of every matrix of a place; `weight` reads the one that the kind's formula may need."""
    tensors, patch = tensors_of(adapter, place), place.patch
    if len(place.matrices) > 1 or is_stack(place):
        # `placed` has settled which side is which, by the version that wrote the file
        return kinds.experts(tensors, module_of(place), len(place.matrices), PEFT_VERSION)
    needs_weight = patch.kind in kinds.KINDS and kinds.KINDS[patch.kind].needs_weight
    return [kinds.change(patch.kind, tensors, module_of(place), weight() if needs_weight else None)]


def tensors_of(adapter: Adapter, place: Placed) -> dict[str, Tensor]:
    """The tensors of a patch, by the names that its kind has for them."""
    with Reader(adapter.container) as reader:
        return {short: reader.tensor(name) for short, name in place.patch.tensors.items()}


def module_of(place: Placed) -> kinds.Module:
    """The module of a patch, as its kind's formula sees it."""
    outs, ins = place.sides
    return kinds.Module(outs, ins, place.patch.settings, place.is_transposed)


def is_stack(place: Placed) -> bool:
    """Whether the patch is of a parameter that holds experts, even if it is one."""
    return place.matrices[0][0].piece.index is not None or place.patch.parameter != "weight"
