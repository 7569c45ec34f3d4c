"""Tables of an adapter for the terminal: its updates by module type, the extremes, and KaSA's penalties."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from kasa_cli.errors import printable
from kasa_cli.render.grid import placed
from kasa_cli.render.spectra import MOST_DECADES, Summary, aligned, more, sketch
from kasa_cli.render.units import number, percent
from kasa_cli.report import AdapterReport, ModuleRow, ValueRow, by_module_type

MAX_ROWS = 60
EXTREMES = 5
MAX_VALUES = 12
NONE = "–"
CONVENTIONS = {
    "paper": ("the paper", "‖BᵀB−I‖² + ‖AAᵀ−I‖², summed"),
    "peft": ("PEFT", "‖BᵀB−I‖ + ‖AAᵀ−I‖, summed"),
    "reference": ("published code", "‖BBᵀ−I‖ + ‖AᵀA−I‖, mean"),
}
"""By convention: its source, and the formula of L3 for a layer and over the layers."""


def adapter_tables(report: AdapterReport) -> list[Summary]:
    """One row for each weight, by module type; for many weights or experts one row for each type, and the
    extremes."""
    updates = [by_type(report), extremes(report.modules)] if is_long(report) else [by_module(report)]
    return [*updates, penalties(report), values(report.values)]


def is_long(report: AdapterReport) -> bool:
    """Whether one row for each weight would be too many."""
    return len(report.modules) > MAX_ROWS or any(row.expert is not None for row in report.modules)


def by_module(report: AdapterReport) -> Summary:
    """One row for each weight, in the order of the model; beside the name of a type the share that chance would
    give."""
    groups: dict[str, list[tuple[str, ModuleRow]]] = {}
    for row, (kind, layer) in zip(report.modules, placed(report.modules), strict=True):
        groups.setdefault(kind, []).append((layer, row))
    decades = decades_drawn(report.modules)
    rows: list[Sequence[str]] = []
    for kind, members in groups.items():
        rows.append(
            (kind, shapes(row for _, row in members), *[""] * 6, by_chance(row for _, row in members))
        )
        rows += [(f"  {layer}", *_cells(row, decades)) for layer, row in members]
    columns = ("module", "spectrum", "‖ΔW‖", "σ max", "90 %", "⊥A", "⊥B", "d", "cut %")
    return title(report), *aligned(*without_blanks(columns, rows))


def by_type(report: AdapterReport) -> Summary:
    """One row for each module type: smallest and largest norm, medians, the largest defects."""
    groups = by_module_type(report.modules)
    rows = [
        (
            printable(kind),
            str(len(members)),
            shapes(members),
            span([row.norm for row in members]),
            most([row.sigma_max for row in members]),
            median([row.rank_90 for row in members]),
            most([row.defect_a for row in members], short),
            most([row.defect_b for row in members], short),
            shown(middle([row.in_cut.both for row in members if row.in_cut]), per_cent),
        )
        for kind, members in groups.items()
    ]
    columns = ("module type", "n", "shape", "‖ΔW‖", "σ max", "90 %", "⊥A", "⊥B", "cut %")
    return title(report), *without_blanks(columns, rows)


def extremes(modules: Sequence[ModuleRow]) -> Summary:
    """The weights that changed most and least."""
    known = sorted((row for row in modules if row.norm is not None), key=lambda row: -(row.norm or 0.0))
    if len(known) <= 2 * EXTREMES:
        picked = [("", row) for row in known]
    else:
        picked = [("▲ most", row) for row in known[:EXTREMES]]
        picked += [("▼ least", row) for row in known[-EXTREMES:]]
    decades = decades_drawn(row for _, row in picked)
    rows = [
        (row.name, mark, sketch(row.singular_values or (), decades), shown(row.norm), shown(row.sigma_max))
        for mark, row in picked
    ]
    return "changed most and least", ("module", "", "spectrum", "‖ΔW‖", "σ max"), rows


def penalties(report: AdapterReport) -> Summary:
    """What KaSA's penalties add to the loss, by convention."""
    by_convention = report.penalties
    rows = [
        (name, *(number(by_convention[key][part]) for part in ("l2", "l3", "loss")), formula)
        for key, (name, formula) in CONVENTIONS.items()
        if by_convention
    ]
    weights = f"β = {by_convention['beta']:g}, γ = {by_convention['gamma']:g}" if by_convention else ""
    return f"KaSA's penalties, {weights}", ("as in", "L2", "L3", "β L2 + γ L3", "L3 of a layer"), rows


def values(parameters: Sequence[ValueRow]) -> Summary:
    """Parameters in the file that are not updates."""
    rows = [
        (row.parameter, "×".join(map(str, row.shape)) or "one number", row.dtype, row.why)
        for row in parameters[:MAX_VALUES]
    ]
    return (
        f"held beside updates{more(len(parameters) - len(rows))}",
        ("parameter", "shape", "dtype", "why"),
        rows,
    )


def closing(report: AdapterReport) -> list[str]:
    """Legend of the columns."""
    lines, rest = [], "" if is_long(report) else "; beside a type: by chance"
    if is_long(report):
        lines.append("by type: ‖ΔW‖ least–most, σ max, ⊥A and ⊥B the most, 90 % and cut % the median")
    if any(row.rank_90 is not None for row in report.modules):
        lines.append("90 %: components that hold as much of ‖ΔW‖²")
    if any(row.defect_a is not None for row in report.modules):
        lines.append("⊥A, ⊥B: ‖AAᵀ−I‖, ‖BᵀB−I‖ (Frobenius), 0 for orthonormal factors")
    if any(row.diagonal for row in report.modules) and not is_long(report):
        lines.append("d: entries of the learned diagonal above zero, below it, and near it (0)")
    if any(row.in_cut for row in report.modules):
        lines.append(f"cut %: share of ‖ΔW‖² where the base was cut{rest}")
    return lines


def title(report: AdapterReport) -> str:
    """Number and kind of the updates, with their ranks and scalings."""
    ranks = listed("rank", sorted({row.rank for row in report.modules if row.rank is not None}))
    scalings = listed("scaling", sorted({row.scaling for row in report.modules if row.scaling is not None}))
    total = report.totals.get("norm")
    norm = f", ‖ΔW‖ together {number(total)}" if total is not None and report.modules else ""
    return f"{len(report.modules)} updates, {report.kind}{ranks}{scalings}{norm}"


def listed(word: str, known: Sequence[float]) -> str:
    """A label with a few numbers, or with their range.

    >>> listed("rank", [8]), listed("rank", [1, 2, 4, 8]), listed("rank", [])
    (', rank 8', ', rank 1–8', '')
    """
    if not known:
        return ""
    return f", {word} " + (
        ", ".join(f"{x:g}" for x in known) if len(known) < 4 else f"{known[0]:g}–{known[-1]:g}"
    )


def decades_drawn(modules: Iterable[ModuleRow]) -> float:
    """Decades that a drawing covers below the largest value, the same for all rows: as many as the widest needs."""
    spectra = ([s for s in row.singular_values or () if s > 0] for row in modules)
    return min(MOST_DECADES, max([0.5, *(math.log10(S[0] / S[-1]) for S in spectra if S)]))


def shapes(modules: Iterable[ModuleRow]) -> str:
    """The common shape of some weights, or the number of their shapes."""
    distinct = {row.shape for row in modules if row.shape}
    if len(distinct) != 1:
        return f"{len(distinct)} shapes" if distinct else NONE
    o, i = distinct.pop()
    return f"{o}×{i}"


def by_chance(modules: Iterable[ModuleRow]) -> str:
    """The share of a random update in the truncated directions, where it is the same for all."""
    shares = {row.in_cut.random_both for row in modules if row.in_cut}
    return per_cent(shares.pop()) if len(shares) == 1 else ""


def short(figure: float) -> str:
    """Two decimals for figures of ordinary size.

    >>> short(2.828), short(1.9e-08)
    ('2.83', '1.9e-08')
    """
    return f"{figure:.2f}" if 0.01 <= figure < 10 else number(figure)


def per_cent(share: float) -> str:
    """A share in per cent, without the per cent sign.

    >>> per_cent(0.00043), per_cent(1.0)
    ('0.043', '100.0')
    """
    return percent(share).removesuffix(" %")


def signs(row: ModuleRow) -> str:
    """The learned diagonal as counts of its signs."""
    if row.core is not None:
        return "core"
    if row.diagonal_signs is None:
        return NONE
    marks = (("positive", "+"), ("negative", "−"), ("near_zero", "0"))
    counts = [f"{row.diagonal_signs[name]}{mark}" for name, mark in marks]
    return "".join(counts if row.diagonal_signs["near_zero"] else counts[:2])


def shown(figure: float | None, spell: Callable[[float], str] = number) -> str:
    """A figure, or a dash for a missing one."""
    if figure is None:
        return NONE
    return str(figure) if isinstance(figure, int) else spell(figure)


def span(figures: Iterable[float | None]) -> str:
    """The smallest and the largest."""
    known = sorted(x for x in figures if x is not None)
    return f"{number(known[0])}–{number(known[-1])}" if known else NONE


def most(figures: Iterable[float | None], spell: Callable[[float], str] = number) -> str:
    """The largest."""
    return shown(max((x for x in figures if x is not None), default=None), spell)


def median(figures: Iterable[float | None]) -> str:
    """The median of the known figures."""
    figure = middle([x for x in figures if x is not None])
    return NONE if figure is None else f"{figure:g}"


def middle(known: Sequence[float]) -> float | None:
    """The median, if there is one."""
    return statistics.median(known) if known else None


def without_blanks(
    columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """The table without empty columns.

    >>> without_blanks(("a", "b"), [("1", "–"), ("2", "")])
    (['a'], [['1'], ['2']])
    """
    filled = [n for n in range(len(columns)) if n == 0 or any(row[n] not in ("", NONE) for row in rows)]
    return [columns[n] for n in filled], [[row[n] for n in filled] for row in rows]


def _cells(row: ModuleRow, decades: float) -> tuple[str, ...]:
    values = row.singular_values
    return (
        sketch(values, decades) if values else "",
        shown(row.norm),
        shown(row.sigma_max),
        f"{row.rank_90}/{len(values)}" if values else NONE,
        shown(row.defect_a, short),
        shown(row.defect_b, short),
        signs(row),
        shown(row.in_cut.both if row.in_cut else None, per_cent),
    )
