"""Result of `kasa demo`."""

from dataclasses import dataclass
from typing import Any

from kasa_cli.report.base import Report
from kasa_cli.report.merge import MergeReport
from kasa_cli.report.select import SelectReport
from kasa_cli.report.spectrum import SpectrumReport
from kasa_cli.report.totals import RealisedRow
from kasa_cli.report.truncate import TruncateReport
from kasa_cli.report.verify import VerifyReport


@dataclass(frozen=True)
class DemoReport(Report):
    """Result of `kasa demo`. `rounding` has the minimum and median of `realised` for each dtype and rounding.

    `similarity` is the cosine between the last hidden states of the original and of the truncated model, loaded
    by transformers; `tail_difference` the largest difference between the truncated model and original plus tail in
    PEFT, None without PEFT; `merge_difference` the same for the tail merged by kasa.
    """

    command: str
    model: str
    is_generated: bool
    spectrum: SpectrumReport
    selected: SelectReport
    truncated: TruncateReport
    verified: VerifyReport
    merged: MergeReport
    rounding: tuple[RealisedRow, ...]
    similarity: float
    tail_difference: float | None
    merge_difference: float

    def rows(self) -> list[Any]:
        """The truncated tensors."""
        return list(self.truncated.tensors)
