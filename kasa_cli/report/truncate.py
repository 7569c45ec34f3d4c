"""Plan and result of `kasa truncate`: one row for each truncated tensor.

Singular values are in the units of the weight. Figures that could not be measured are None.
"""

from dataclasses import dataclass

from kasa_cli.report.base import Report
from kasa_cli.report.totals import PlannedParts, TruncateOutput, TruncatePlanTotals, TruncateTotals
from kasa_cli.report.weights import Skipped, ToTruncate


@dataclass(frozen=True)
class PlanReport(Report):
    """Plan of `kasa truncate`, from headers alone: nothing is written."""

    command: str
    model: str
    rank: int
    truncation_rank: int
    tensors: tuple[ToTruncate, ...]
    skipped: tuple[Skipped, ...]
    totals: TruncatePlanTotals
    output: PlannedParts
    notes: tuple[str, ...] = ()
    dry_run: bool = True


@dataclass(frozen=True)
class SpectralFacts:
    """The spectral facts of one target, with the solver and its residual; see `linalg.bottom.Ends`."""

    sigma_max: float
    sigma_min: float
    kappa: float
    sigma_cut: float | None
    sigma_next: float
    dropped_energy: float
    solver: str
    residual: float
    angle: float
    is_tied: bool


@dataclass(frozen=True)
class TensorRow:
    """One truncated tensor: its facts, and the figures measured on the stored result (None if no base is written)."""

    name: str
    module: str
    shape: tuple[int, int]
    dtype: str
    stored_dtype: str
    truncation_rank: int
    sigma_max: float
    sigma_min: float
    kappa: float
    sigma_cut: float | None
    sigma_next: float
    dropped_energy: float
    relative_error: float | None
    realised: float | None
    changed_fraction: float | None
    rounding_error: float | None
    solver: str
    residual: float
    is_tied: bool


@dataclass(frozen=True)
class TruncateReport(Report):
    """Result of `kasa truncate`. `model_class` is the class whose module names the adapters use, if known."""

    command: str
    model: str
    model_class: str | None
    rank: int
    truncation_rank: int
    alpha: float
    dtype: str
    rounding: str
    compat: str
    tensors: tuple[TensorRow, ...]
    skipped: tuple[Skipped, ...]
    totals: TruncateTotals
    output: TruncateOutput
    notes: tuple[str, ...] = ()
