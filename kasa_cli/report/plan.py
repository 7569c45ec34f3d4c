"""What is to be done: targets, candidates, plans, and what is left alone with its reason."""

import re
from dataclasses import dataclass
from typing import Any


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
class PlanReport:
    """What `--dry-run` prints: nothing was read but headers, nothing was written."""

    command: str
    model: str
    rank: int
    truncation_rank: int
    tensors: tuple[Target, ...]
    skipped: tuple[Skipped, ...]
    totals: dict[str, Any]
    output: dict[str, Any]
    notes: tuple[str, ...] = ()
    dry_run: bool = True


@dataclass(frozen=True)
class ToMeasure:
    """A weight that would be measured; `shape` as it lies on disk, its pieces stacked."""

    name: str
    module: str
    shape: tuple[int, int]
    dtype: str


@dataclass(frozen=True)
class MeasurePlan:
    """What `--dry-run` prints of a verb that looks: nothing was read but headers."""

    command: str
    model: str
    tensors: tuple[ToMeasure, ...]
    skipped: tuple[Skipped, ...]
    totals: dict[str, Any]
    notes: tuple[str, ...] = ()
    dry_run: bool = True


@dataclass(frozen=True)
class ToChange:
    """A tensor that adapters would change: `kinds` of those that have a word in it."""

    name: str
    module: str
    shape: tuple[int, ...]
    dtype: str
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class MergePlan:
    """What `--dry-run` of a merge prints: nothing was written.

    Of the base only headers were read, but for weights that a manifest had to be compared with. `base_is` as in
    `MergeReport`.
    """

    command: str
    model: str
    base_is: str | None
    tensors: tuple[ToChange, ...]
    totals: dict[str, Any]
    notes: tuple[str, ...] = ()
    dry_run: bool = True


@dataclass(frozen=True)
class ConvertPlan:
    """What `--dry-run` of a conversion prints: nothing was written.

    Of the base only headers were read, but for weights that a manifest had to be compared with. Memory and time are
    those of decomposing what may have to be; the store and a tail spare it. Bytes are not foretold: ranks are not.
    """

    command: str
    model: str
    to: str
    on: str | None
    base_is: str | None
    tensors: tuple[ToChange, ...]
    totals: dict[str, Any]
    notes: tuple[str, ...] = ()
    dry_run: bool = True
