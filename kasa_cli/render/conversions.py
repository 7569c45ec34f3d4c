"""Tables of a conversion for the terminal: ranks and losses by module type."""

import shlex
from collections.abc import Iterable, Sequence

from kasa_cli.errors import printable
from kasa_cli.render.units import number
from kasa_cli.report import ConvertReport, by_module_type

Summary = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""As in `tables`."""

WORST = 5
EXACT = 1e-6
"""A loss below this is roundoff of float32."""


def converted_tables(report: ConvertReport) -> list[Summary]:
    """One row for each module type, and the largest losses, if there are any."""
    groups = by_module_type(report.tensors)
    rows = [
        (
            kind,
            str(len(members)),
            span(row.rank for row in members),
            span(row.exact_rank for row in members),
            number(max(row.norm for row in members)),
            number(max(row.loss for row in members)),
        )
        for kind, members in groups.items()
    ]
    columns = ("module type", "n", "rank", "exact at", "largest update", "largest loss")
    return [(title(report), columns, rows), worst(report)]


def title(report: ConvertReport) -> str:
    """The conversion in one line."""
    base = f" for the {report.on} base" if report.on else ""
    return f"{report.kind} as {report.to} of rank {report.padded_rank}{base}: {len(report.tensors)} weights"


def worst(report: ConvertReport) -> Summary:
    """The updates with the largest losses above roundoff."""
    lossy = sorted((row for row in report.tensors if row.loss > EXACT), key=lambda row: -row.loss)
    rows = [(row.module, str(row.rank), number(row.loss)) for row in lossy[:WORST]]
    return "most lost", ("module", "rank", "loss"), rows


def closing(report: ConvertReport) -> list[str]:
    """The loss over all weights, and the next command."""
    folder = printable(shlex.quote(report.output["directory"]))
    loss = report.totals["loss"]
    lossy = f"loss over all: {number(loss)} of the updates' norm"
    exact = f"exact: {number(loss)} of the updates' norm is what float32 rounds off"
    wrote = f"wrote {printable(report.output['directory'])}; next: kasa verify {folder} --read-data"
    return [exact if loss <= EXACT else lossy, wrote]


def span(values: Iterable[int | None]) -> str:
    """The smallest and the largest of some ranks.

    >>> span([4, 4]), span([2, 8]), span([None])
    ('4', '2–8', '–')
    """
    known = sorted(value for value in values if value is not None)
    if not known:
        return "–"
    return str(known[0]) if known[0] == known[-1] else f"{known[0]}–{known[-1]}"
