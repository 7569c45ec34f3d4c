"""Result of `kasa inspect spectrum`: one row for each weight.

Singular values are in the units of the weight. Figures that could not be measured are None.
"""

from dataclasses import dataclass, field

from kasa_cli.report.base import Report
from kasa_cli.report.totals import SpectrumOutput, SpectrumTotals
from kasa_cli.report.weights import Skipped


@dataclass(frozen=True)
class SpectrumRow:
    """Figures of the spectrum of one weight, as defined in `linalg.quantities`.

    `energy` is by rank, as text; `sketch` a few singular values at equal steps of the index, for a drawing in a
    line; `worst` and `best` mark the extremes of κ within a module type.
    """

    name: str
    module: str
    module_type: str
    shape: tuple[int, int]
    dtype: str
    sigma_max: float
    sigma_min: float
    kappa: float
    frobenius: float
    nuclear: float
    stable_rank: float
    effective_rank: float
    entropy: float
    numerical_rank: int
    energy: dict[str, float]
    mp_sigma: float
    mp_edge: float
    mp_above: int
    power_law_alpha: float | None
    power_law_xmin: float | None
    power_law_tail: int | None
    solver: str
    sketch: tuple[float, ...]
    is_worst: bool = False
    is_best: bool = False


@dataclass(frozen=True)
class Curve:
    """The singular values of one weight at some of their indices (from 1, ascending), for a picture."""

    name: str
    index: tuple[int, ...]
    value: tuple[float, ...]


@dataclass(frozen=True)
class SpectrumReport(Report):
    """Result of `kasa inspect spectrum`. `curves` are for pictures and not part of the JSON."""

    command: str
    model: str
    model_class: str | None
    tensors: tuple[SpectrumRow, ...]
    skipped: tuple[Skipped, ...]
    totals: SpectrumTotals
    output: SpectrumOutput = field(default_factory=SpectrumOutput)
    notes: tuple[str, ...] = ()
    curves: tuple[Curve, ...] = field(default=(), metadata={"json": False})
