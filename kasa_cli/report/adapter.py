"""Result of `kasa inspect adapter`: one row for each weight that the adapter changes, and the parameters it replaces.

Norms and singular values are in the units of the weight. Figures that are not known are None, with the reason.
"""

from dataclasses import dataclass
from typing import Any

from kasa_cli.report.base import Report
from kasa_cli.report.totals import AdapterTotals


@dataclass(frozen=True)
class InCut:
    """Share of an update inside the truncated directions of the base, relative to ‖ΔW‖², beside that of a random
    update.

    `rank` is the number of truncated components, U_d and V_d are their directions: `both` is ‖U_dᵀ ΔW V_d‖², `left`
    ‖U_dᵀ ΔW‖², `right` ‖ΔW V_d‖². `source` says whether the directions come from the tail or the base.
    """

    rank: int
    both: float
    left: float
    right: float
    random_both: float
    random_left: float
    random_right: float
    source: str


@dataclass(frozen=True)
class ModuleRow:
    """One weight, or one expert of a fused parameter, that the adapter changes.

    `parameter` is None where only the base determines it. `why` is the reason for a missing norm or spectrum.
    `diagonal` is learned; `core` are the singular values of a dense core in its place. `defect_a` is ‖A Aᵀ - I‖_F,
    `defect_b` ‖Bᵀ B - I‖_F. `penalties` are KaSA's of this layer: `l2`, and `l3_…` by convention.
    """

    name: str
    module: str
    module_type: str
    parameter: str | None
    expert: int | None
    shape: tuple[int, int] | None
    rank: int | None
    alpha: float | None
    scaling: float | None
    norm: float | None
    singular_values: tuple[float, ...] | None
    why: str | None
    sigma_max: float | None
    stable_rank: float | None
    effective_rank: float | None
    rank_90: int | None
    diagonal: tuple[float, ...] | None
    diagonal_signs: dict[str, int] | None
    core: tuple[float, ...] | None
    defect_a: float | None
    defect_b: float | None
    penalties: dict[str, float] | None
    in_cut: InCut | None
    in_cut_why: str | None


@dataclass(frozen=True)
class ValueRow:
    """A parameter, or rows of one, that the adapter replaces, with the reason."""

    parameter: str
    tensor: str
    shape: tuple[int, ...]
    dtype: str
    why: str


@dataclass(frozen=True)
class AdapterReport(Report):
    """Result of `kasa inspect adapter`. `base_is` is "original" or "truncated", None where it does not matter.

    `penalties` are KaSA's of the whole adapter: `beta`, `gamma` and by convention `l2`, `l3` and the `loss` they add.
    """

    command: str
    adapter: str
    kind: str
    base: str | None
    base_is: str | None
    modules: tuple[ModuleRow, ...]
    values: tuple[ValueRow, ...]
    penalties: dict[str, Any] | None
    totals: AdapterTotals
    notes: tuple[str, ...] = ()

    def rows(self) -> list[Any]:
        """The weights that the adapter changes."""
        return list(self.modules)
