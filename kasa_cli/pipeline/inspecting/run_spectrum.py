"""Inspects the spectra of a checkpoint: all singular values of every target, and figures computed from them."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from kasa_cli.checkpoint import Matrix
from kasa_cli.files import write_file
from kasa_cli.pipeline.inspecting.spectrum import best_and_worst, curve, spectrum_row
from kasa_cli.pipeline.measuring import Asked, Bench, ask, measure_plan, open_facts, require_some, store_notes
from kasa_cli.pipeline.opening import ModelLocation, survey
from kasa_cli.pipeline.workers import RunOptions, Silent, Watcher, check_running
from kasa_cli.report import Curve, MeasurePlan, SpectrumReport, SpectrumRow, SpectrumTotals, module_type
from kasa_cli.targets import Candidate, Patterns, candidates, patterns

__all__ = ["ModelLocation", "Patterns", "RunOptions", "patterns", "plan", "spectrum"]

COMMAND = "inspect spectrum"
ANY_SIDE = 1 << 62


@dataclass(frozen=True)
class MeasuredSpectrum:
    """The results for one weight: figures, curve, and the singular values if they are written to a file."""

    row: SpectrumRow
    curve: Curve
    values: Tensor | None = field(repr=False)


def plan(
    where: ModelLocation, patterns: Patterns | None = None, running: RunOptions | None = None
) -> MeasurePlan:
    """The weights that `spectrum` would measure, from headers alone.

    Raises:
        KasaError: the errors that `spectrum` raises before it reads a weight.
    """
    running = running or RunOptions()
    check_running(running)
    _, checkpoint, names = survey(where)
    chosen, skipped = candidates(checkpoint.tensors, names, patterns or Patterns(), "kasa", ANY_SIDE)
    require_some(chosen)
    return measure_plan(COMMAND, where, (checkpoint, names), chosen, skipped, running)


def spectrum(
    where: ModelLocation,
    patterns: Patterns | None = None,
    running: RunOptions | None = None,
    values: Path | None = None,
    watcher: Watcher | None = None,
) -> SpectrumReport:
    """Measure all singular values of the linear weights of the blocks, or of those that the patterns name.

    `values` is a safetensors file for all of them, in float64, under the names of the rows.

    Raises:
        KasaError: a subclass that fits the failure.
    """
    running, watcher = running or RunOptions(), watcher or Silent()
    check_running(running)
    facts = open_facts(running)
    _, checkpoint, names = survey(where, facts.store)
    chosen, skipped = candidates(checkpoint.tensors, names, patterns or Patterns(), "kasa", ANY_SIDE)
    require_some(chosen)
    last_to_first = reversed(chosen)  # a tied weight takes the module of its first name
    modules = {matrix.name: candidate.module for candidate in last_to_first for matrix in candidate.matrices}

    def measure(bench: Bench) -> MeasuredSpectrum:
        module = modules[bench.weight.name]
        row, S = spectrum_row(bench, module, module_type(module))
        return MeasuredSpectrum(row, curve(row.name, S), S.clone() if values else None)

    answers = ask(checkpoint, _all(chosen), measure, facts, running, watcher)
    if values:
        write_file(
            values,
            [
                save(
                    {
                        name: answer.values
                        for name, answer in answers.answers.items()
                        if answer.values is not None
                    }
                )
            ],
        )
    rows = _marked([answer.row for answer in answers.answers.values()])
    return SpectrumReport(
        command=COMMAND,
        model=where.model,
        model_class=names.model_class,
        tensors=rows,
        skipped=(*skipped, *answers.skipped),
        totals=_totals(answers),
        output={"values": str(values)} if values else {},
        notes=(*([names.note] if names.note else []), *store_notes(facts)),
        curves=tuple(answer.curve for answer in answers.answers.values()),
    )


def _all(chosen: tuple[Candidate, ...]) -> list[Matrix]:
    return [matrix for candidate in chosen for matrix in candidate.matrices]


def _totals(answers: Asked[MeasuredSpectrum]) -> SpectrumTotals:
    return {"tensors": len(answers.answers), "unmeasured": len(answers.skipped), **answers.totals}


def _marked(rows: list[SpectrumRow]) -> tuple[SpectrumRow, ...]:
    marks = best_and_worst(rows)
    best, worst = {pair[0] for pair in marks.values()}, {pair[1] for pair in marks.values()}
    return tuple(replace(row, is_best=row.name in best, is_worst=row.name in worst) for row in rows)
