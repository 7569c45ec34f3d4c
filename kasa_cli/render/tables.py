"""Tables of a report for the terminal: a summary by module type, the extremes, and the next command."""

import json
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from kasa_cli.errors import printable
from kasa_cli.render import adapters
from kasa_cli.render.choices import choice_tables, choices_by_type, store_tables
from kasa_cli.render.conversions import closing as converted
from kasa_cli.render.conversions import converted_tables
from kasa_cli.render.spectra import diff_tables, summary_tables
from kasa_cli.render.units import big, duration, number, percent
from kasa_cli.report import (
    AdapterReport,
    ConvertPlan,
    ConvertReport,
    DemoReport,
    DiffReport,
    MeasurePlan,
    MergePlan,
    MergeReport,
    PlanReport,
    Report,
    SelectReport,
    Skipped,
    SpectrumReport,
    StoreReport,
    ToMeasure,
    ToTruncate,
    TruncateReport,
    VerifyReport,
    by_module_type,
    module_type,
)

Summary = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, columns, rows of cells."""

WORST = 5
PIPED_WIDTH = 120
"""Width of tables that are not written to a terminal."""


def summary(report: Report) -> list[Summary]:
    """The tables of a report, as text."""
    return SUMMARIES.get(type(report), listed)(report)


def listed(report: Report) -> list[Summary]:
    """The rows of a report that has no summary of its own, field by field."""
    rows = [as_dict(row) for row in report.rows()]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [("result", columns, [[str(row.get(name, "–")) for name in columns] for row in rows])]


def as_dict(row: Any) -> dict[str, Any]:
    """The fields of a row."""
    return dict(row) if isinstance(row, Mapping) else asdict(row)


def as_text(report: Report) -> str:
    """The report for a terminal, in colour where that is supported; code to paste is never wrapped."""
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    with console.capture() as captured:
        for title, columns, rows in summary(report):
            if rows:
                console.print(_table(title, columns, rows))
    return "\n".join([captured.get().rstrip("\n"), "", *_closing(report)]).rstrip("\n")


def by_type(report: TruncateReport) -> Summary:
    """One row for each module type: count, κ, energy, and the share of the truncation that survives rounding."""
    rows = []
    for kind, members in by_module_type(report.tensors).items():
        realised = [row.realised for row in members if row.realised is not None]
        kappas = sorted(row.kappa for row in members)
        rows.append(
            (
                kind,
                str(len(members)),
                " ".join(sorted({f"{row.shape[0]}×{row.shape[1]}" for row in members})),
                f"{number(kappas[0])}–{number(kappas[-1])}",
                percent(statistics.fmean(row.dropped_energy for row in members)),
                number(min(realised)) if realised else "–",
                number(statistics.median(realised)) if realised else "–",
            )
        )
    title = f"{len(report.tensors)} weights truncated by their {report.truncation_rank} smallest components"
    columns = ("module type", "n", "shape", "κ", "energy", "realised", "median")
    return title, columns, rows


def worst(report: TruncateReport) -> Summary:
    """The tensors whose truncation survives rounding least."""
    measured = [row for row in report.tensors if row.realised is not None]
    measured.sort(key=lambda row: row.realised or 0.0)
    rows = [
        (row.name, number(row.realised or 0.0), percent(row.changed_fraction or 0.0))
        for row in measured[:WORST]
    ]
    return "least realised", ("tensor", "realised", "changed"), rows


def skipped(tensors: Iterable[Skipped]) -> Summary:
    """Number of skipped tensors, by reason."""
    items = list(tensors)
    counts = Counter(item.reason for item in items)
    first = {item.reason: item.name for item in reversed(items)}
    rows = [(reason, str(count), first[reason]) for reason, count in counts.most_common()]
    return "left as they are", ("reason", "count", "for example"), rows


def planned(targets: Sequence[ToTruncate]) -> Summary:
    """One row for each module type and shape."""
    groups: dict[tuple[str, str, str, int], int] = Counter(
        (module_type(t.module), f"{t.shape[0]}×{t.shape[1]}", t.dtype, t.dropped) for t in targets
    )
    rows = [(kind, str(n), shape, dtype, f"drop {t}") for (kind, shape, dtype, t), n in groups.items()]
    return (
        f"{len(targets)} weights to truncate",
        ("module type", "count", "shape", "dtype", "operation"),
        rows,
    )


def to_measure(weights: Sequence[ToMeasure]) -> Summary:
    """One row for each module type and shape."""
    groups: dict[tuple[str, str, str], int] = Counter(
        (module_type(weight.module), f"{weight.shape[0]}×{weight.shape[1]}", weight.dtype)
        for weight in weights
    )
    rows = [(kind, str(n), shape, dtype) for (kind, shape, dtype), n in groups.items()]
    return f"{len(weights)} weights to measure", ("module type", "count", "shape", "dtype"), rows


def merged_by_type(report: MergeReport) -> Summary:
    """One row for each module type: number of changed tensors, largest change, largest rounding error."""
    groups = by_module_type(report.tensors)
    rows = [
        (
            kind,
            str(len(members)),
            number(max(row.max_abs_change for row in members)),
            number(max(row.rounding_error for row in members)),
        )
        for kind, members in groups.items()
    ]
    title = f"{len(report.tensors)} tensors changed"
    return title, ("module type", "n", "largest change", "rounding error"), rows


def to_change(report: MergePlan | ConvertPlan) -> Summary:
    """The tensors that would change, by module type."""
    groups = by_module_type(report.tensors)
    rows = [
        (
            kind,
            str(len(members)),
            ", ".join(dict.fromkeys("×".join(map(str, row.shape)) for row in members)),
            ", ".join(sorted({row.dtype for row in members})),
            ", ".join(sorted({kind for row in members for kind in row.kinds})),
        )
        for kind, members in groups.items()
    ]
    if isinstance(report, MergePlan):
        title = f"{len(report.tensors)} tensors would change, {report.totals['tensors_copied']} be copied"
    else:
        base = f" for the {report.on} base" if report.on else ""
        title = f"{len(report.tensors)} updates would become {report.to}{base}"
    return title, ("module type", "n", "shape", "stored as", "adapters"), rows


def merged_adapters(report: MergeReport) -> Summary:
    """Every adapter with the number of its tensors that were used."""
    rows = [
        (
            adapter.path,
            adapter.kind,
            number(adapter.weight),
            f"{adapter.tensors_consumed} of {adapter.tensors_total}",
        )
        for adapter in report.adapters
    ]
    return "adapters", ("adapter", "kind", "weight", "tensors used"), rows


def checked(report: VerifyReport) -> Summary:
    """The checks that passed."""
    rows = [("files", str(report.files)), ("tensors", str(report.tensors))]
    rows += [("bytes hashed", big(report.bytes_hashed))] if report.bytes_hashed else []
    errors = [float(row["tail_error"]) for row in report.compared if row["tail_error"] is not None]
    distances = [float(row["ulps"]) for row in report.compared if row["ulps"] is not None]
    rows += [("recomputed from the base", str(len(report.compared)))] if report.compared else []
    rows += [("furthest from exact, in last places", number(max(distances)))] if distances else []
    rows += [("largest error of the tail / σ max", number(max(errors)))] if errors else []
    return "verified", ("what", "found"), rows


def _or_dash(figure: float | None) -> str:
    return "–" if figure is None else number(figure)


def roundings(report: DemoReport) -> Summary:
    """The share of the truncation that survives in half precision, by rounding."""
    rows = [
        (f"--rounding {row['rounding']}", _or_dash(row["realised_min"]), _or_dash(row["realised_median"]))
        for row in report.rounding
    ]
    return "what bfloat16 leaves of the cut", ("options", "realised", "median"), rows


def _closing(report: Report) -> list[str]:
    """The lines below the tables."""
    return CLOSINGS[type(report)](report) if type(report) in CLOSINGS else []


def _planned(report: PlanReport | MeasurePlan | MergePlan | ConvertPlan) -> list[str]:
    totals = report.totals
    written = f"write {big(totals['bytes_to_write'])}, " if totals["bytes_to_write"] else ""
    return [
        f"would {written}use about {big(totals['memory_bytes'])} of memory "
        f"and take about {duration(totals['seconds'])}; nothing was written"
    ]


def _merged(report: MergeReport) -> list[str]:
    folder = report.output["directory"]
    return [f"wrote {printable(folder)}; next: kasa verify {printable(shlex.quote(folder))} --read-data"]


def _cost(report: SpectrumReport | DiffReport | SelectReport) -> list[str]:
    return [_measured(report.totals)]


def _measured(totals: Mapping[str, Any]) -> str:
    """Number of weights that were measured, and that the store knew."""
    new, known = totals["decompositions"], totals["decompositions_reused"]
    return f"weights measured: {new}; known from the store: {known}"


def _demo_closing(report: DemoReport) -> list[str]:
    lines = [
        f"model: {report.model}",
        "transformers loads the truncated base; cosine of its hidden states with the original's: "
        f"{report.similarity:.4f}",
    ]
    if report.tail_difference is not None:
        lines.append(f"original + tail/ in PEFT differs from it by {number(report.tail_difference)} at most")
    lines.append(
        f"original + tail/ merged by kasa differs from it by {number(report.merge_difference)} at most"
    )
    lines.append(f"spectra: measured {report.spectrum.totals['decompositions']}, then known to every step")
    return [*lines, "", *_next_steps(report.truncated)]


def _next_steps(report: TruncateReport) -> list[str]:
    out, lines = report.output, []
    weak = report.totals["below_min_realised"]
    if weak:
        lines.append(
            f"{weak} of {len(report.tensors)} weights realised less than {report.totals['min_realised']} of the cut: "
            "rounding brought the rest back. Try --rounding preserve or --dtype float32, or use tail/."
        )
    lines += ["", f"wrote {printable(out['directory'])}; next:", ""]
    kind = report.model_class or "AutoModel"
    if {"base", "tail"} & set(out):
        lines += ["  from peft import PeftModel", f"  from transformers import {kind}", ""]
    if "base" in out and "adapter" in out:
        base = f'base = {kind}.from_pretrained({_quoted(out["base"])}, dtype="auto")'
        adapter = f"model = PeftModel.from_pretrained(base, {_quoted(out['adapter'])}, is_trainable=True)"
        lines += _snippet("train the KaSA adapter", base, adapter)
    if "tail" in out:
        base = f'base = {kind}.from_pretrained({_quoted(report.model)}, dtype="auto")'
        tail = f"model = PeftModel.from_pretrained(base, {_quoted(out['tail'])})"
        lines += _snippet("or leave the base alone: the truncation as a LoRA", base, tail)
    return [*lines, f"  kasa verify {printable(shlex.quote(out['directory']))} --read-data"]


def _quoted(path: str) -> str:
    """A path as a Python literal in double quotes."""
    return printable(json.dumps(path, ensure_ascii=False))


def _snippet(title: str, *code: str) -> list[str]:
    return [f"  # {title}", *(f"  {printable(line)}" for line in code), ""]


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(
        title=Text(title, "bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for position, column in enumerate(columns):
        is_number = position > 0 and all(_looks_numeric(row[position]) for row in rows)
        justify: JustifyMethod = "right" if is_number else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=position > 0)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _looks_numeric(cell: str) -> bool:
    return cell == "–" or cell[:1].isdigit()


SUMMARIES: dict[type[Report], Callable[[Any], list[Summary]]] = {
    TruncateReport: lambda report: [by_type(report), worst(report), skipped(report.skipped)],
    PlanReport: lambda report: [planned(report.tensors), skipped(report.skipped)],
    MeasurePlan: lambda report: [to_measure(report.tensors), skipped(report.skipped)],
    SpectrumReport: lambda report: [*summary_tables(report), skipped(report.skipped)],
    DiffReport: lambda report: [*diff_tables(report), skipped(report.skipped)],
    AdapterReport: adapters.adapter_tables,
    SelectReport: lambda report: [*choice_tables(report), skipped(report.skipped)],
    MergePlan: lambda report: [to_change(report)],
    ConvertPlan: lambda report: [to_change(report)],
    MergeReport: lambda report: [merged_by_type(report), merged_adapters(report)],
    ConvertReport: converted_tables,
    StoreReport: store_tables,
    VerifyReport: lambda report: [checked(report)],
    DemoReport: lambda report: [
        choices_by_type(report.selected),
        by_type(report.truncated),
        checked(report.verified),
        roundings(report),
    ],
}
CLOSINGS: dict[type[Report], Callable[[Any], list[str]]] = {
    TruncateReport: lambda report: _next_steps(report),
    PlanReport: _planned,
    MeasurePlan: _planned,
    SpectrumReport: _cost,
    DiffReport: _cost,
    AdapterReport: adapters.closing,
    SelectReport: _cost,
    MergePlan: _planned,
    ConvertPlan: _planned,
    MergeReport: _merged,
    ConvertReport: converted,
    VerifyReport: lambda report: ["all is as the manifest says"],
    DemoReport: _demo_closing,
}
