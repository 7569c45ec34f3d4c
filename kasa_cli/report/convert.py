"""What `kasa convert` made of an adapter."""

from dataclasses import dataclass
from typing import Any

from kasa_cli.report.base import Report
from kasa_cli.report.weights import ToChange


@dataclass(frozen=True)
class ConvertedRow:
    """One weight, or one stack of experts: the components kept and those that would lose nothing, the norm of the
    update, and the norm of what is missing of it as stored, relative to that."""

    module: str
    names: tuple[str, ...]
    rank: int
    exact_rank: int | None
    norm: float
    loss: float


@dataclass(frozen=True)
class ConvertReport(Report):
    """What `kasa convert` did. `on` and `base_is` are about KaSA, None for other kinds.

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
    totals: dict[str, Any]
    output: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConvertPlan(Report):
    """What `--dry-run` of a conversion prints: nothing was written.

    Of the base only headers were read, but for weights that a manifest had to be compared with. Memory and time are
    those of decomposing what may have to be; the store and a tail spare it. Bytes are not foretold: ranks are not.
    """

    command: str
    model: str
    to: str
    on: str | None
    base_is: str | None
    tensors: tuple[ToChange, ...]
    totals: dict[str, Any]
    notes: tuple[str, ...] = ()
    dry_run: bool = True
