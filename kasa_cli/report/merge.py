"""Plan and result of `kasa merge`: one row for each tensor that adapters change."""

from dataclasses import dataclass
from typing import Any

from kasa_cli.report.base import Report
from kasa_cli.report.weights import ToChange


@dataclass(frozen=True)
class MergePlan(Report):
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
class MergedRow:
    """One tensor that adapters changed: how many had a word in it, the largest change of an entry, and the distance
    of what was stored from the exact sum, over its norm."""

    name: str
    module: str
    dtype: str
    terms: int
    max_abs_change: float
    rounding_error: float


@dataclass(frozen=True)
class AdapterRow:
    """An adapter that was merged, every tensor of it accounted for."""

    path: str
    kind: str
    weight: float
    sha256: str
    tensors_consumed: int
    tensors_total: int


@dataclass(frozen=True)
class MergeReport(Report):
    """What `kasa merge` did. `base_is` is what a KaSA adapter was told of its base, None without one."""

    command: str
    model: str
    model_class: str | None
    base_is: str | None
    dtype: str
    rounding: str
    tensors: tuple[MergedRow, ...]
    adapters: tuple[AdapterRow, ...]
    totals: dict[str, Any]
    output: dict[str, Any]
    notes: tuple[str, ...] = ()
