"""Ranks the candidates by their scores and selects the best; modules and fused experts are ranked separately."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from kasa_cli.errors import UsageError
from kasa_cli.methods import CRITERIA, RULES, SIGNS, Amount, Score, Spectrum, expected, selection
from kasa_cli.pipeline.measuring import Bench
from kasa_cli.report import CandidateRow, CriterionComparison, Skipped, module_type
from kasa_cli.targets import Candidate

KINDS = ("module", "parameter")


@dataclass(frozen=True)
class Ranking:
    """The criterion and the amount of a selection. `prefer` says whether high or low scores are preferred.

    `fair`: divide a score by that of a random matrix of the same shape; `by_type`: rank within each module type.
    """

    criterion: str
    rule: str | None
    prefer: str
    amount: Amount
    by_type: bool = False
    fair: bool = False
    compare: tuple[str, ...] = ()

    @property
    def scores(self) -> dict[str, Score]:
        """The score functions, by criterion."""
        own = RULES[self.rule] if self.rule else CRITERIA[self.criterion].score
        return {self.criterion: own, **{name: CRITERIA[name].score for name in self.compare}}

    @property
    def needs_values(self) -> bool:
        """Whether a score needs the whole spectrum."""
        return any(CRITERIA[name].needs_values for name in self.scores)


@dataclass(frozen=True)
class Judged:
    """The scores of one weight by criterion, and the expected score of a random matrix, if it is needed."""

    scores: Mapping[str, float]
    expected: float | None


@dataclass(frozen=True)
class Scored:
    """A candidate with the scores of its matrices: one, or one for each expert."""

    candidate: Candidate
    judged: tuple[Judged, ...]

    def score(self, criterion: str) -> float:
        """The arithmetic mean over its matrices."""
        return fmean(self.each(criterion))

    def each(self, criterion: str) -> tuple[float, ...]:
        """The scores of its matrices."""
        return tuple(judged.scores[criterion] for judged in self.judged)

    @property
    def expected(self) -> float | None:
        """The mean score of random matrices of the same shape."""
        scores = [judged.expected for judged in self.judged if judged.expected is not None]
        return fmean(scores) if scores else None

    def decisive(self, criterion: str) -> float:
        """The score that decides the order: divided by the expected one, where that is known."""
        expected = self.expected
        return self.score(criterion) if expected is None else self.score(criterion) / expected


def judge(bench: Bench, ranking: Ranking) -> Judged:
    """The scores of one weight.

    Raises:
        UsageError: the criterion has no usable score for a random matrix.
    """
    values = bench.values().S if ranking.needs_values else None
    ends = bench.extremes()
    spectrum = Spectrum(bench.weight.shape, ends.sigma_max, ends.sigma_min, ends.frobenius, values)
    scores = {name: score(spectrum) for name, score in ranking.scores.items()}
    return Judged(scores, _chance(ranking, spectrum) if ranking.fair else None)


def _chance(ranking: Ranking, spectrum: Spectrum) -> float:
    """The score of a random matrix of that shape and norm."""
    chance = expected(ranking.scores[ranking.criterion], spectrum.shape, spectrum.frobenius)
    if not 0 < chance < math.inf:
        problem = f"a random matrix of {spectrum.shape[0]} x {spectrum.shape[1]} scores {chance}"
        raise UsageError(problem, ranking.criterion, "--shape-fair needs another criterion")
    return chance


def chosen(scored: Sequence[Scored], ranking: Ranking) -> list[Scored]:
    """The selection, best first: modules, then parameters; the amount applies to each kind separately."""
    return [
        members[index]
        for members in _by_kind(scored)
        for index in selection.choose(
            [member.decisive(ranking.criterion) for member in members],
            ranking.prefer,
            ranking.amount,
            _types(members) if ranking.by_type else None,
        )
    ]


def rows(scored: Sequence[Scored], best: Sequence[Scored], ranking: Ranking) -> tuple[CandidateRow, ...]:
    """A row for every candidate, in the order of the model, with its rank from 1."""
    ranks = _ranks(scored, ranking)
    selected = {member.candidate.module for member in best}
    return tuple(_row(member, ranks[member.candidate.module], selected, ranking) for member in scored)


def comparison(
    scored: Sequence[Scored], best: Sequence[Scored], ranking: Ranking
) -> tuple[CriterionComparison, ...]:
    """For each other criterion: the overlap with an equally large selection by it, and the rank correlation."""
    return tuple(_compared(name, scored, best, ranking) for name in ranking.compare)


def without_nan(
    scored: Sequence[Scored], criteria: Sequence[str]
) -> tuple[list[Scored], tuple[Skipped, ...]]:
    """The candidates that every criterion scores, and the others with the first criterion that does not."""
    unscored = {
        member.candidate.module: name
        for member in scored
        for name in criteria
        if member.score(name) != member.score(name)
    }
    ranked = [member for member in scored if member.candidate.module not in unscored]
    return ranked, tuple(Skipped(module, f"{name} gives it no score") for module, name in unscored.items())


def _compared(
    name: str, scored: Sequence[Scored], best: Sequence[Scored], ranking: Ranking
) -> CriterionComparison:
    """The comparison with one criterion; correlations of modules and of parameters are averaged by their number."""
    prefer, selected, other, correlations = CRITERIA[name].prefer, [], [], []
    for members in _by_kind(scored):
        ours = [member.candidate.module for member in best if member in members]
        theirs = selection.choose(
            [member.score(name) for member in members], prefer, Amount(num_modules=len(ours))
        )
        selected += ours
        other += [members[index].candidate.module for index in theirs]
        scores = [SIGNS[ranking.prefer] * member.decisive(ranking.criterion) for member in members]
        correlation = selection.rank_correlation(
            scores, [SIGNS[prefer] * member.score(name) for member in members]
        )
        correlations += [] if correlation is None else [(correlation, len(members))]
    weight = sum(count for _, count in correlations)
    return {
        "criterion": name,
        "prefer": prefer,
        "overlap": selection.overlap(selected, other),
        "rank_correlation": sum(correlation * count for correlation, count in correlations) / weight
        if weight
        else None,
    }


def _row(scored: Scored, rank: int, selected: set[str], ranking: Ranking) -> CandidateRow:
    candidate = scored.candidate
    return CandidateRow(
        module=candidate.module,
        kind=candidate.kind,
        module_type=module_type(candidate.module),
        shape=candidate.shape,
        score=scored.score(ranking.criterion),
        rank_in_order=rank,
        selected=candidate.module in selected,
        expected=scored.expected,
        experts=scored.each(ranking.criterion) if candidate.kind == "parameter" else None,
        others={name: scored.score(name) for name in ranking.compare} or None,
    )


def _ranks(scored: Sequence[Scored], ranking: Ranking) -> dict[str, int]:
    """The rank of each candidate within its kind, or within its module type."""
    ranks: dict[str, int] = {}
    for members in _by_kind(scored):
        labels = _types(members) if ranking.by_type else [""] * len(members)
        counts: dict[str, int] = {}
        for index in selection.order(
            [member.decisive(ranking.criterion) for member in members], ranking.prefer
        ):
            counts[labels[index]] = counts.get(labels[index], 0) + 1
            ranks[members[index].candidate.module] = counts[labels[index]]
    return ranks


def _by_kind(scored: Sequence[Scored]) -> list[list[Scored]]:
    groups = [[member for member in scored if member.candidate.kind == kind] for kind in KINDS]
    return [members for members in groups if members]


def _types(members: Sequence[Scored]) -> list[str]:
    return [module_type(member.candidate.module) for member in members]
