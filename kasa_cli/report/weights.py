"""The weights that verbs speak of: targets, candidates, and skipped tensors with their reasons."""

import re
from dataclasses import dataclass


def module_type(module: str) -> str:
    """What follows the number of the layer.

    >>> module_type("model.layers.11.self_attn.q_proj")
    'self_attn.q_proj'
    """
    return re.split(r"\.\d+\.", f".{module}")[-1].lstrip(".")


@dataclass(frozen=True)
class Skipped:
    """A tensor that stays as it is, and why."""

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
    """A tensor that adapters would change: `kinds` of those that have a word in it."""

    name: str
    module: str
    shape: tuple[int, ...]
    dtype: str
    kinds: tuple[str, ...]
