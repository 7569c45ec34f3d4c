"""What a row of the table of adapter kinds is: the tensors it takes, the settings it reads, the change it makes.

Shapes are written with letters: o and i are those of the weight, r the adapter's rank where that is a setting; any
other letter is what the file says, the same in all tensors of a module.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kasa_cli.errors import InvalidInput
from kasa_cli.methods.adapter_kinds.change import Change


@dataclass(frozen=True)
class Module:
    """One module of a model: the sides of its weight as it multiplies, and the settings resolved for it.

    The weight is W (out_features x in_features) with h = W x. What is stored the other way round is looked at through
    its transpose: `Conv1D`, an expert stored (in, out), and an embedding, whose in_features is its vocabulary.
    """

    out_features: int
    in_features: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    is_transposed: bool = False


@dataclass(frozen=True)
class Spec:
    """A tensor of a kind: its shape in letters ("r i"; "r|r r" for either), and its names after the module's."""

    shape: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """A setting of a kind: what it must be, and what it is where the file says nothing; ... if it has to."""

    type: type
    default: Any = ...


@dataclass(frozen=True)
class Given:
    """All that a kind is told: the tensors by letter, the module, its settings, the weight under the adapter."""

    tensors: Mapping[str, Tensor]
    module: Module
    settings: Mapping[str, Any]
    weight: Float[Tensor, "o i"] | None
    is_embedding: bool

    def __getitem__(self, letter: str) -> Tensor:
        return self.tensors[letter].to(torch.float64)

    def get(self, letter: str) -> Tensor | None:
        """A tensor that may be missing, in float64."""
        return self[letter] if letter in self.tensors else None

    @property
    def W(self) -> Float[Tensor, "o i"]:  # noqa: N802
        """The weight under the adapter, as it was before any change."""
        if self.weight is None:
            raise InvalidInput("this kind of adapter needs the weight under it")
        return self.weight


Make = Callable[[Given], Change]


@dataclass(frozen=True)
class Kind:
    """A kind of adapter. `needs_weight`: what it adds depends on the weight as it was."""

    change: Make
    needs: Mapping[str, Spec]
    about: str
    may: Mapping[str, Spec] = field(default_factory=dict)
    settings: Mapping[str, Setting] = field(default_factory=dict)
    needs_weight: bool = False

    @property
    def names(self) -> frozenset[str]:
        """Every name a tensor of this kind may have, after that of its module."""
        return frozenset(name for spec in (*self.needs.values(), *self.may.values()) for name in spec.names)


def spec(shape: str, *names: str) -> Spec:
    """A tensor of this shape, under any one of these names."""
    return Spec(shape, names)


def given(
    kind: Kind, tensors: Mapping[str, Tensor], module: Module, weight: Float[Tensor, "o i"] | None
) -> Given:
    """The tensors of one module by letter, all of them known, all there, all of the right shape.

    Raises:
        InvalidInput: naming the tensor, or the setting, that is not.
    """
    _check_weight(kind, module, weight)
    if unknown := sorted(tensors.keys() - kind.names):
        raise InvalidInput("a tensor that this kind of adapter does not have", unknown[0])
    settings = {name: _setting(name, rule, module.settings) for name, rule in kind.settings.items()}
    sizes = {"1": 1, "o": module.out_features, "i": module.in_features}
    if kind.settings.get("r"):
        sizes["r"] = settings["r"]
    by_letter = {}
    for letter, wanted in {**kind.needs, **kind.may}.items():
        name = _only_name(wanted, tensors, is_needed=letter in kind.needs)
        if name is not None:
            sizes = _fitted(name, tensors[name], wanted.shape, sizes)
            by_letter[letter] = tensors[name]
    is_embedding = any("_embedding_" in name for name in tensors)
    return Given(by_letter, module, settings, weight, is_embedding)


def _check_weight(kind: Kind, module: Module, weight: Tensor | None) -> None:
    if weight is None and kind.needs_weight:
        raise InvalidInput("this kind of adapter needs the weight under it")
    expected = (module.out_features, module.in_features)
    if weight is not None and tuple(weight.shape) != expected:
        raise InvalidInput(f"a weight of shape {tuple(weight.shape)} for a module of shape {expected}")


def _setting(name: str, rule: Setting, settings: Mapping[str, Any]) -> Any:
    """A setting that is what it must be: numbers finite, whole ones positive."""
    value = settings.get(name, rule.default)
    if value is ...:
        raise InvalidInput("a setting is missing", name)
    if rule.type is object:
        return value
    wanted = (int, float) if rule.type is float else rule.type
    is_right = isinstance(value, wanted) and isinstance(value, bool) == (rule.type is bool)
    if is_right and rule.type in (int, float):
        is_right = math.isfinite(value) and (rule.type is float or value > 0)
    if not is_right:
        raise InvalidInput(f"{value!r} is no value for a setting", name)
    return value


def _only_name(wanted: Spec, tensors: Mapping[str, Tensor], *, is_needed: bool) -> str | None:
    """The one name under which a tensor is there."""
    found = [name for name in wanted.names if name in tensors]
    if len(found) > 1:
        raise InvalidInput(f"the same tensor as {found[0]}", found[1])
    if not found and is_needed:
        raise InvalidInput("a tensor is missing", wanted.names[0])
    return found[0] if found else None


def _fitted(name: str, tensor: Tensor, shapes: str, sizes: dict[str, int]) -> dict[str, int]:
    """The sizes that letters stand for, with those that this tensor tells.

    >>> _fitted("lora_A.weight", torch.zeros(4, 24), "r i", {"i": 24})
    {'i': 24, 'r': 4}
    """
    if not tensor.is_floating_point():
        raise InvalidInput(f"a tensor of {tensor.dtype}", name)
    for shape in shapes.split("|"):
        letters = shape.split()
        told = dict(sizes)
        is_right = len(letters) == tensor.ndim and all(
            told.setdefault(letter, size) == size for letter, size in zip(letters, tensor.shape, strict=True)
        )
        if is_right:
            if not torch.isfinite(tensor).all():
                raise InvalidInput("a tensor with numbers that are not finite", name)
            return told
    wanted = " or ".join(
        "x".join(str(sizes.get(letter, letter)) for letter in shape.split()) for shape in shapes.split("|")
    )
    raise InvalidInput(f"a tensor of shape {'x'.join(map(str, tensor.shape))} instead of {wanted}", name)
