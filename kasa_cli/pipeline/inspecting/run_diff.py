"""`kasa inspect diff`: two checkpoints of the same shapes, weight by weight."""

from collections.abc import Sequence
from dataclasses import replace

from kasa_cli.checkpoint import Checkpoint, measuring_bytes
from kasa_cli.errors import UsageError
from kasa_cli.methods import rank_correlation
from kasa_cli.pipeline.inspecting.diff import ComparedPair, Pair, contrast
from kasa_cli.pipeline.measuring import Facts, open_facts, room, store_notes
from kasa_cli.pipeline.opening import ModelLocation, survey
from kasa_cli.pipeline.workers import (
    RunOptions,
    Silent,
    Task,
    Watcher,
    blas_threads,
    check_running,
    run_stage,
)
from kasa_cli.report import DiffReport, Skipped
from kasa_cli.targets import Candidate, Patterns, candidates, patterns

__all__ = ["ModelLocation", "Patterns", "RunOptions", "diff", "patterns"]

ANY_SIDE = 1 << 62
RANK = 16


def diff(
    models: tuple[ModelLocation, ModelLocation],
    patterns: Patterns | None = None,
    running: RunOptions | None = None,
    rank: int = RANK,
    watcher: Watcher | None = None,
) -> DiffReport:
    """Compare the linear weights of two checkpoints, or those that the patterns name.

    `rank` is the number of top and of bottom singular vectors that are compared; for narrow weights it is smaller.

    Raises:
        KasaError: a subclass that fits the failure.
    """
    running, watcher, patterns = running or RunOptions(), watcher or Silent(), patterns or Patterns()
    check_running(running)
    if rank < 1:
        raise UsageError(f"invalid subspace rank {rank}", "", "it must be positive")
    facts = open_facts(running)
    sources, chosen, notes = _open(models, patterns, facts)
    pairs, skipped = _pairs(*chosen)
    if not pairs:
        raise UsageError(
            "the two models have no weight in common",
            f"{models[0].model} and {models[1].model}",
            "compare models of one family",
        )
    results = _contrasted(pairs, sources, facts, (running, rank), watcher)
    compared = {name: outcome for name, outcome in results.items() if isinstance(outcome, ComparedPair)}
    rows = tuple(result.row for result in compared.values() if result.row)
    return DiffReport(
        command="inspect diff",
        models=(models[0].model, models[1].model),
        tensors=rows,
        identical=tuple(name for name, result in compared.items() if result.row is None),
        skipped=(*skipped, *(outcome for outcome in results.values() if isinstance(outcome, Skipped))),
        rank_correlation=rank_correlation([row.kappa[0] for row in rows], [row.kappa[1] for row in rows]),
        totals={
            "differing": len(rows),
            "identical": len(compared) - len(rows),
            "unmeasured": len(results) - len(compared),
            "decompositions": sum(result.num_new for result in compared.values()),
            "decompositions_reused": sum(result.num_reused for result in compared.values()),
        },
        notes=(*notes, *store_notes(facts)),
    )


def _open(
    models: tuple[ModelLocation, ModelLocation], patterns: Patterns, facts: Facts
) -> tuple[tuple[Checkpoint, Checkpoint], list[tuple[Candidate, ...]], list[str]]:
    """Both checkpoints, and the weights to compare in each."""
    checkpoints, chosen, notes = [], [], []
    for where in models:
        _, checkpoint, names = survey(where, facts.store)
        checkpoints.append(checkpoint)
        chosen.append(candidates(checkpoint.tensors, names, patterns, "kasa", ANY_SIDE)[0])
        notes += [f"{where.model}: {names.note}"] if names.note else []
    return (checkpoints[0], checkpoints[1]), chosen, notes


def _pairs(first: Sequence[Candidate], second: Sequence[Candidate]) -> tuple[list[Pair], tuple[Skipped, ...]]:
    """The weights that both checkpoints have, by their names in memory, and those that are skipped."""
    ours, theirs = ({candidate.module: candidate for candidate in chosen} for chosen in (first, second))
    pairs, skipped = [], []
    for module in dict.fromkeys((*ours, *theirs)):
        if module not in ours or module not in theirs:
            skipped.append(Skipped(module, f"only in {'B' if module in theirs else 'A'}"))
        elif ours[module].shape != theirs[module].shape or _forms_differ(ours[module], theirs[module]):
            skipped.append(Skipped(module, "its shape in B differs"))
        else:
            pairs += _matched(ours[module], theirs[module])
    return pairs, tuple(skipped)


def _forms_differ(ours: Candidate, theirs: Candidate) -> bool:
    return ours.num_matrices != theirs.num_matrices or ours.is_transposed != theirs.is_transposed


def _matched(ours: Candidate, theirs: Candidate) -> list[Pair]:
    both = zip(ours.matrices, theirs.matrices, strict=True)
    return [
        Pair(first.name, ours.module, ours.shape, first, replace(second, name=first.name))
        for first, second in both
    ]


def _size(pair: Pair, sources: tuple[Checkpoint, Checkpoint]) -> int:
    """Bytes of a comparison: both weights, and one Gram matrix at a time."""
    return room(pair.first) + room(pair.second) - measuring_bytes(pair.shape, 0)


def _contrasted(
    pairs: Sequence[Pair],
    sources: tuple[Checkpoint, Checkpoint],
    facts: Facts,
    settings: tuple[RunOptions, int],
    watcher: Watcher,
) -> dict[str, ComparedPair | Skipped]:
    """Compare every pair, in the given order; with `keep_going`, pairs that cannot be measured are skipped.

    `settings`: how the run is carried out, and the subspace rank.
    """
    running, rank = settings

    def compared(pair: Pair) -> ComparedPair | Skipped:
        return contrast(pair, sources, facts, rank)

    task = Task(
        compared,
        name=lambda pair: pair.name,
        work=lambda pair: min(pair.shape) ** 2 * max(pair.shape),
        memory=lambda pair: _size(pair, sources),
        on_failure=(lambda pair, error: Skipped(pair.name, error.what)) if running.keep_going else None,
    )
    with blas_threads(running.threads_per_worker):
        results = run_stage("compare", task, pairs, running.num_workers, watcher)
    return {pair.name: result for pair, result in zip(pairs, results, strict=True)}
