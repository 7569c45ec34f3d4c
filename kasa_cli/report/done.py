"""What was done: truncated, merged, verified; figures are of what was stored.

Singular values are in the units of the weight. Figures that could not be measured are None.
"""

from dataclasses import dataclass, field
from typing import Any

from kasa_cli.report.looks import SelectReport, SpectrumReport
from kasa_cli.report.plan import Skipped


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
class MergedRow:
    """One tensor that adapters changed: how many had a word in it, the largest change of an entry, and the distance
    of what was stored from the exact sum, over its norm."""

    name: str
    module: str
    dtype: str
    terms: int
    max_abs_change: float
    rounding_error: float


@dataclass(frozen=True)
class AdapterRow:
    """An adapter that was merged, every tensor of it accounted for."""

    path: str
    kind: str
    weight: float
    sha256: str
    tensors_consumed: int
    tensors_total: int


@dataclass(frozen=True)
class MergeReport:
    """What `kasa merge` did. `base_is` is what a KaSA adapter was told of its base, None without one."""

    command: str
    model: str
    model_class: str | None
    base_is: str | None
    dtype: str
    rounding: str
    tensors: tuple[MergedRow, ...]
    adapters: tuple[AdapterRow, ...]
    totals: dict[str, Any]
    output: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DemoReport:
    """What `kasa demo` measured. `rounding` is by (dtype, rule): the least and median share of the cut left.

    `similarity` is the cosine between the last hidden states of the original and of the truncated model, loaded
    by transformers; `tail_difference` the largest difference between the truncated model and original plus tail in
    PEFT, None where that is not installed; `merge_difference` the same for the tail merged by kasa.
    """

    command: str
    model: str
    is_generated: bool
    spectrum: SpectrumReport
    selected: SelectReport
    truncated: TruncateReport
    verified: VerifyReport
    merged: MergeReport
    rounding: tuple[dict[str, Any], ...]
    similarity: float
    tail_difference: float | None
    merge_difference: float
