"""Result of `kasa inspect diff`: one row for each weight that both checkpoints hold."""

from dataclasses import dataclass

from kasa_cli.report.base import Report
from kasa_cli.report.totals import DiffTotals
from kasa_cli.report.weights import Skipped


@dataclass(frozen=True)
class DiffRow:
    """One weight in two checkpoints, A and B.

    `relative_distance` is ‖B - A‖_F / ‖A‖_F. Angles are the largest principal ones, in degrees, between the spaces
    of the `subspace_rank` largest (smallest) left singular vectors. `intruders` counts the `subspace_rank` largest
    left singular vectors of B that are like none of A; `least_similarity` is the least of their best cosines.
    """

    name: str
    module: str
    module_type: str
    shape: tuple[int, int]
    relative_distance: float
    sigma_max: tuple[float, float]
    sigma_min: tuple[float, float]
    kappa: tuple[float, float]
    stable_rank: tuple[float, float]
    effective_rank: tuple[float, float]
    spectrum_change: float
    subspace_rank: int
    top_angle: float
    bottom_angle: float
    intruders: int
    least_similarity: float


@dataclass(frozen=True)
class DiffReport(Report):
    """Result of `kasa inspect diff`. `rank_correlation` is Spearman's, between the two orders by κ."""

    command: str
    models: tuple[str, str]
    tensors: tuple[DiffRow, ...]
    identical: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    rank_correlation: float | None
    totals: DiffTotals
    notes: tuple[str, ...] = ()
