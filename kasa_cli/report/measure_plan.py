"""Plan of the verbs that only measure: which weights are decomposed, and at what cost."""

from dataclasses import dataclass

from kasa_cli.report.base import Report
from kasa_cli.report.totals import MeasurePlanTotals
from kasa_cli.report.weights import Skipped


@dataclass(frozen=True)
class ToMeasure:
    """A weight to measure; `shape` is that on disk, with its pieces stacked."""

    name: str
    module: str
    shape: tuple[int, int]
    dtype: str


@dataclass(frozen=True)
class MeasurePlan(Report):
    """Plan of a verb that only measures, from headers alone."""

    command: str
    model: str
    tensors: tuple[ToMeasure, ...]
    skipped: tuple[Skipped, ...]
    totals: MeasurePlanTotals
    notes: tuple[str, ...] = ()
    dry_run: bool = True
