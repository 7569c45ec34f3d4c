"""What was seen: spectra, differences, choices, and what the store holds.

Singular values are in the units of the weight. Figures that could not be measured are None.
"""

from dataclasses import dataclass, field
from typing import Any

from kasa_cli.report.plan import Skipped


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
class SelectReport:
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


@dataclass(frozen=True)
class SpectrumRow:
    """The spectrum of one weight in figures; see `linalg.quantities` for what each means.

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
class SpectrumReport:
    """What `kasa inspect spectrum` measured. `curves` are for pictures, and in no JSON."""

    command: str
    model: str
    model_class: str | None
    tensors: tuple[SpectrumRow, ...]
    skipped: tuple[Skipped, ...]
    totals: dict[str, Any]
    output: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    curves: tuple[Curve, ...] = field(default=(), metadata={"json": False})


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
class DiffReport:
    """What `kasa inspect diff` found. `rank_correlation` is Spearman's, of the two orders by κ."""

    command: str
    models: tuple[str, str]
    tensors: tuple[DiffRow, ...]
    identical: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    rank_correlation: float | None
    totals: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoreReport:
    """What the store of facts holds, or what was removed of it: one row a tensor measured."""

    command: str
    store: str
    tensors: tuple[dict[str, Any], ...]
    totals: dict[str, Any]
    notes: tuple[str, ...] = ()
