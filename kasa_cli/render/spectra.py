"""Tables of spectra for the terminal: rows with a drawing of the spectrum, and the extremes."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from kasa_cli.errors import printable
from kasa_cli.render.grid import Grid, placed, value
from kasa_cli.render.units import number, percent
from kasa_cli.report import DiffReport, DiffRow, SpectrumReport, SpectrumRow

Summary = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, columns, rows of cells."""

BLOCKS = "▁▂▃▄▅▆▇█"
ZERO = "·"
MOST_DECADES = 4.0
"""Largest number of decades that a drawing covers."""

WIDTH = 12
COLUMNS = ("spectrum", "σ max", "σ min", "κ", "", "stable", "eff.", "> MP", "α")
KEYS = ("sigma_max", "sigma_min", "kappa", "stable_rank", "effective_rank", "mp_above", "power_law_alpha")
PICKS: dict[str, Callable[[int], int]] = {
    "least": lambda n: 0,
    "median": lambda n: n // 2,
    "most": lambda n: n - 1,
}
MAX_ROWS = 60
EXTREMES = 5
MOST_CHANGED = 15


def summary_tables(report: SpectrumReport) -> list[Summary]:
    """One row for each weight, by module type; above `MAX_ROWS` weights three rows for each type, and the
    extremes."""
    grid = Grid(report)
    return [by_weight(grid)] if len(report.tensors) <= MAX_ROWS else [by_type(grid), extremes(grid)]


def by_weight(grid: Grid) -> Summary:
    """One row for each weight, in the order of the model; the extremes of κ in a type are marked."""
    decades = decades_drawn(grid.report.tensors)
    rows: list[Sequence[str]] = []
    for kind, members in _members(grid).items():
        rows.append(_heading(kind, [row for _, row in members], len(COLUMNS)))
        rows += [(f"  {layer}", *_weight_cells(row, decades)) for layer, row in members]
    title = f"{len(grid.report.tensors)} spectra{_scale(decades)}; κ: ▲ worst, ▼ best of its type"
    return title, *aligned(("module", *COLUMNS), rows)


def by_type(grid: Grid) -> Summary:
    """Minimum, median and maximum of each column by module type; the drawings are of the weights with such a κ."""
    decades = decades_drawn(grid.report.tensors)
    columns = [column for column in COLUMNS if column]
    rows: list[Sequence[str]] = []
    for kind, members in _members(grid).items():
        order = sorted((row for _, row in members), key=by_kappa)
        rows.append(_heading(f"{kind} ({len(order)})", order, len(columns)))
        rows += [(f"  {name}", *_type_cells(order, pick, decades)) for name, pick in PICKS.items()]
    title = f"{len(grid.report.tensors)} spectra by module type{_scale(decades)}"
    return title, *aligned(("module", *columns), rows)


def extremes(grid: Grid) -> Summary:
    """The weights with the largest and the smallest κ."""
    decades = decades_drawn(grid.report.tensors)
    order = sorted(zip(grid.report.tensors, grid.places, strict=True), key=lambda pair: -by_kappa(pair[0]))
    marked = [("▲ worst", pair) for pair in order[:EXTREMES]]
    marked += [("▼ best", pair) for pair in order[-EXTREMES:]]
    rows = [
        (
            kind,
            layer,
            mark,
            sketch(row.sketch, decades),
            *map(number, (row.sigma_max, row.sigma_min, row.kappa)),
        )
        for mark, (row, (kind, layer)) in marked
    ]
    return "largest and smallest κ", ("type", "layer", "κ is", *COLUMNS[:4]), rows


def by_kappa(row: SpectrumRow) -> float:
    """What weights are ordered by; one of which κ is not known comes first."""
    return value(row, "kappa") or 0.0


def decades_drawn(rows: Iterable[SpectrumRow]) -> float:
    """How far below its largest value a drawing reaches, the same for all rows: what the widest of them needs.

    The last value is not asked: of a square matrix it is next to nothing, and would flatten all others.
    """
    pairs = ((row.sketch[0], [s for s in row.sketch[1:-1] if s > 0]) for row in rows if row.sketch)
    return min(MOST_DECADES, max([0.5, *(math.log10(first / rest[-1]) for first, rest in pairs if rest)]))


def levels(values: Sequence[float], decades: float) -> list[float | None]:
    """Heights from 0 to 1 on a log scale below the largest value; None for zeros.

    >>> levels([100.0, 10.0, 1.0, 0.0], 2.0)
    [1.0, 0.5, 0.0, None]
    """
    top = max(values, default=0.0)
    return [max(0.0, 1 + math.log10(v / top) / decades) if v > 0 else None for v in values]


def sketch(values: Sequence[float], decades: float) -> str:
    """A spectrum in block characters; zeros are dots.

    >>> sketch([100.0, 30.0, 10.0, 1.0, 0.0], 2.0)
    '█▆▅▁·'
    """
    step = max(1.0, (len(values) - 1) / (WIDTH - 1)) if values else 1.0
    count = min(len(values), WIDTH)
    picked = [values[round(n * step)] for n in range(count)]
    heights = levels(picked, decades)
    return "".join(ZERO if h is None else BLOCKS[round(h * (len(BLOCKS) - 1))] for h in heights)


def diff_tables(report: DiffReport) -> list[Summary]:
    """What changed by module type, and the weights that changed most."""
    return [_changes_by_type(report), _changes(report)]


def _members(grid: Grid) -> dict[str, list[tuple[str, SpectrumRow]]]:
    groups: dict[str, list[tuple[str, SpectrumRow]]] = {}
    for row, (kind, layer) in zip(grid.report.tensors, grid.places, strict=True):
        groups.setdefault(kind, []).append((layer, row))
    return groups


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The table with right-aligned cells, except for the name and the drawing."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [
        [
            cell if n < 2 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        for cells in (columns, *rows)
    ]
    return lines[0], lines[1:]


def _scale(decades: float) -> str:
    return f", log scale over {decades:.1f} decades"


def _heading(kind: str, rows: Sequence[SpectrumRow], num_columns: int) -> tuple[str, ...]:
    """A row with the module type, and its shape in the column of the drawings."""
    shapes = list(dict.fromkeys(f"{row.shape[0]}×{row.shape[1]}" for row in rows))
    shape = shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes"
    return (kind, shape, *[""] * (num_columns - 1))


def _weight_cells(row: SpectrumRow, decades: float) -> tuple[str, ...]:
    mark = "▲" if row.is_worst else "▼" if row.is_best else ""
    shown = [_shown(key, value(row, key)) for key in KEYS]
    return (sketch(row.sketch, decades), *shown[:3], mark, *shown[3:])


def _type_cells(order: Sequence[SpectrumRow], pick: Callable[[int], int], decades: float) -> tuple[str, ...]:
    drawn = sketch(order[pick(len(order))].sketch, decades)
    figures = [sorted(v for row in order if (v := value(row, key)) is not None) for key in KEYS]
    picked = (known[pick(len(known))] if known else None for known in figures)
    return drawn, *map(_shown, KEYS, picked)


def _shown(key: str, figure: float | None) -> str:
    if figure is None:
        return "–"
    if isinstance(figure, int):
        return f"{figure:,}"
    return f"{figure:.2f}" if key == "power_law_alpha" else number(figure)


def more(count: int) -> str:
    """The part of a title that counts the rows left out."""
    return f"; {count} more not shown" if count > 0 else ""


def _pair(figures: tuple[float, float]) -> str:
    """Before and after.

    >>> _pair((1.0, 2.5))
    '1.000 → 2.500'
    """
    return " → ".join(map(number, figures))


def _changes_by_type(report: DiffReport) -> Summary:
    groups: dict[str, list[DiffRow]] = {}
    for (kind, _), row in zip(placed(report.tensors), report.tensors, strict=True):
        groups.setdefault(kind, []).append(row)
    rows = [(kind, str(len(members)), *_change_cells(members)) for kind, members in groups.items()]
    columns = ("type", "n", "distance", "greatest", "Δ spectrum", "top angle", "bottom", "intruders")
    identical = f"; identical: {len(report.identical)}" if report.identical else ""
    agree = report.rank_correlation
    order = f"; rank correlation of κ {agree:.3f}" if agree is not None else ""
    first, second = map(printable, report.models)
    return (
        f"{first} → {second}: {len(report.tensors)} weights differ, medians by type{identical}{order}",
        columns,
        rows,
    )


def _change_cells(rows: Sequence[DiffRow]) -> tuple[str, ...]:
    def median(figure: Callable[[DiffRow], float]) -> float:
        return statistics.median(map(figure, rows))

    return (
        percent(median(lambda row: row.relative_distance)),
        percent(max(row.relative_distance for row in rows)),
        number(median(lambda row: row.spectrum_change)),
        f"{median(lambda row: row.top_angle):.1f}°",
        f"{median(lambda row: row.bottom_angle):.1f}°",
        str(sum(row.intruders for row in rows)),
    )


def _changes(report: DiffReport) -> Summary:
    order = sorted(
        zip(placed(report.tensors), report.tensors, strict=True), key=lambda pair: -pair[1].relative_distance
    )
    rows = [
        (
            kind,
            layer,
            percent(row.relative_distance),
            _pair(row.sigma_max),
            _pair(row.kappa),
            f"{row.top_angle:.1f}°",
            f"{row.intruders} of {row.subspace_rank}",
        )
        for (kind, layer), row in order[:MOST_CHANGED]
    ]
    columns = ("type", "layer", "distance", "σ max", "κ", "top angle", "intruders")
    return f"changed most{more(len(order) - len(rows))}", columns, rows
