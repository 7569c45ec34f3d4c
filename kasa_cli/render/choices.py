"""Tables of selections and of the store, for the terminal."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kasa_cli.errors import printable
from kasa_cli.render.spectra import MAX_ROWS, Summary, more
from kasa_cli.render.units import big, number
from kasa_cli.report import CandidateRow, SelectReport, StoreReport, by_module_type

NEXT = 5
EVERYWHERE = "extremes"
"""The fact that the store has for every tensor."""


def choice_tables(report: SelectReport) -> list[Summary]:
    """The selected candidates and the next ones, counts by module type, agreement of criteria, and single experts."""
    tables = [_candidates(report), choices_by_type(report), _comparison(report), _experts(report)]
    return [table for table in tables if table[2]]


def store_tables(report: StoreReport) -> list[Summary]:
    """The facts about each tensor, by the name under which it was first measured, and the totals."""
    rows = [
        (
            str(tensor["name"]),
            cell("shape", tensor["shape"]),
            str(tensor["dtype"]),
            " ".join(fact for fact in tensor["facts"] if fact != EVERYWHERE),
            big(tensor["bytes"]),
            str(tensor["last_used"])[:10],
        )
        for tensor in report.tensors[:MAX_ROWS]
    ]
    left_out = more(len(report.tensors) - len(rows))
    state = {"store prune": "forgotten in"}.get(report.command, "known in")
    title = f"{len(report.tensors)} tensors {state} {printable(report.store)}{left_out}"
    totals = [(key.replace("_", " "), cell(key, value)) for key, value in report.totals.items()]
    return [
        (title, ("measured as", "shape", "dtype", "facts", "size", "last used"), rows),
        ("in all", ("what", "found"), totals),
    ]


def cell(key: str, value: Any) -> str:
    """A value as a cell, formatted by its name and type."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if "bytes" in key:
        return big(value)
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return ("×" if key == "shape" else ", ").join(map(str, value))
    return str(value)


def _or_dash(figure: float | None) -> str:
    return "–" if figure is None else number(figure)


def _candidates(report: SelectReport) -> Summary:
    order = sorted(report.candidates, key=lambda row: row.rank_in_order or math.inf)
    chosen = [row for row in order if row.selected]
    left = [row for row in order if not row.selected]
    shown = sorted(chosen[:MAX_ROWS] + left[:NEXT], key=lambda row: row.rank_in_order or math.inf)
    others = list(dict.fromkeys(name for row in shown for name in row.others or {}))
    has_expected = any(row.expected is not None for row in shown)
    columns = ["module", "", "order", report.criterion, *(["expected"] if has_expected else []), *others]
    rows = [_candidate_cells(row, has_expected, others) for row in shown]
    rule = f", rule {report.rule}" if report.rule else ""
    title = f"{len(chosen)} of {len(order)} chosen by {report.criterion}, {report.prefer} first{rule}"
    budget = f"; rank {report.matched_rank} trains as many parameters" if report.matched_rank else ""
    return f"{title}{budget}{more(len(order) - len(shown))}", columns, rows


def _candidate_cells(row: CandidateRow, has_expected: bool, others: Sequence[str]) -> list[str]:
    position = str(row.rank_in_order) if row.rank_in_order else "–"
    known = row.others or {}
    return [
        row.module,
        "✓" if row.selected else "",
        position,
        _or_dash(row.score),
        *([_or_dash(row.expected)] if has_expected else []),
        *(_or_dash(known.get(name)) for name in others),
    ]


def choices_by_type(report: SelectReport) -> Summary:
    """Number of selected candidates by module type, and their scores."""
    groups = by_module_type(report.candidates)
    rows = [(kind, *_choice_cells(members)) for kind, members in groups.items()]
    columns = ("module type", "chosen", "of", f"{report.criterion} min", "median", "max")
    return "chosen by module type", columns, rows


def _choice_cells(rows: Sequence[CandidateRow]) -> tuple[str, ...]:
    scores = sorted(row.score for row in rows if row.score is not None)
    figures = (scores[0], statistics.median(scores), scores[-1]) if scores else (None, None, None)
    return str(sum(row.selected for row in rows)), str(len(rows)), *map(_or_dash, figures)


def _comparison(report: SelectReport) -> Summary:
    return _records(f"compared with {report.criterion}", report.comparison)


def _experts(report: SelectReport) -> Summary:
    several = [row for row in report.candidates if row.experts]
    rows = [
        (
            row.module,
            "✓" if row.selected else "",
            str(len(scores)),
            number(min(scores)),
            number(statistics.fmean(scores)),
            number(max(scores)),
        )
        for row in several[:MAX_ROWS]
        if (scores := row.experts)
    ]
    title = f"{report.criterion} of single experts{more(len(several) - len(rows))}"
    return title, ("parameter", "", "experts", "min", "mean", "max"), rows


def _records(title: str, records: Sequence[Mapping[str, Any]]) -> Summary:
    """Records as a table with one column for each key."""
    keys = list(dict.fromkeys(key for record in records for key in record))
    rows = [[cell(key, record.get(key)) for key in keys] for record in records]
    return title, [key.replace("_", " ") for key in keys], rows
