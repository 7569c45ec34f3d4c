"""The weights of a spectrum report by layer and module type, and the quantities of their spectra."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Any

from kasa_cli.errors import printable
from kasa_cli.report import DiffRow, ModuleRow, SpectrumReport, SpectrumRow

NO_LAYER = "–"
INFINITE = "∞"
DECADES = 30.0
"""Values further apart than this factor are shown by their logarithm."""


@dataclass(frozen=True)
class Quantity:
    """A quantity of a weight: its field in the row, symbol, title, formula and meaning."""

    key: str
    symbol: str
    title: str
    formula: str
    meaning: str


QUANTITIES = (
    Quantity(
        "kappa",
        "κ",
        "Condition number κ",
        "κ = σ₁ / σₖ",
        "1 where all directions are alike, ∞ for a singular weight.",
    ),
    Quantity("sigma_max", "σ max", "Largest singular value", "σ₁ = ‖W‖₂", "The most W stretches a vector."),
    Quantity(
        "sigma_min", "σ min", "Smallest singular value", "σₖ, k = min(o, i)", "0 for a singular weight."
    ),
    Quantity("frobenius", "‖W‖_F", "Frobenius norm", "√Σσ²", "The size of all entries together."),
    Quantity("nuclear", "‖W‖_*", "Nuclear norm", "Σσ", "The sum of the spectrum."),
    Quantity(
        "stable_rank",
        "stable rank",
        "Stable rank",
        "‖W‖_F² / ‖W‖₂²",
        "How many directions as strong as the strongest would hold the energy of W.",
    ),
    Quantity(
        "effective_rank",
        "effective rank",
        "Effective rank",
        "exp(−Σ p ln p), p = σ / Σσ",
        "How many directions W uses, the weak ones counted in part.",
    ),
    Quantity("entropy", "entropy", "Spectral entropy", "−Σ p ln p, p = σ / Σσ", "High: a flat spectrum."),
    Quantity(
        "numerical_rank",
        "rank",
        "Numerical rank",
        "#{σ > σ₁ max(o, i) ε}",
        "Less than k: W is singular, within roundoff.",
    ),
    Quantity(
        "mp_edge",
        "MP edge",
        "Marchenko–Pastur edge",
        "s (√o + √i)",
        "The largest singular value of pure noise whose entries have standard deviation s.",
    ),
    Quantity(
        "mp_above",
        "above MP",
        "Components above the Marchenko–Pastur edge",
        "#{σ > s (√o + √i)}",
        "Directions that noise alone does not explain.",
    ),
    Quantity(
        "power_law_alpha",
        "α",
        "Power-law exponent α",
        "p(λ) ∝ λ^−α, λ = σ² in the tail",
        "How heavy the tail of the spectrum is: the smaller, the heavier.",
    ),
)


@dataclass(frozen=True)
class Grid:
    """The weights of a report by layer and module type."""

    report: SpectrumReport

    @property
    def model(self) -> str:
        """The model's name for a page to share; only the last part of a local path."""
        name = self.report.model
        return (
            PurePath(name).name or name
            if PurePath(name).is_absolute() or name.startswith((".", "~"))
            else name
        )

    @cached_property
    def places(self) -> list[tuple[str, str]]:
        """(module type, layer) of each weight, abbreviated and unique."""
        return placed(self.report.tensors)

    @cached_property
    def types(self) -> list[str]:
        """Module types in the order of the model."""
        return list(dict.fromkeys(kind for kind, _ in self.places))

    @cached_property
    def layers(self) -> list[str]:
        """Layers in ascending order, weights outside of any last."""
        return sorted({layer for _, layer in self.places}, key=lambda x: (not x.isdigit(), x.zfill(9)))

    @cached_property
    def quantities(self) -> list[Quantity]:
        """All figures of the report, the energies at its ranks too."""
        ranks = dict.fromkeys(rank for row in self.report.tensors for rank in row.energy if rank.isdigit())
        return [*QUANTITIES, *map(_energy, ranks)]

    @cached_property
    def points(self) -> list[dict[str, Any]]:
        """One JSON record for each weight: infinity is "∞", a missing figure is null."""
        return [_point(n, row, self.places[n]) for n, row in enumerate(self.report.tensors)]


def placed(rows: Sequence[SpectrumRow | DiffRow | ModuleRow]) -> list[tuple[str, str]]:
    """(module type, layer) of each row, the types abbreviated."""
    places_of_rows = places(rows)
    names = abbreviated([kind for kind, _ in places_of_rows])
    return [(printable(names[kind]), layer) for kind, layer in places_of_rows]


def places(rows: Sequence[SpectrumRow | DiffRow | ModuleRow]) -> list[tuple[str, str]]:
    """Module type and layer of each row: the last number of the path, or the first where that is not unique."""
    last = [(row.module_type, _layer(row.module)) for row in rows]
    if len(set(last)) == len(rows):
        return last
    first = [_around_first_number(row.module) for row in rows]
    if len(set(first)) == len(rows):
        return first
    return [_around_first_number(row.name) for row in rows]


def abbreviated(types: Iterable[str]) -> dict[str, str]:
    """The shortest ending of each path that no other path has.

    >>> abbreviated(["self_attn.q_proj", "attention.output.dense", "output.dense"])
    {'self_attn.q_proj': 'q_proj', 'attention.output.dense': 'attention.output.dense', 'output.dense': 'output.dense'}
    """
    distinct = dict.fromkeys(types)
    counts = Counter(ending for kind in distinct for ending in _endings(kind))
    return {kind: next((e for e in _endings(kind) if counts[e] == 1), kind) for kind in distinct}


def value(row: SpectrumRow, key: str) -> float | None:
    """A figure of a row by the key of its quantity; None if it was not measured."""
    figure = row.energy.get(key.removeprefix("energy_")) if key.startswith("energy_") else getattr(row, key)
    return None if figure is None or math.isnan(figure) else figure


def spans_decades(known: Sequence[float]) -> bool:
    """Whether values need a log scale: none is negative, and the positive ones are far apart.

    >>> spans_decades([0.0, 1.0, 1000.0]), spans_decades([2.0, 3.0]), spans_decades([])
    (True, False, False)
    """
    positive = [v for v in known if v > 0]
    return bool(positive) and min(known) >= 0 and max(positive) / min(positive) >= DECADES


def decades(known: Sequence[float]) -> list[float]:
    """Up to five powers of ten within the range of the positive values.

    >>> decades([0.0, 3.0, 4000.0])
    [10.0, 100.0, 1000.0]
    """
    positive = [v for v in known if v > 0]
    powers = range(math.ceil(math.log10(min(positive))), math.floor(math.log10(max(positive))) + 1)
    return [10.0**n for n in powers[:: max(1, math.ceil(len(powers) / 5))]]


def special_values(values: Sequence[float | None], is_log: bool) -> list[str]:
    """The values that occur and are not on the colour scale: infinity, zero on a log scale, not measured."""
    signs = [
        (INFINITE, any(v is not None and math.isinf(v) for v in values)),
        ("0", is_log and any(v == 0 for v in values)),
        ("none", any(v is None for v in values)),
    ]
    return [sign for sign, is_there in signs if is_there]


def _point(number: int, row: SpectrumRow, place: tuple[str, str]) -> dict[str, Any]:
    keys = [quantity.key for quantity in QUANTITIES] + [
        f"energy_{rank}" for rank in row.energy if rank.isdigit()
    ]
    figures = {key: _sayable(value(row, key)) for key in keys}
    shape = f"{row.shape[0]} × {row.shape[1]}"
    named = {"id": number, "name": printable(row.name), "kind": place[0], "layer": place[1]}
    return {**named, "shape": shape, "dtype": row.dtype, **figures}


def _sayable(figure: float | None) -> float | str | None:
    if figure is None or math.isfinite(figure):
        return float(f"{figure:.7g}") if isinstance(figure, float) else figure
    return INFINITE


def _energy(rank: str) -> Quantity:
    meaning = "The share of the energy in the leading directions."
    return Quantity(
        f"energy_{rank}", f"energy {rank}", f"Energy at rank {rank}", f"Σ_(j≤{rank}) σ² / Σσ²", meaning
    )


def _layer(module: str) -> str:
    numbers = re.findall(r"(?<![^.])\d+(?![^.])", module)
    return str(int(numbers[-1])) if numbers else NO_LAYER


def _around_first_number(path: str) -> tuple[str, str]:
    parts = path.split(".")
    at = next((n for n, part in enumerate(parts) if part.isdecimal()), None)
    return (path, NO_LAYER) if at is None else (".".join(parts[:at] + parts[at + 1 :]), str(int(parts[at])))


def _endings(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[n:]) for n in reversed(range(len(parts))) if not parts[n].isdecimal()]
