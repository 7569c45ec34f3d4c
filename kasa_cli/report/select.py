"""Result of `kasa select-targets`: one row for each candidate."""

from dataclasses import dataclass
from typing import Any

from kasa_cli.report.base import Report
from kasa_cli.report.weights import Skipped


@dataclass(frozen=True)
class CandidateRow:
    """One candidate with its score and its place in the order, from 1; None where it was not scored.

    `expected` is the score of a random matrix of that shape, None unless it was asked for; `experts` the scores of
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
    """The hand-off text of a selection. `checked_by` is the PEFT that wrapped exactly the selection, None if there
    was none to ask."""

    kind: str
    text: str
    checked_by: str | None


@dataclass(frozen=True)
class SelectReport(Report):
    """What `kasa select-targets` chose. `comparison` has one row a compared criterion."""

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
    comparison: tuple[dict[str, Any], ...]
    skipped: tuple[Skipped, ...]
    totals: dict[str, Any]
    emission: Emission | None = None
    notes: tuple[str, ...] = ()

    def rows(self) -> list[Any]:
        """The candidates."""
        return list(self.candidates)
