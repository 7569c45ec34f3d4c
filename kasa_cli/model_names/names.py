"""Plain data about the names of a checkpoint: the module in memory that owns each tensor on disk."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from kasa_cli.model_names.experts import Composition, Shapes

__all__ = ["Group", "ModuleKind", "NameMap", "Shapes", "Slot", "UnknownFamily", "Weight", "split_name"]


class UnknownFamily(Exception):
    """No class of transformers can be built for this config; the message is untrusted text that says why."""


class ModuleKind(StrEnum):
    """The kind of a module."""

    LINEAR = "linear"
    CONV1D = "conv1d"
    EMBEDDING = "embedding"
    HEAD = "output head"
    ROUTER = "router"
    EXPERTS = "fused experts"
    OTHER = "other"


@dataclass(frozen=True)
class Slot:
    """The place in memory that a tensor on disk fills, wholly or (experts) in part."""

    module: str
    parameter: str
    kind: ModuleKind
    in_block: bool
    tied_with: str | None


@dataclass(frozen=True)
class Weight:
    """A matrix in memory, or a stack of them, and the tensors on disk that it is made of.

    `label` is what PEFT calls it: a module's path, or a parameter's full name.
    """

    label: str
    shape: tuple[int, ...]
    kind: ModuleKind
    is_module: bool
    is_linear: bool
    in_block: bool
    tied_with: str | None
    made_of: Composition


@dataclass(frozen=True)
class NameMap:
    """Every tensor on disk with its slot, and the weights in memory that can be targets.

    `weights` holds every linear map and embedding in the order of `named_modules`, whatever class it has, and
    after them every parameter of three dimensions in the order of `named_parameters`.
    """

    model_class: str | None
    note: str | None
    slots: Mapping[str, Slot]
    linear_modules: tuple[str, ...]
    weights: tuple[Weight, ...] = ()


@dataclass(frozen=True)
class Group:
    """Tied parameters, each with the tensor on disk that fills it, None where there is none."""

    ends: Mapping[str, str | None]

    @property
    def tensors(self) -> dict[str, str]:
        """The tensor on disk of each parameter that has one."""
        return {end: name for end, name in self.ends.items() if name is not None}


def split_name(name: str) -> tuple[str, str]:
    """A parameter's name as its module and its last part.

    >>> split_name("layers.0.q_proj.weight")
    ('layers.0.q_proj', 'weight')
    """
    module, _, parameter = name.rpartition(".")
    return module, parameter
