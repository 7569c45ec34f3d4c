"""Result of `kasa store ls` and `kasa store prune`."""

from dataclasses import dataclass

from kasa_cli.report.base import Report
from kasa_cli.report.totals import PruneTotals, StoreRow, StoreTotals


@dataclass(frozen=True)
class StoreReport(Report):
    """The content of the store, or the removed part of it: one row for each measured tensor."""

    command: str
    store: str
    tensors: tuple[StoreRow, ...]
    totals: StoreTotals | PruneTotals
    notes: tuple[str, ...] = ()
