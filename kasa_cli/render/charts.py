"""A spectrum report as Vega-Lite charts: one description for the page and for the pictures."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kasa_cli.render.grid import INFINITE, Grid, Quantity, decades, spans_decades, special_values, value
from kasa_cli.report import Curve, SpectrumRow

if TYPE_CHECKING:
    import altair as alt

MAX_LABELLED = 12
"""Up to so many layers the cells of a heat map show their figures."""

SHADE = 0.46
"""Position on viridis from which black text is easier to read than white."""

SPECIAL = {INFINITE: "#e6439a", "0": "#f08a3c", "none": "#9aa0a6"}
"""Colours of values outside the colour scale; none of them is in viridis."""

SPECIAL_LEGEND = (
    "{'∞': '∞ infinite: singular', '0': '0, not on a log scale', 'none': '– not measured'}[datum.label]"
)


BRIEF = (
    "datum.value != 0 && (abs(datum.value) >= 1e5 || abs(datum.value) < 1e-3) ? "
    "replace(format(datum.value, '.2~e'), '+', '') : format(datum.value, ',~r')"
)
"""Labels of an axis: plain figures where they are short."""

INK = {"light": "#1b1f24", "dark": "#e8eaed"}
_FONT = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"


def vega_lite_version() -> str:
    """The Vega-Lite that the charts are written for, as vl-convert calls it."""
    import altair as alt

    return ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])


def theme(ink: str, muted: str, line: str) -> dict[str, Any]:
    """A Vega-Lite configuration in three colours, on no background."""
    return {
        "background": None,
        "font": _FONT,
        "view": {"stroke": None},
        "axis": {
            "labelColor": muted,
            "titleColor": muted,
            "titleFontWeight": "normal",
            "titleFontSize": 12,
            "labelFontSize": 11,
            "domainColor": line,
            "tickColor": line,
            "gridColor": line,
            "gridOpacity": 0.6,
            "labelLimit": 170,
        },
        "legend": {
            "labelColor": muted,
            "titleColor": ink,
            "titleFontWeight": "normal",
            "titleFontSize": 12,
            "labelFontSize": 11,
            "labelLimit": 200,
            "titleLimit": 320,
        },
        "header": {"labelColor": ink, "labelFontSize": 12, "labelFontWeight": "bold", "titleColor": ink},
        "title": {"color": ink, "subtitleColor": muted, "fontSize": 16, "subtitleFontSize": 12},
    }


THEMES = {
    "light": theme(INK["light"], "#57606a", "#d5d9de"),
    "dark": theme(INK["dark"], "#a2abb5", "#3a414a"),
}


def heatmap(grid: Grid, quantity: Quantity) -> "alt.LayerChart":
    """Layer × module type, coloured by a quantity; values outside the scale have their own colours and signs.

    The data set is called `weights`. The signals `chosen` (ids) and `query` (part of a name, in small letters)
    outline and dim cells.
    """
    import altair as alt

    values = [value(row, quantity.key) for row in grid.report.tensors]
    known = [v for v in values if v is not None and math.isfinite(v)]
    is_log = spans_decades(known)
    fits = f"isNumber(datum.{quantity.key})" + (f" && datum.{quantity.key} > 0" if is_log else "")
    base = alt.Chart(alt.NamedData("weights")).transform_calculate(**_calculated(quantity.key))
    layers: list[alt.Chart] = [_cells(base.transform_filter(fits), quantity, known, is_log)]
    special = special_values(values, is_log)
    if special:
        layers += _special_cells(base.transform_filter(f"!({fits})"), special)
    if len(grid.layers) <= MAX_LABELLED:
        layers.append(_figures(base.transform_filter(fits), known, is_log))
    drawn: alt.LayerChart = (
        alt.LayerChart(layer=layers)
        .encode(**positions(grid), tooltip=_tooltip(quantity))
        .add_params(
            alt.param(name="chosen", value=[]),
            alt.param(name="query", value=""),
            alt.param(name="ink", value=INK["light"]),
        )
        .resolve_scale(color="independent")
    )
    return drawn


def positions(grid: Grid, is_upright: bool = False) -> Mapping[str, Any]:
    """The two axes of a heat map: layers across, or down where the screen is narrow."""
    import altair as alt

    turn: Any = (
        {"labelAngle": -50, "orient": "top", "labelOverlap": False} if is_upright else {"labelAngle": 0}
    )
    layer = ("layer:O", grid.layers, "layer")
    kind = ("kind:O", grid.types, None)
    (x, across, x_title), (y, down, y_title) = (kind, layer) if is_upright else (layer, kind)
    plain: Any = {"ticks": False, "domain": False, "labelOverlap": True, "labelSeparation": 4}
    return {
        "x": alt.X(x).sort(None).title(x_title).axis(**(plain | turn)).scale(domain=across, padding=0.06),
        "y": alt.Y(y).sort(None).title(y_title).axis(**plain).scale(domain=down, padding=0.06),
    }


def spectra(color: Any) -> "alt.LayerChart":
    """Singular values by index on log axes, each weight's Marchenko–Pastur edge dashed; the data: `curves`.

    Invisible points on the lines tell their values.
    """
    import altair as alt

    weight = alt.Tooltip("name:N", title="weight")
    index, size = (alt.Tooltip("index:Q"), alt.Tooltip("value:Q", title="singular value", format=".6~g"))
    edge = alt.Tooltip("edge:Q", title="Marchenko–Pastur edge", format=".6~g")
    curves = alt.Chart(alt.NamedData("curves")).encode(color=color, detail="id:N")
    rule = curves.transform_filter("isValid(datum.edge)").mark_rule(strokeDash=[5, 4], strokeWidth=1.5)
    values = _on_log_axes(curves)
    return alt.LayerChart(
        layer=[
            rule.encode(y="edge:Q", tooltip=[weight, edge]),
            values.mark_line(strokeWidth=2),
            values.mark_point(size=90, opacity=0, filled=True).encode(tooltip=[weight, index, size]),
        ]
    )


def spectra_together(color: Any) -> "alt.LayerChart":
    """The chart of `spectra` for many weights at once: the range of their edges shaded, its median dashed."""
    import altair as alt

    base = alt.Chart(alt.NamedData("curves"))
    edges = base.transform_filter("isValid(datum.edge)")
    return alt.LayerChart(
        layer=[
            edges.mark_rect(color="#8a939d", opacity=0.2).encode(y="min(edge):Q", y2="max(edge)"),
            _on_log_axes(base.encode(color=color, detail="id:N")).mark_line(strokeWidth=1.2),
            edges.mark_rule(color=INK["light"], strokeDash=[5, 4], strokeWidth=1.2).encode(
                y="median(edge):Q"
            ),
        ]
    )


def _on_log_axes(curves: "alt.Chart") -> "alt.Chart":
    import altair as alt

    tens: Any = {"values": [10**n for n in range(7)], "labelExpr": BRIEF}
    x = alt.X("index:Q").scale(type="log", nice=False).title("index, from 1").axis(**tens)
    y = (
        alt.Y("value:Q")
        .scale(type="log", nice=False)
        .title("singular value")
        .axis(labelExpr=BRIEF, tickCount=3)
    )
    drawn: alt.Chart = curves.transform_filter("isValid(datum.value)").encode(x=x, y=y)
    return drawn


def curve_records(curve: Curve, row: SpectrumRow, **marks: Any) -> list[dict[str, Any]]:
    """The data of one curve and its edge, without zeros, which a log axis cannot show."""
    mark = {"id": row.name, "name": row.name, **marks}
    drawn = [{**mark, "index": k, "value": v} for k, v in zip(curve.index, curve.value, strict=True) if v > 0]
    return [*drawn, {**mark, "edge": row.mp_edge}] if row.mp_edge > 0 else drawn


def _calculated(key: str) -> dict[str, str]:
    return {
        "figure": f"datum.{key}",
        "sign": f"datum.{key} === null ? 'none' : '' + datum.{key}",
        "said": f"isNumber(datum.{key}) ? format(datum.{key}, ',.6~g') : "
        f"datum.{key} === null ? 'not measured' : datum.{key}",
    }


def _tooltip(quantity: Quantity) -> "list[alt.Tooltip]":
    import altair as alt

    named = [("name", "weight"), ("shape", "shape"), ("said", quantity.symbol)]
    return [alt.Tooltip(f"{field}:N", title=title) for field, title in named]


def _outlined(base: "alt.Chart") -> "alt.Chart":
    """A rectangle for each cell, outlined when selected, dimmed when the query does not match."""
    import altair as alt

    is_chosen, is_match = "indexof(chosen, datum.id) >= 0", "indexof(lower(datum.name), query) >= 0"
    cells: alt.Chart = base.mark_rect(cursor="pointer", cornerRadius=1).encode(
        stroke=alt.condition(is_chosen, alt.value(alt.ExprRef("ink")), alt.value("transparent")),
        strokeWidth=alt.condition(is_chosen, alt.value(2.5), alt.value(0)),
        opacity=alt.condition(is_match, alt.value(1), alt.value(0.15)),
    )
    return cells


def _cells(base: "alt.Chart", quantity: Quantity, known: Sequence[float], is_log: bool) -> "alt.Chart":
    import altair as alt

    title = f"{quantity.title}, log scale" if is_log else quantity.title
    ticks: Any = {"values": decades(known)} if is_log else {"tickCount": 4}
    bar = alt.Legend(
        title=title, orient="top", gradientLength=260, gradientThickness=10, labelExpr=BRIEF, **ticks
    )
    scale = alt.Scale(type="log" if is_log else "linear", scheme="viridis")
    return _outlined(base).encode(color=alt.Color("figure:Q", scale=scale, legend=bar))


def _special_cells(base: "alt.Chart", special: list[str]) -> "list[alt.Chart]":
    import altair as alt

    scale = alt.Scale(domain=special, range=[SPECIAL[sign] for sign in special])
    legend = alt.Legend(
        title=None, orient="bottom", direction="vertical", symbolType="square", labelExpr=SPECIAL_LEGEND
    )
    glyph = base.transform_calculate(glyph="datum.sign === 'none' ? '–' : datum.sign")
    return [
        _outlined(base).encode(color=alt.Color("sign:N", scale=scale, legend=legend)),
        glyph.mark_text(color="#1b1f24", fontSize=11, cursor="pointer").encode(text="glyph:N"),
    ]


def _figures(base: "alt.Chart", known: Sequence[float], is_log: bool) -> "alt.Chart":
    """The figures in the cells: white on the dark half of the scale, black on the other."""
    import altair as alt

    positive = [v for v in known if v > 0 or not is_log] or [1.0]
    low, high = min(positive), max(positive)
    middle = low * (high / low) ** SHADE if is_log else low + SHADE * (high - low)
    short = (
        "datum.figure != 0 && (abs(datum.figure) >= 1e5 || abs(datum.figure) < 0.01) ? "
        "replace(format(datum.figure, '.1e'), '+', '') : abs(datum.figure) >= 100 ? "
        "format(datum.figure, ',.0f') : format(datum.figure, '.3~r')"
    )
    shade = alt.condition(f"datum.figure < {middle!r}", alt.value("white"), alt.value("#1b1f24"))
    marks = base.transform_calculate(short=short).mark_text(fontSize=11, cursor="pointer")
    written: alt.Chart = marks.encode(text="short:N", color=shade)
    return written
