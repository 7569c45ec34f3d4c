"""What a run planned, saw and did: frozen plain data, for any renderer and for Python."""

from kasa_cli.report.adapters import AdapterReport, InCut, ModuleRow, ValueRow
from kasa_cli.report.converted import ConvertedRow, ConvertReport
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
    ConvertPlan,
    MeasurePlan,
    MergePlan,
    Piece,
    PlanReport,
    Selection,
    Skipped,
    Target,
    ToChange,
    ToMeasure,
    module_type,
)

__all__ = [
    "AdapterReport",
    "AdapterRow",
    "Candidate",
    "CandidateRow",
    "ConvertPlan",
    "ConvertReport",
    "ConvertedRow",
    "Curve",
    "DemoReport",
    "DiffReport",
    "DiffRow",
    "Emission",
    "InCut",
    "MeasurePlan",
    "MergePlan",
    "MergeReport",
    "MergedRow",
    "ModuleRow",
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
    "ToChange",
    "ToMeasure",
    "TruncateReport",
    "ValueRow",
    "VerifyReport",
    "module_type",
]

Report = (
    PlanReport
    | MeasurePlan
    | MergePlan
    | ConvertPlan
    | TruncateReport
    | VerifyReport
    | DemoReport
    | MergeReport
    | ConvertReport
    | SelectReport
    | SpectrumReport
    | DiffReport
    | AdapterReport
    | StoreReport
)
