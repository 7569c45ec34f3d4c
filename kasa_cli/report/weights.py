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
class Target:
    """A tensor to operate on.

    `shape` is that on disk; `is_transposed` says that it is (in_features, out_features), as in a Conv1D;
    `dropped` is the number of components to drop, t.
    """

    name: str
    module: str
    shape: tuple[int, int]
    dtype: str
    is_transposed: bool
    dropped: int

    @property
    def out_features(self) -> int:
        """o."""
        return self.shape[1] if self.is_transposed else self.shape[0]

    @property
    def in_features(self) -> int:
        """i."""
        return self.shape[0] if self.is_transposed else self.shape[1]

    @property
    def work(self) -> float:
        """Multiplications of the Gram matrix and its factorisation: what the time is proportional to."""
        short, long = sorted(self.shape)
        return short * short * (long + short)


@dataclass(frozen=True)
class Selection:
    """The tensors to operate on and all others, each with its reason."""

    targets: tuple[Target, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Piece:
    """A tensor on disk, or one matrix of a three-dimensional one."""

    name: str
    index: int | None = None


@dataclass(frozen=True)
class Candidate:
    """What could be fine-tuned: a module, or a parameter that holds the matrices of several experts.

    `shape` is that in memory, of a parameter without its number of experts. Each of `matrices` is one weight, its
    pieces stacked by rows: a module has one; an expert may be split over several tensors on disk.
    """

    module: str
    kind: str
    shape: tuple[int, int]
    matrices: tuple[tuple[Piece, ...], ...]
    is_transposed: bool = False

    @property
    def num_matrices(self) -> int:
        """One, or the number of experts."""
        return len(self.matrices)


@dataclass(frozen=True)
class ToChange:
    """A tensor that adapters would change: `kinds` of those that have a word in it."""

    name: str
    module: str
    shape: tuple[int, ...]
    dtype: str
    kinds: tuple[str, ...]
