"""From the tensors of one module to the input of its kind's formula: all known, all there, all of the right shape."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from kasa_cli.errors import InvalidInput
from kasa_cli.methods.adapter_kinds.kind import (
    Inputs,
    Kind,
    Module,
    Settings,
    Spec,
    is_of_embedding,
    settings_of,
)
from kasa_cli.methods.adapter_kinds.shapes import sizes_of


def inputs_of(
    kind: Kind, tensors: Mapping[str, Tensor], module: Module, weight: Float[Tensor, "o i"] | None
) -> Inputs:
    """The input of the formula, from tensors by their short names.

    Raises:
        InvalidInput: naming the tensor, or the setting, that is missing, unknown or unsound.
    """
    _check_weight(kind, module, weight)
    if unknown := sorted(tensors.keys() - kind.names):
        raise InvalidInput("a tensor that this kind of adapter does not have", unknown[0])
    own = tensors.keys() - {*kind.shared}
    if kind.groups and own not in [{*group} - {*kind.shared} for group in kind.groups]:
        raise InvalidInput("a tensor is missing, or there are too many", ", ".join(kind.groups[0]))
    settings = settings_of(kind, module)
    by_letter = {letter: _only_name(tensor_spec, tensors) for letter, tensor_spec in kind.tensors.items()}
    for name, tensor in tensors.items():
        _check_numbers(name, tensor)
    known = {"o": module.out_features, "i": module.in_features, **_rank(settings)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    sizes_of(kind, {**module.settings, **settings}, shapes, known, {name: name for name in tensors})
    by_name = {letter: tensors[name] for letter, name in by_letter.items() if name}
    return Inputs(kind, by_name, module, settings, weight, is_of_embedding(tensors))


def _rank(settings: Settings) -> dict[str, int]:
    return {"r": settings["r"]} if "r" in settings else {}


def _check_weight(kind: Kind, module: Module, weight: Tensor | None) -> None:
    if weight is None and kind.needs_weight:
        raise InvalidInput("this kind of adapter needs the weight under it")
    expected = (module.out_features, module.in_features)
    if weight is not None and tuple(weight.shape) != expected:
        raise InvalidInput(f"a weight of shape {tuple(weight.shape)} for a module of shape {expected}")


def _only_name(tensor_spec: Spec, tensors: Mapping[str, Tensor]) -> str | None:
    """The one name under which a tensor is there."""
    names = [name for name in tensor_spec.names if name in tensors]
    if len(names) > 1:
        raise InvalidInput(f"the same tensor as {names[0]}", names[1])
    if not names and not tensor_spec.is_optional:
        raise InvalidInput("a tensor is missing", tensor_spec.names[0])
    return names[0] if names else None


def _check_numbers(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise InvalidInput(f"a tensor of {tensor.dtype}", name)
    if not torch.isfinite(tensor).all():
        raise InvalidInput("a tensor with numbers that are not finite", name)
