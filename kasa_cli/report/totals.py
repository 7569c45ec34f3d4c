"""Types of the totals, outputs and small rows of reports: plain dicts, as they stand in the JSON."""

from typing import NotRequired, TypedDict


class Cost(TypedDict):
    """Expected peak memory and wall time of a run."""

    memory_bytes: int
    seconds: float


class Decompositions(TypedDict):
    """Weights decomposed in this run, and weights whose facts were in the store."""

    decompositions: int
    decompositions_reused: int


class MeasurePlanTotals(Cost):
    """Weights that a verb would measure."""

    tensors: int
    tensors_skipped: int
    bytes_to_write: int


class TruncatePlanTotals(Cost):
    """Targets of a truncation, and the size of its output."""

    tensors_operated: int
    tensors_skipped: int
    bytes_to_write: int


class MergePlanTotals(Cost):
    """Tensors of a merged model, and its size."""

    tensors_merged: int
    tensors_copied: int
    bytes_to_write: int


class ConvertPlanTotals(Cost):
    """Weights of a conversion. The size of its output is unknown before the ranks are."""

    weights: int
    tensors_to_write: int
    bytes_to_write: None


class TruncateTotals(Decompositions):
    """Targets of a truncation, and how much of it the stored weights realise; None where no base is written."""

    tensors_operated: int
    tensors_copied: int
    realised_min: float | None
    realised_median: float | None
    min_realised: float
    below_min_realised: int


class MergeTotals(TypedDict):
    """Tensors and files of a merged model, the largest change of an entry, the largest rounding error."""

    tensors_merged: int
    tensors_copied: int
    files: int
    max_abs_change: float | None
    max_rounding_error: float | None


class ConvertTotals(TypedDict):
    """Weights of a conversion, tensors read and written, and its loss: of the worst weight, and overall."""

    weights: int
    tensors_consumed: int
    tensors_total: int
    largest_loss: float
    loss: float
    tensors_written: int


class SpectrumTotals(Decompositions):
    """Weights measured, and weights that could not be."""

    tensors: int
    unmeasured: int


class DiffTotals(Decompositions):
    """Pairs of weights that differ, that are equal, and that could not be measured."""

    differing: int
    identical: int
    unmeasured: int


class SelectTotals(Decompositions):
    """Candidates scored and selected, and those that could not be measured."""

    candidates: int
    selected: int
    unmeasured: int


class AdapterTotals(TypedDict):
    """Weights that an adapter changes, the norm of all updates, and the size of its file.

    `norm` is None where that of a weight is not known.
    """

    modules: int
    modules_without_norm: int
    norm: float | None
    tensors: int
    parameters: int


class StoreTotals(TypedDict):
    """What the store holds: tensors measured, models whose names are known, bytes."""

    tensors: int
    models: int
    bytes: int


class PruneTotals(TypedDict):
    """What was removed from the store, and what remains."""

    removed: int
    models_removed: int
    bytes_removed: int
    kept: int
    models_kept: int
    bytes_kept: int
    dry_run: bool


class PlannedParts(TypedDict):
    """The parts that a truncation would write."""

    base: bool
    adapter: bool
    tail: bool


class TruncateOutput(TypedDict):
    """Folders that a truncation wrote."""

    directory: str
    base: NotRequired[str]
    adapter: NotRequired[str]
    tail: NotRequired[str]
    manifest_sha256: str


class MergeOutput(TypedDict):
    """The folder of a merged model."""

    directory: str
    manifest_sha256: str


class ConvertOutput(TypedDict):
    """The folder of a converted adapter, and its file."""

    directory: str
    file: str
    manifest_sha256: str


class SpectrumOutput(TypedDict):
    """The file of all singular values, where one was asked for."""

    values: NotRequired[str]


class Compared(TypedDict):
    """One target recomputed from the base.

    `ulps` is the largest distance of a stored entry from the exact result, in units in the last place; `tail_error`
    the distance of the tail's product, over σ_max. None for a part that was not written.
    """

    name: str
    ulps: float | None
    tail_error: float | None


class CriterionComparison(TypedDict):
    """Another criterion: its overlap with the selection at equal size, and Spearman's correlation of the orders."""

    criterion: str
    prefer: str
    overlap: float
    rank_correlation: float | None


class StoreRow(TypedDict):
    """One tensor in the store. `content` is the hash that its facts are kept under."""

    name: str
    shape: list[int]
    dtype: str
    facts: list[str]
    bytes: int
    last_used: str
    content: str


class RealisedRow(TypedDict):
    """How much of a truncation a base in half precision realises under one rounding."""

    dtype: str
    rounding: str
    realised_min: float | None
    realised_median: float | None
