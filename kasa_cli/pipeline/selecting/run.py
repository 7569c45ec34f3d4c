"""Selects targets: ranks the candidates by one figure of their spectra, and exports the best."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kasa_cli.checkpoint import Checkpoint
from kasa_cli.errors import UsageError
from kasa_cli.methods import CRITERIA, RULES, SIGNS, Amount, matched_rank
from kasa_cli.model_names import NameMap
from kasa_cli.pipeline.measuring import Asked, Facts, ask, measure_plan, open_facts, require_some, store_notes
from kasa_cli.pipeline.opening import ModelLocation, survey
from kasa_cli.pipeline.selecting import ranking
from kasa_cli.pipeline.selecting.export import EMISSIONS, export
from kasa_cli.pipeline.selecting.ranking import Judged, Ranking, Scored
from kasa_cli.pipeline.workers import RunOptions, Silent, Watcher, check_running
from kasa_cli.report import MeasurePlan, SelectReport, Skipped
from kasa_cli.targets import AsIn, Candidate, Patterns, candidates, patterns

__all__ = [
    "Amount",
    "ModelLocation",
    "Patterns",
    "RunOptions",
    "SelectRequest",
    "patterns",
    "plan",
    "select_targets",
]

COMMAND = "select-targets"
TOP_P = 0.2
RANK = 16


@dataclass(frozen=True)
class SelectRequest:
    """The options of a selection.

    An empty `amount` selects the best fifth; `prefer` None is the criterion's default; `rule` applies to kappa only.
    """

    amount: Amount = Amount()  # noqa: RUF009 - frozen
    criterion: str = "kappa"
    prefer: str | None = None
    rule: str = "peft"
    max_dim: int = 16384
    per_type: bool = False
    shape_fair: bool = False
    match_budget: int | None = None
    compare: tuple[str, ...] = ()
    emit: str | None = None


def plan(
    where: ModelLocation,
    options: SelectRequest | None = None,
    patterns: Patterns | None = None,
    running: RunOptions | None = None,
) -> MeasurePlan:
    """The weights that `select_targets` would score, from headers alone.

    Raises:
        KasaError: the errors that `select_targets` raises before it reads a weight.
    """
    options, running = options or SelectRequest(), running or RunOptions()
    check_running(running)
    checkpoint, names, chosen, skipped = _survey(where, options, check(options), patterns)
    return measure_plan(COMMAND, where, (checkpoint, names), chosen, skipped, running)


def select_targets(
    where: ModelLocation,
    options: SelectRequest | None = None,
    patterns: Patterns | None = None,
    running: RunOptions | None = None,
    watcher: Watcher | None = None,
) -> SelectReport:
    """Score every candidate and choose the best.

    Raises:
        KasaError: a subclass that fits the failure; for a weight that is not finite it names the tensor.
    """
    options, running, watcher = options or SelectRequest(), running or RunOptions(), watcher or Silent()
    rank_by = check(options)
    check_running(running)
    facts = open_facts(running)
    checkpoint, names, chosen, skipped = _survey(where, options, rank_by, patterns, facts)
    weights = [matrix for target in chosen for matrix in target.matrices]
    answers = ask(checkpoint, weights, lambda bench: ranking.judge(bench, rank_by), facts, running, watcher)
    scored, unscored = ranking.without_nan(_scored(chosen, answers), list(rank_by.scores))
    best = ranking.chosen(scored, rank_by)
    rank = _matched(options, scored, best)
    modules = tuple(member.candidate.module for member in best if member.candidate.kind == "module")
    parameters = tuple(member.candidate.module for member in best if member.candidate.kind == "parameter")
    has_parameters = any(member.candidate.kind == "parameter" for member in scored)
    return SelectReport(
        command=COMMAND,
        model=where.model,
        model_class=names.model_class,
        criterion=rank_by.criterion,
        rule=rank_by.rule,
        prefer=rank_by.prefer,
        candidates=ranking.rows(scored, best, rank_by),
        target_modules=modules,
        target_parameters=parameters if has_parameters else None,
        matched_rank=rank,
        comparison=ranking.comparison(scored, best, rank_by),
        skipped=(*skipped, *answers.skipped, *unscored),
        totals={
            "candidates": len(scored),
            "selected": len(best),
            "unmeasured": len(answers.skipped),
            **answers.totals,
        },
        emission=export(options.emit, [member.candidate for member in best], checkpoint, names, rank or RANK)
        if options.emit
        else None,
        notes=(*_notes(checkpoint, names, best), *store_notes(facts)),
    )


def _survey(
    where: ModelLocation,
    options: SelectRequest,
    rank_by: Ranking,
    patterns: Patterns | None,
    facts: Facts | None = None,
) -> tuple[Checkpoint, NameMap, tuple[Candidate, ...], tuple[Skipped, ...]]:
    """The model, its candidates under the rule, and the weights that are not candidates."""
    _, checkpoint, names = survey(where, facts.store if facts else None)
    as_in: AsIn = "peft" if rank_by.rule == "peft" else "kasa"
    chosen, skipped = candidates(checkpoint.tensors, names, patterns or Patterns(), as_in, options.max_dim)
    require_some(chosen)
    return checkpoint, names, chosen, skipped


def check(options: SelectRequest) -> Ranking:
    """The ranking that the options ask for.

    Raises:
        UsageError: an option is wrong; the error names it and the values that are known.
    """
    for name in (options.criterion, *options.compare):
        _check_name(name, CRITERIA, "criterion")
    _check_name(options.rule, RULES, "rule")
    _check_name(options.prefer, SIGNS, "end to prefer")
    _check_name(options.emit, EMISSIONS, "format")
    _check_amount(options.amount)
    if options.max_dim < 1 or (options.match_budget is not None and options.match_budget < 1):
        raise UsageError(
            f"--max-dim {options.max_dim} and --match-budget {options.match_budget} must be positive",
            "",
            "give 1 or more",
        )
    criterion = CRITERIA[options.criterion]
    return Ranking(
        criterion=options.criterion,
        rule=options.rule if options.criterion == "kappa" else None,
        prefer=options.prefer or criterion.prefer,
        amount=options.amount if options.amount != Amount() else Amount(top_p=TOP_P),
        by_type=options.per_type,
        fair=options.shape_fair,
        compare=tuple(name for name in dict.fromkeys(options.compare) if name != options.criterion),
    )


def _check_name(name: str | None, known: Iterable[str], what: str) -> None:
    if name is not None and name not in known:
        raise UsageError(f"unknown {what} {name!r}", "", f"known: {', '.join(known)}")


def _check_amount(amount: Amount) -> None:
    amounts = [value for value in (amount.top_p, amount.num_modules, amount.threshold) if value is not None]
    if len(amounts) > 1:
        raise UsageError("--top-p, --num-modules and --threshold exclude each other", "", "give one of them")
    if amount.top_p is not None and not 0 < amount.top_p <= 1:
        raise UsageError(f"--top-p {amount.top_p} is not a fraction", "", "give more than 0 and at most 1")
    if amount.num_modules is not None and amount.num_modules < 1:
        raise UsageError(f"--num-modules {amount.num_modules} is not positive", "", "give 1 or more")
    if amount.threshold is not None and amount.threshold != amount.threshold:
        raise UsageError("--threshold is not a number", "", "give a score")


def _scored(chosen: Sequence[Candidate], answers: Asked[Judged]) -> list[Scored]:
    """The candidates whose matrices are all measured."""
    scored = []
    for candidate in chosen:
        names = [matrix.name for matrix in candidate.matrices]
        if all(name in answers.answers for name in names):
            scored.append(Scored(candidate, tuple(answers.answers[name] for name in names)))
    return scored


def _matched(options: SelectRequest, scored: Sequence[Scored], best: Sequence[Scored]) -> int | None:
    if options.match_budget is None:
        return None
    if not best:
        raise UsageError(
            "--match-budget needs a selection, and nothing is selected",
            "",
            "raise --threshold or leave --match-budget out",
        )
    sizes = [
        [(member.candidate.num_matrices, *member.candidate.shape) for member in group]
        for group in (scored, best)
    ]
    return matched_rank(options.match_budget, *sizes)


def _notes(checkpoint: Checkpoint, names: NameMap, best: Sequence[Scored]) -> list[str]:
    """Notes for the user before training on the selection."""
    notes = [names.note] if names.note else []
    tied = [
        member.candidate.module
        for member in best
        for piece in member.candidate.matrices[0].pieces
        if names.slots[piece.name].module != member.candidate.module and names.slots[piece.name].tied_with
    ]
    if tied:
        notes.append(
            f"{tied[0]} shares its weight with the embeddings: merging a LoRA on it changes both; --exclude {tied[0]}"
        )
    return notes
