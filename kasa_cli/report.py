"""What a run planned, did and found: frozen plain data, for any renderer and for Python.

Singular values are in the units of the weight. Figures that could not be measured are None.
"""

from dataclasses import dataclass, field
from typing import Any


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
class Facts:
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
class DemoReport:
    """What `kasa demo` measured. `rounding` is by (dtype, rule): the least and median share of the cut left.

    `similarity` is the cosine between the last hidden states of the original and of the truncated model, loaded
    by transformers; `tail_difference` the largest difference between the truncated model and original plus tail,
    None where PEFT is not installed.
    """

    command: str
    model: str
    is_generated: bool
    truncated: TruncateReport
    verified: VerifyReport
    rounding: tuple[dict[str, Any], ...]
    similarity: float
    tail_difference: float | None


Report = PlanReport | TruncateReport | VerifyReport | DemoReport
