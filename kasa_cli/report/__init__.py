"""Plans and results of the verbs: frozen plain data, for renderers and for Python."""

from kasa_cli.report.adapter import AdapterReport, InCut, ModuleRow, ValueRow
from kasa_cli.report.base import Report
from kasa_cli.report.convert import ConvertedRow, ConvertPlan, ConvertReport
from kasa_cli.report.demo import DemoReport
from kasa_cli.report.diff import DiffReport, DiffRow
from kasa_cli.report.measure_plan import MeasurePlan, ToMeasure
from kasa_cli.report.merge import AdapterRow, MergedRow, MergePlan, MergeReport
from kasa_cli.report.progress import Progress
from kasa_cli.report.select import CandidateRow, Emission, SelectReport
from kasa_cli.report.spectrum import Curve, SpectrumReport, SpectrumRow
from kasa_cli.report.store import StoreReport
from kasa_cli.report.totals import (
    AdapterTotals,
    Compared,
    ConvertTotals,
    Cost,
    CriterionComparison,
    Decompositions,
    MergeTotals,
    PlannedParts,
    RealisedRow,
    SpectrumTotals,
    StoreRow,
    TruncateOutput,
    TruncateTotals,
)
from kasa_cli.report.truncate import PlanReport, SpectralFacts, TensorRow, TruncateReport
from kasa_cli.report.verify import VerifyReport
from kasa_cli.report.weights import Skipped, ToChange, ToTruncate, by_module_type, module_type

__all__ = [
    "AdapterReport",
    "AdapterRow",
    "AdapterTotals",
    "CandidateRow",
    "Compared",
    "ConvertPlan",
    "ConvertReport",
    "ConvertTotals",
    "ConvertedRow",
    "Cost",
    "CriterionComparison",
    "Curve",
    "Decompositions",
    "DemoReport",
    "DiffReport",
    "DiffRow",
    "Emission",
    "InCut",
    "MeasurePlan",
    "MergePlan",
    "MergeReport",
    "MergeTotals",
    "MergedRow",
    "ModuleRow",
    "PlanReport",
    "PlannedParts",
    "Progress",
    "RealisedRow",
    "Report",
    "SelectReport",
    "Skipped",
    "SpectralFacts",
    "SpectrumReport",
    "SpectrumRow",
    "SpectrumTotals",
    "StoreReport",
    "StoreRow",
    "TensorRow",
    "ToChange",
    "ToMeasure",
    "ToTruncate",
    "TruncateOutput",
    "TruncateReport",
    "TruncateTotals",
    "ValueRow",
    "VerifyReport",
    "by_module_type",
    "module_type",
]
