"""A spectrum report as one self-contained HTML page.

Names in a report are untrusted: they are escaped for HTML and for JSON. The content security policy of the page
allows only the two scripts whose hashes it lists, and no request. Vega evaluates expressions with its own interpreter
(`ast`), so that the policy does not have to allow eval.
"""

import base64
import hashlib
import html as markup
import json
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any

from kasa_cli import __version__
from kasa_cli.errors import printable
from kasa_cli.render.charts import INK, THEMES, heatmap, positions, spectra, vega_lite_version
from kasa_cli.render.grid import Grid, Quantity, value
from kasa_cli.render.spectra import by_kappa, decades_drawn, levels
from kasa_cli.render.units import number
from kasa_cli.report import SpectrumReport, SpectrumRow

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1", "#8a939d")
"""The palette of Okabe and Ito: safe for colour-blind readers, on white and on black."""

FEW_LAYERS = 12
"""Up to so many layers the two charts stand side by side on a wide screen."""


def html(report: SpectrumReport) -> str:
    """The page: heat map, spectra, table, search, light and dark."""
    grid = Grid(report)
    bundle, script = _bundle(), _asset("page.js")
    return Template(_asset("page.html")).substitute(
        policy=_policy([bundle, script]),
        css=_asset("page.css"),
        bundle=bundle,
        script=script,
        data=embedded(_data(grid)),
        **_header(grid),
        **_table(grid),
        **_footer(grid),
    )


def embedded(data: Any) -> str:
    """JSON that is safe inside an HTML script element.

    >>> embedded(["</script>", "<!--", "a\\u2028b"])
    '["\\\\u003c/script\\\\u003e","\\\\u003c!--","a\\\\u2028b"]'
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _escaped(text: str) -> str:
    return markup.escape(printable(text))


def _asset(name: str) -> str:
    return (files("kasa_cli.render") / "assets" / name).read_text(encoding="utf-8")


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed of the version that the charts are written for."""
    import vl_convert

    code = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=vega_lite_version())
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _policy(scripts: Iterable[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def _header(grid: Grid) -> dict[str, str]:
    report = grid.report
    facts = [
        report.model_class or "",
        f"{len(grid.points)} weights",
        f"{sum(map(str.isdigit, grid.layers))} layers × {len(grid.types)} module types",
        f"{len(report.skipped)} tensors left out",
        f"kasa {__version__}",
    ]
    return {
        "version": __version__,
        "title": _escaped(f"Spectrum of {grid.model}"),
        "model": _escaped(grid.model),
        "facts": _escaped(" · ".join(fact for fact in facts if fact)),
        "notes": "".join(f'<p class="note">{_escaped(note)}</p>' for note in report.notes),
        "layout": "few" if len(grid.layers) <= FEW_LAYERS else "many",
        "options": "".join(f'<option value="{q.key}">{_escaped(q.title)}</option>' for q in grid.quantities),
        "count": f"{len(grid.points)} of {len(grid.points)}",
    }


def _table(grid: Grid) -> dict[str, str]:
    decades = decades_drawn(grid.report.tensors)
    lines = (_line(n, row, grid, decades) for n, row in enumerate(grid.report.tensors))
    heads = [("layer", "layer", False), ("kind", "module type", True), ("shape", "shape", True)]
    figures = [(q.key, q.symbol, False) for q in grid.quantities]
    head = ["<th>draw</th>", *(_head(*head) for head in heads), '<th class="text">spectrum</th>']
    return {"head": "".join([*head, *(_head(*figure) for figure in figures)]), "rows": "\n".join(lines)}


def _head(key: str, label: str, is_text: bool) -> str:
    kind = ' class="text"' if is_text else ""
    return f'<th scope="col" data-key="{key}"{kind}><button type="button">{_escaped(label)}</button></th>'


def _line(number_: int, row: SpectrumRow, grid: Grid, decades: float) -> str:
    kind, layer = grid.places[number_]
    name = _escaped(row.name)
    pick = (
        f'<td><button type="button" class="pick" value="{number_}" aria-pressed="false" '
        f'aria-label="draw {name}"><i></i></button></td>'
    )
    named = (
        f'<td>{_escaped(layer)}</td><td class="text" title="{name}">{_escaped(kind)}</td>'
        f'<td class="text">{row.shape[0]} × {row.shape[1]}</td><td>{_spark(levels(row.sketch, decades))}</td>'
    )
    figures = "".join(f"<td>{_figure(row, quantity)}</td>" for quantity in grid.quantities)
    return f"<tr>{pick}{named}{figures}</tr>"


def _figure(row: SpectrumRow, quantity: Quantity) -> str:
    figure = value(row, quantity.key)
    text = "–" if figure is None else f"{figure:,}" if isinstance(figure, int) else number(figure)
    mark = "▲" if row.is_worst else "▼" if row.is_best else ""
    return text + (f'<b class="mark">{mark}</b>' if quantity.key == "kappa" else "")


def _spark(heights: Sequence[float | None]) -> str:
    """A sparkline of 84 × 20 pixels; zeros are at the bottom."""
    step = 80 / max(1, len(heights) - 1)
    points = " ".join(f"{2 + n * step:.0f},{18 - 16 * (h or 0):.1f}" for n, h in enumerate(heights))
    return f'<svg class="spark" viewBox="0 0 84 20" aria-hidden="true"><polyline points="{points}"/></svg>'


def _footer(grid: Grid) -> dict[str, str]:
    rows = grid.report.skipped
    skipped = "".join(f"<li>{_escaped(row.name)}: {_escaped(row.reason)}</li>" for row in rows)
    summary = f"<summary>{len(rows)} tensors left out</summary>"
    definitions = (
        f"<dt>{_escaped(q.title)}</dt><dd><code>{_escaped(q.formula)}</code> – {_escaped(q.meaning)}</dd>"
        for q in grid.quantities
    )
    return {
        "definitions": "".join(definitions),
        "skipped": f"<details>{summary}<ul>{skipped}</ul></details>" if skipped else "",
    }


def _data(grid: Grid) -> dict[str, Any]:
    import altair as alt

    color = alt.Color("colour:N").scale(None)
    return {
        "weights": grid.points,
        "heat": {quantity.key: heatmap(grid, quantity).to_dict() for quantity in grid.quantities},
        "wide": _layout(grid, is_upright=False),
        "narrow": _layout(grid, is_upright=True),
        "meanings": {
            quantity.key: f"{quantity.formula} – {quantity.meaning}" for quantity in grid.quantities
        },
        "spectra": spectra(color).to_dict(),
        "themes": THEMES,
        "inks": INK,
        "colours": COLOURS,
        "start": start(grid.report.tensors),
        **_curves(grid),
    }


def start(rows: Sequence[SpectrumRow]) -> list[int]:
    """The weights that are drawn initially: the worst and the best by κ."""
    order = sorted(range(len(rows)), key=lambda n: by_kappa(rows[n]))
    return list(dict.fromkeys([order[-1], order[0]])) if order else []


def _layout(grid: Grid, is_upright: bool) -> dict[str, Any]:
    """Axes and sizes of the heat map: a cell is large enough to hit, and no larger than needed."""
    across, down = (grid.types, grid.layers) if is_upright else (grid.layers, grid.types)
    return {
        "encoding": {name: axis.to_dict() for name, axis in positions(grid, is_upright).items()},
        "height": len(down) * (30 if len(grid.layers) <= FEW_LAYERS else 24 if not is_upright else 20),
        "least": f"{len(across) * 12 + (60 if is_upright else 150)}px",
        "most": "none" if is_upright else f"{len(across) * 96 + 180}px",
    }


def _curves(grid: Grid) -> dict[str, Any]:
    """Curves by the number of the weight: the list of indices, the values, the edge.

    Most weights share their indices.
    """
    by_name = {curve.name: curve for curve in grid.report.curves}
    indices: dict[tuple[int, ...], int] = {}
    curves: dict[int, list[Any]] = {}
    for n, row in enumerate(grid.report.tensors):
        if row.name in by_name:
            curve = by_name[row.name]
            which = indices.setdefault(curve.index, len(indices))
            curves[n] = [which, [float(f"{v:.5g}") for v in curve.value], float(f"{row.mp_edge:.7g}")]
    return {"indices": list(indices), "curves": curves}
