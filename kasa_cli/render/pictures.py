"""A spectrum report as PNG pictures, from the charts of the page."""

import json
from typing import Any

from kasa_cli.render.charts import THEMES, curve_records, heatmap, spectra_together, vega_lite_version
from kasa_cli.render.grid import Grid
from kasa_cli.report import SpectrumReport

SCALE = 2.0
PANEL = (260, 190)
MAX_PANELS = 24
"""Largest number of panels: with more module types (one for each expert, say) a picture is unreadable."""


def pictures(report: SpectrumReport) -> dict[str, bytes]:
    """PNG files by name: heat maps of κ and stable rank, and the spectra by module type."""
    grid = Grid(report)
    drawn = {"heatmap.png": _heat(grid, "kappa"), "heatmap-stable-rank.png": _heat(grid, "stable_rank")}
    return drawn | ({"spectra.png": _spectra(grid)} if report.curves else {})


def _png(spec: dict[str, Any], title: str, subtitle: str) -> bytes:
    import vl_convert

    spec["title"] = {"text": title, "subtitle": subtitle, "anchor": "start", "offset": 14}
    spec["padding"] = 16
    config = THEMES["light"] | {"background": "white"}
    return vl_convert.vegalite_to_png(
        json.dumps(spec), vl_version=vega_lite_version(), scale=SCALE, config=config, allowed_base_urls=[]
    )


def _heat(grid: Grid, key: str) -> bytes:
    quantity = next(quantity for quantity in grid.quantities if quantity.key == key)
    chart = heatmap(grid, quantity).properties(
        width=_cell_width(grid) * len(grid.layers), height=24 * len(grid.types)
    )
    spec = chart.to_dict() | {"datasets": {"weights": grid.points}}
    return _png(spec, f"{quantity.title} by layer and module type", _subtitle(grid))


def _cell_width(grid: Grid) -> int:
    return max(14, min(64, 1000 // max(1, len(grid.layers))))


def _subtitle(grid: Grid) -> str:
    return f"{grid.model} · {len(grid.points)} weights"


def _spectra(grid: Grid) -> bytes:
    """Small multiples: a panel for each module type, a line for each layer, from dark (first) to bright (last)."""
    import altair as alt

    color = (
        alt.Color("depth:Q")
        .scale(scheme="viridis")
        .title("layer")
        .legend(type="gradient", format="d", tickMinStep=1)
    )
    chart = spectra_together(color).properties(width=PANEL[0], height=PANEL[1])
    panels = chart.facet(
        facet=alt.Facet("kind:N", title=None, sort=grid.types[:MAX_PANELS]),
        columns=3,
        bounds="flush",
        spacing={"row": 48, "column": 28},
    )
    spec = panels.to_dict() | {"datasets": {"curves": _records(grid)}}
    more = len(grid.types) - MAX_PANELS
    left_out = f" · {more} more module types not drawn" if more > 0 else ""
    return _png(
        spec,
        "Singular values",
        f"{grid.model} · dashed: median Marchenko–Pastur edge, shaded: its range over layers{left_out}",
    )


def _records(grid: Grid) -> list[dict[str, Any]]:
    curves = {curve.name: curve for curve in grid.report.curves}
    shown = set(grid.types[:MAX_PANELS])
    records: list[dict[str, Any]] = []
    for row, (kind, layer) in zip(grid.report.tensors, grid.places, strict=True):
        if row.name in curves and kind in shown:
            depth = int(layer) if layer.isdigit() else None
            records += curve_records(curves[row.name], row, kind=kind, depth=depth)
    return records
