"""What a run planned, saw and did: frozen plain data, for any renderer and for Python."""

from kasa_cli.report.done import (
    AdapterRow,
    DemoReport,
    MergedRow,
    MergeReport,
    SpectralFacts,
    TensorRow,
    TruncateReport,
    VerifyReport,
)
from kasa_cli.report.looks import (
    CandidateRow,
    Curve,
    DiffReport,
    DiffRow,
    Emission,
    SelectReport,
    SpectrumReport,
    SpectrumRow,
    StoreReport,
)
from kasa_cli.report.plan import (
    Candidate,
    MeasurePlan,
    Piece,
    PlanReport,
    Selection,
    Skipped,
    Target,
    ToMeasure,
    module_type,
)

__all__ = [
    "AdapterRow",
    "Candidate",
    "CandidateRow",
    "Curve",
    "DemoReport",
    "DiffReport",
    "DiffRow",
    "Emission",
    "MeasurePlan",
    "MergeReport",
    "MergedRow",
    "Piece",
    "PlanReport",
    "Report",
    "SelectReport",
    "Selection",
    "Skipped",
    "SpectralFacts",
    "SpectrumReport",
    "SpectrumRow",
    "StoreReport",
    "Target",
    "TensorRow",
    "ToMeasure",
    "TruncateReport",
    "VerifyReport",
    "module_type",
]

Report = (
    PlanReport
    | MeasurePlan
    | TruncateReport
    | VerifyReport
    | DemoReport
    | MergeReport
    | SelectReport
    | SpectrumReport
    | DiffReport
    | StoreReport
)
