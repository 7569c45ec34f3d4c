"""`kasa select-targets`: rank what could be fine-tuned by one figure of its spectrum, and hand the best over."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.errors import UsageError
from kasa_cli.methods.criteria import CRITERIA, RULES
from kasa_cli.methods.selection import SIGNS, Amount, matched_rank
from kasa_cli.model_names.names import NameMap
from kasa_cli.pipeline.measuring.facts import Facts, open_facts, store_notes
from kasa_cli.pipeline.measuring.many import Asked, ask
from kasa_cli.pipeline.measuring.plan import measure_plan, require_some
from kasa_cli.pipeline.opening import Where, survey
from kasa_cli.pipeline.selecting import ranking
from kasa_cli.pipeline.selecting.export import EMISSIONS, hand_over
from kasa_cli.pipeline.selecting.ranking import Judged, Ranking, Scored
from kasa_cli.pipeline.workers import Running, Silent, Watcher, check_running
from kasa_cli.report import MeasurePlan, SelectReport, Skipped
from kasa_cli.targets.candidates import AsIn, Candidate, candidates
from kasa_cli.targets.patterns import Patterns, patterns

__all__ = ["Amount", "Choice", "Patterns", "Running", "Where", "patterns", "plan", "select_targets"]

COMMAND = "select-targets"
TOP_P = 0.2
RANK = 16


@dataclass(frozen=True)
class Choice:
    """The options of `kasa select-targets` that are about the choice.

    `amount` empty is the best fifth; `prefer` None the criterion's own end; `rule` is of kappa only.
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
    where: Where,
    options: Choice | None = None,
    patterns: Patterns | None = None,
    running: Running | None = None,
) -> MeasurePlan:
    """What `select_targets` would score, from headers alone.

    Raises:
        KasaError: whatever `select_targets` would refuse before it reads a weight.
    """
    options, running = options or Choice(), running or Running()
    check_running(running)
    checkpoint, names, found, skipped = _survey(where, options, check(options), patterns)
    return measure_plan(COMMAND, where, (checkpoint, names), found, skipped, running)


def select_targets(
    where: Where,
    options: Choice | None = None,
    patterns: Patterns | None = None,
    running: Running | None = None,
    watcher: Watcher | None = None,
) -> SelectReport:
    """Score every candidate and choose the best.

    Raises:
        KasaError: by the kind of trouble; a weight that is not finite by the name of its tensor.
    """
    options, running, watcher = options or Choice(), running or Running(), watcher or Silent()
    rank_by = check(options)
    check_running(running)
    facts = open_facts(running)
    checkpoint, names, found, skipped = _survey(where, options, rank_by, patterns, facts)
    weights = [matrix for one in found for matrix in one.matrices]
    asked = ask(checkpoint, weights, lambda bench: ranking.judge(bench, rank_by), facts, running, watcher)
    scored, mute = ranking.without_nan(_scored(found, asked), list(rank_by.scores))
    best = ranking.chosen(scored, rank_by)
    rank = _matched(options, scored, best)
    modules = tuple(one.candidate.module for one in best if one.candidate.kind == "module")
    parameters = tuple(one.candidate.module for one in best if one.candidate.kind == "parameter")
    has_parameters = any(one.candidate.kind == "parameter" for one in scored)
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
        skipped=(*skipped, *asked.skipped, *mute),
        totals={
            "candidates": len(scored),
            "selected": len(best),
            "unmeasured": len(asked.skipped),
            **asked.totals,
        },
        emission=hand_over(options.emit, [one.candidate for one in best], checkpoint, names, rank or RANK)
        if options.emit
        else None,
        notes=(*_notes(checkpoint, names, best), *store_notes(facts)),
    )


def _survey(
    where: Where,
    options: Choice,
    rank_by: Ranking,
    patterns: Patterns | None,
    facts: Facts | None = None,
) -> tuple[Checkpoint, NameMap, tuple[Candidate, ...], tuple[Skipped, ...]]:
    """The model, and what of it is a candidate under the rule."""
    _, checkpoint, names = survey(where, facts.store if facts else None)
    as_in: AsIn = "peft" if rank_by.rule == "peft" else "kasa"
    found, skipped = candidates(checkpoint.tensors, names, patterns or Patterns(), as_in, options.max_dim)
    require_some(found)
    return checkpoint, names, found, skipped


def check(options: Choice) -> Ranking:
    """What to rank by.

    Raises:
        UsageError: saying which option, and what is known.
    """
    for name in (options.criterion, *options.compare):
        _check_name(name, CRITERIA, "criterion")
    _check_name(options.rule, RULES, "rule")
    _check_name(options.prefer, SIGNS, "end to prefer")
    _check_name(options.emit, EMISSIONS, "hand-off")
    _check_amount(options.amount)
    if options.max_dim < 1 or (options.match_budget is not None and options.match_budget < 1):
        raise UsageError("--max-dim and --match-budget must be positive")
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
    given = [value for value in (amount.top_p, amount.num_modules, amount.threshold) if value is not None]
    if len(given) > 1:
        raise UsageError("give one of --top-p, --num-modules and --threshold, not several")
    if amount.top_p is not None and not 0 < amount.top_p <= 1:
        raise UsageError(f"--top-p {amount.top_p} is not above 0 and at most 1")
    if amount.num_modules is not None and amount.num_modules < 1:
        raise UsageError(f"--num-modules {amount.num_modules} is not positive")
    if amount.threshold is not None and amount.threshold != amount.threshold:
        raise UsageError("--threshold is not a number")


def _scored(found: Sequence[Candidate], asked: Asked[Judged]) -> list[Scored]:
    """The candidates all of whose matrices were measured."""
    scored = []
    for one in found:
        names = [matrix.name for matrix in one.matrices]
        if all(name in asked.answers for name in names):
            scored.append(Scored(one, tuple(asked.answers[name] for name in names)))
    return scored


def _matched(options: Choice, scored: Sequence[Scored], best: Sequence[Scored]) -> int | None:
    if options.match_budget is None:
        return None
    if not best:
        raise UsageError("nothing is selected, so no rank matches a budget")
    sizes = [
        [(one.candidate.num_matrices, *one.candidate.shape) for one in group] for group in (scored, best)
    ]
    return matched_rank(options.match_budget, *sizes)


def _notes(checkpoint: Checkpoint, names: NameMap, best: Sequence[Scored]) -> list[str]:
    """What a user should know before training on the choice."""
    notes = [names.note] if names.note else []
    tied = [
        one.candidate.module
        for one in best
        for piece in one.candidate.matrices[0].pieces
        if names.slots[piece.name].module != one.candidate.module and names.slots[piece.name].tied_with
    ]
    if tied:
        notes.append(
            f"{tied[0]} shares its weight with the embeddings: merging a LoRA on it changes both; --exclude {tied[0]}"
        )
    return notes
