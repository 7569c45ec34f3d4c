"""Weights in reports: to truncate, to change, and skipped with the reason."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar


def module_type(module: str) -> str:
    """The part of a module name after the number of the layer.

    >>> module_type("model.layers.11.self_attn.q_proj")
    'self_attn.q_proj'
    """
    return re.split(r"\.\d+\.", f".{module}")[-1].lstrip(".")


class HasModule(Protocol):
    """A row about the weight of a module."""

    @property
    def module(self) -> str:
        """Name of the module in memory."""


Row = TypeVar("Row", bound=HasModule)


def by_module_type(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows grouped by module type, in the order of the model."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(getattr(row, "module_type", "") or module_type(row.module), []).append(row)
    return groups


@dataclass(frozen=True)
class Skipped:
    """A tensor that stays as it is, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class ToTruncate:
    """A matrix to truncate.

    `shape` is that in memory; `is_transposed`: the module computes with the transpose, as a Conv1D does; `dropped` is
    the number of components to drop, t.
    """

    name: str
    module: str
    shape: tuple[int, int]
    dtype: str
    is_transposed: bool
    dropped: int


@dataclass(frozen=True)
class ToChange:
    """A tensor that adapters would change, and the kinds of these adapters."""

    name: str
    module: str
    shape: tuple[int, ...]
    dtype: str
    kinds: tuple[str, ...]
