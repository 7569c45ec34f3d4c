"""Result of `kasa select-targets`: one row for each candidate."""

from dataclasses import dataclass
from typing import Any

from kasa_cli.report.base import Report
from kasa_cli.report.totals import CriterionComparison, SelectTotals
from kasa_cli.report.weights import Skipped


@dataclass(frozen=True)
class CandidateRow:
    """One candidate with its score and its rank in the order, from 1.

    `expected` is the score of a random matrix of that shape, None without `shape_fair`; `experts` are the scores of
    the single experts; `others` the scores by the criteria that were compared.
    """

    module: str
    kind: str
    module_type: str
    shape: tuple[int, int]
    score: float
    rank_in_order: int
    selected: bool
    expected: float | None = None
    experts: tuple[float, ...] | None = None
    others: dict[str, float] | None = None


@dataclass(frozen=True)
class Emission:
    """The text that hands the selection to a trainer. `checked_by` is the version of PEFT that wrapped exactly the
    selection, None without PEFT."""

    kind: str
    text: str
    checked_by: str | None


@dataclass(frozen=True)
class SelectReport(Report):
    """Result of `kasa select-targets`. `comparison` has one row for each compared criterion."""

    command: str
    model: str
    model_class: str | None
    criterion: str
    rule: str | None
    prefer: str
    candidates: tuple[CandidateRow, ...]
    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...] | None
    matched_rank: int | None
    comparison: tuple[CriterionComparison, ...]
    skipped: tuple[Skipped, ...]
    totals: SelectTotals
    emission: Emission | None = None
    notes: tuple[str, ...] = ()

    def rows(self) -> list[Any]:
        """The candidates."""
        return list(self.candidates)
