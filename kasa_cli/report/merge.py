"""Plan and result of `kasa merge`: one row for each tensor that adapters change."""

from dataclasses import dataclass

from kasa_cli.report.base import Report
from kasa_cli.report.totals import MergeOutput, MergePlanTotals, MergeTotals
from kasa_cli.report.weights import ToChange


@dataclass(frozen=True)
class MergePlan(Report):
    """Plan of `kasa merge`: nothing is written.

    Only headers of the base are read, and weights that have to be compared with a manifest. `base_is` as in
    `MergeReport`.
    """

    command: str
    model: str
    base_is: str | None
    tensors: tuple[ToChange, ...]
    totals: MergePlanTotals
    notes: tuple[str, ...] = ()
    dry_run: bool = True


@dataclass(frozen=True)
class MergedRow:
    """One tensor that adapters changed.

    `terms` is the number of adapter contributions, `max_abs_change` the largest change of an entry, `rounding_error`
    the distance of the stored tensor from the exact sum, relative to the norm of that.
    """

    name: str
    module: str
    dtype: str
    terms: int
    max_abs_change: float
    rounding_error: float


@dataclass(frozen=True)
class AdapterRow:
    """A merged adapter, with the counts that show that every tensor of it was used."""

    path: str
    kind: str
    weight: float
    sha256: str
    tensors_consumed: int
    tensors_total: int


@dataclass(frozen=True)
class MergeReport(Report):
    """Result of `kasa merge`. `base_is` is "original" or "truncated" for KaSA adapters, None without one."""

    command: str
    model: str
    model_class: str | None
    base_is: str | None
    dtype: str
    rounding: str
    tensors: tuple[MergedRow, ...]
    adapters: tuple[AdapterRow, ...]
    totals: MergeTotals
    output: MergeOutput
    notes: tuple[str, ...] = ()
