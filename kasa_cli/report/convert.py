"""Plan and result of `kasa convert`: one row for each converted weight."""

from dataclasses import dataclass

from kasa_cli.report.base import Report
from kasa_cli.report.totals import ConvertOutput, ConvertPlanTotals, ConvertTotals
from kasa_cli.report.weights import ToChange


@dataclass(frozen=True)
class ConvertedRow:
    """One weight, or one stack of experts.

    `rank` components are kept, `exact_rank` would lose nothing; `norm` is ‖ΔW‖_F, `loss` the norm of the difference
    between ΔW and the stored factors, relative to it.
    """

    module: str
    names: tuple[str, ...]
    rank: int
    exact_rank: int | None
    norm: float
    loss: float


@dataclass(frozen=True)
class ConvertReport(Report):
    """Result of `kasa convert`. `on` and `base_is` are for KaSA, None for other kinds.

    `names` is None for lora-lite. `rank` is the largest of the rows, `padded_rank` that of the file.
    """

    command: str
    model: str
    model_class: str | None
    kind: str
    to: str
    on: str | None
    base_is: str | None
    names: str | None
    rank: int
    padded_rank: int
    tensors: tuple[ConvertedRow, ...]
    totals: ConvertTotals
    output: ConvertOutput
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConvertPlan(Report):
    """Plan of `kasa convert`: nothing is written.

    Only headers of the base are read, and weights that have to be compared with a manifest. Memory and time are
    those of decomposing what may have to be; the store and a tail spare it. Bytes are not predicted: ranks are not.
    """

    command: str
    model: str
    to: str
    on: str | None
    base_is: str | None
    tensors: tuple[ToChange, ...]
    totals: ConvertPlanTotals
    notes: tuple[str, ...] = ()
    dry_run: bool = True
