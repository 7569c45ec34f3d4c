"""What a run planned, did and found: frozen plain data, for any renderer and for Python.

Singular values are in the units of the weight. Figures that could not be measured are None.
"""

import re
from dataclasses import dataclass, field
from typing import Any


def module_type(module: str) -> str:
    """What follows the number of the layer.

    >>> module_type("model.layers.11.self_attn.q_proj")
    'self_attn.q_proj'
    """
    return re.split(r"\.\d+\.", f".{module}")[-1].lstrip(".")


@dataclass(frozen=True)
class Skipped:
    """A tensor that stays as it is, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Target:
    """A tensor to operate on.

    `shape` is that on disk; `is_transposed` says that it is (in_features, out_features), as in a Conv1D;
    `dropped` is the number of components to drop, t.
    """

    name: str
    module: str
    shape: tuple[int, int]
    dtype: str
    is_transposed: bool
    dropped: int

    @property
    def out_features(self) -> int:
        """o."""
        return self.shape[1] if self.is_transposed else self.shape[0]

    @property
    def in_features(self) -> int:
        """i."""
        return self.shape[0] if self.is_transposed else self.shape[1]

    @property
    def work(self) -> float:
        """Multiplications of the Gram matrix and its factorisation: what the time is proportional to."""
        short, long = sorted(self.shape)
        return short * short * (long + short)


@dataclass(frozen=True)
class Selection:
    """The tensors to operate on and all others, each with its reason."""

    targets: tuple[Target, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class SpectralFacts:
    """The spectral facts of one target and what a solver says of them; see `linalg.ends.Ends`."""

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
    """One truncated tensor: its facts, and what was measured on the stored result (None if none was)."""

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
class PlanReport:
    """What `--dry-run` prints: nothing was read but headers, nothing was written."""

    command: str
    model: str
    rank: int
    truncation_rank: int
    tensors: tuple[Target, ...]
    skipped: tuple[Skipped, ...]
    totals: dict[str, Any]
    output: dict[str, Any]
    notes: tuple[str, ...] = ()
    dry_run: bool = True


@dataclass(frozen=True)
class ToMeasure:
    """A weight that would be measured; `shape` as it lies on disk, its pieces stacked."""

    name: str
    module: str
    shape: tuple[int, int]
    dtype: str


@dataclass(frozen=True)
class MeasurePlan:
    """What `--dry-run` prints of a verb that looks: nothing was read but headers."""

    command: str
    model: str
    tensors: tuple[ToMeasure, ...]
    skipped: tuple[Skipped, ...]
    totals: dict[str, Any]
    notes: tuple[str, ...] = ()
    dry_run: bool = True


@dataclass(frozen=True)
class TruncateReport:
    """What `kasa truncate` did. `model_class` is the class whose module names the adapters use, if known."""

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
    totals: dict[str, Any]
    output: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class VerifyReport:
    """What `kasa verify` checked; it raises on the first class of problem, so a report means all is well."""

    command: str
    output: str
    depth: tuple[str, ...]
    files: int
    tensors: int
    bytes_hashed: int
    compared: tuple[dict[str, Any], ...] = field(default=())


@dataclass(frozen=True)
class Piece:
    """A tensor on disk, or one matrix of a three-dimensional one."""

    name: str
    index: int | None = None


@dataclass(frozen=True)
class Candidate:
    """What could be fine-tuned: a module, or a parameter that holds the matrices of several experts.

    `shape` is that in memory, of a parameter without its number of experts. Each of `matrices` is one weight, its
    pieces stacked by rows: a module has one; an expert may be split over several tensors on disk.
    """

    module: str
    kind: str
    shape: tuple[int, int]
    matrices: tuple[tuple[Piece, ...], ...]
    is_transposed: bool = False

    @property
    def num_matrices(self) -> int:
        """One, or the number of experts."""
        return len(self.matrices)


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


@dataclass(frozen=True)
class DemoReport:
    """What `kasa demo` measured. `rounding` is by (dtype, rule): the least and median share of the cut left.

    `similarity` is the cosine between the last hidden states of the original and of the truncated model, loaded
    by transformers; `tail_difference` the largest difference between the truncated model and original plus tail,
    None where PEFT is not installed.
    """

    command: str
    model: str
    is_generated: bool
    spectrum: SpectrumReport
    selected: SelectReport
    truncated: TruncateReport
    verified: VerifyReport
    rounding: tuple[dict[str, Any], ...]
    similarity: float
    tail_difference: float | None


Report = (
    PlanReport
    | MeasurePlan
    | TruncateReport
    | VerifyReport
    | DemoReport
    | SelectReport
    | SpectrumReport
    | DiffReport
    | StoreReport
)
