"""The formats of a report: table, JSON, CSV, Markdown and HTML. Everything on stdout is made here."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from html import escape
from typing import Any

from kasa_cli.errors import printable
from kasa_cli.render import tables
from kasa_cli.render.tables import as_dict
from kasa_cli.report import Report


def as_json(report: Report) -> str:
    """One JSON object, always valid JSON."""
    hidden = {field.name for field in fields(report) if not field.metadata.get("json", True)}
    content = {name: value for name, value in asdict(report).items() if name not in hidden}
    return json.dumps(finite(content), indent=2, allow_nan=False)


def as_csv(report: Report) -> str:
    """A header and one line for each row."""
    rows = [_flat(finite(as_dict(row))) for row in report.rows()]
    out = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def as_markdown(report: Report) -> str:
    """The summary as a Markdown table."""
    return "\n\n".join(_markdown_table(*table) for table in tables.summary(report) if table[2])


def as_html(report: Report) -> str:
    """The summary as HTML tables, for a notebook."""
    return "".join(_html_table(*table) for table in tables.summary(report) if table[2])


def finite(value: Any) -> Any:
    """The same data with null for NaN and infinity, and a field beside it that names the value.

    >>> finite({"kappa": math.inf, "experts": (1.0, math.inf)})
    {'kappa': None, 'kappa_is': 'inf', 'experts': [1.0, None], 'experts_is': [None, 'inf']}
    """
    if isinstance(value, dict):
        fields_: dict[str, Any] = {}
        for key, item in value.items():
            fields_[key] = finite(item)
            if is_odd(item):
                fields_[f"{key}_is"] = str(item)
            elif isinstance(item, list | tuple) and any(map(is_odd, item)):
                fields_[f"{key}_is"] = [str(part) if is_odd(part) else None for part in item]
        return fields_
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if is_odd(value) else value


def is_odd(value: Any) -> bool:
    """Whether a float is NaN or infinite, which JSON cannot express."""
    return isinstance(value, float) and not math.isfinite(value)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row with one cell for each field; the items of a mapping get cells of their own.

    >>> _flat({"energy": {"8": 0.5}, "shape": [64, 48]})
    {'energy_8': 0.5, 'shape': '64x48'}
    """
    cells: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            cells |= {f"{key}_{name}": item for name, item in value.items()}
        else:
            cells[key] = _cell(key, value)
    return cells


def _cell(key: str, value: Any) -> Any:
    """A cell: a shape as 64x48, any other list joined by spaces."""
    return ("x" if key == "shape" else " ").join(map(str, value)) if isinstance(value, list) else value


def _markdown_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"**{title}**", "", _line(columns), _line(["---"] * len(columns)), *map(_line, rows)]
    return "\n".join(lines)


def _html_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [_html_row("th", columns), *(_html_row("td", row) for row in rows)]
    return f"<table><caption>{escape(printable(title))}</caption>{''.join(lines)}</table>"


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(printable(cell))}</{tag}>' for cell in cells)}</tr>"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


FORMATS: dict[str, Callable[[Report], str]] = {
    "table": tables.as_text,
    "json": as_json,
    "csv": as_csv,
    "md": as_markdown,
}
